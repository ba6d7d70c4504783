"""Paged caches: one allocation for all layers; free lists hand pages to sequences."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.checks import shown, whole
from megatron_mlra.inference.context import TokenCut
from megatron_mlra.inference.parallel import HeadShard


class CacheFull(ValueError):
    """More tokens than the cache, or the free part of the cache, can hold."""


def _pages(num_pages: int, page_size: int) -> tuple[int, int]:
    return whole("number of pages", num_pages), whole("page size", page_size)


class PagePool:
    """The free lists over the pages of all context-parallel ranks, `num_pages` per rank.

    A sequence's pages go round the ranks, and a page id names its rank (context.py). Every rank
    keeps the free lists of all ranks, so that all ranks decide alike.

    Raises:
        ValueError: a size that is not a whole number of at least 1.
    """

    def __init__(self, num_pages: int, page_size: int, ranks: int = 1) -> None:
        self.rank_pages, self.page_size = _pages(num_pages, page_size)
        self.ranks = whole("context parallel size", ranks)
        self.num_pages = self.rank_pages * self.ranks
        self._free = [
            list(range((self.rank_pages - 1) * ranks + rank, -1, -ranks)) for rank in range(ranks)
        ]

    @property
    def free(self) -> int:
        """Pages that no sequence holds, on all ranks together."""
        return sum(map(len, self._free))

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` need, on all ranks together."""
        return -(-tokens // self.page_size)

    def ever_fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` fits into an empty cache."""
        return -(-self.pages_for(tokens) // self.ranks) <= self.rank_pages

    def fits(self, tokens: int) -> bool:
        """Whether `take(tokens)` would find pages now."""
        return self._first_rank(self.pages_for(tokens)) is not None

    def take(self, tokens: int) -> list[int]:
        """Take page ids for `tokens`, beginning on the rank that leaves the fullest rank the most
        free pages.

        Raises:
            CacheFull: too few pages are free; nothing is taken.
        """
        needed = self.pages_for(tokens)
        first = self._first_rank(needed)
        if first is None:
            raise CacheFull(
                f"{tokens} tokens need {needed} pages of {self.page_size}, {self.free} of"
                f" {self.num_pages} are free"
            )
        return [self._free[(first + i) % self.ranks].pop() for i in range(needed)]

    def _first_rank(self, needed: int) -> int | None:
        """The rank of the first page; None where the pages fit from no rank on."""
        best, most = None, -1
        for first in range(self.ranks):
            # The rank of turn i gets pages i, i + ranks, ...
            left = min(
                len(self._free[(first + turn) % self.ranks])
                - max(0, needed - turn + self.ranks - 1) // self.ranks
                for turn in range(self.ranks)
            )
            if left > most:
                best, most = first, left
        return best

    def give_back(self, pages: list[int]) -> None:
        """Return pages to the free lists of their ranks."""
        given = set(pages)
        assert len(given) == len(pages), "a page was given back twice"
        assert given.isdisjoint(itertools.chain(*self._free)), "a page was given back twice"
        for page in reversed(pages):
            self._free[page % self.ranks].append(page)


class _Cache:
    """What both kinds of caches say of themselves."""

    data: Tensor
    scale: Tensor | None = None
    pages: int
    """Pages for sequences, on this rank."""
    page_size: int

    @property
    def dtype_name(self) -> str:
        """The dtype of the cached numbers, as users write it."""
        return str(self.data.dtype).removeprefix("torch.")

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the allocation."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


class LatentCache(_Cache):
    """Latents and RoPE keys of one rank, as `mlra_kernels.latent_decode` reads them.

    A row is `[c_0 ... c_{n-1} | k_rope]` of the rank's n latent heads: `n d_l + d_r` numbers. An
    FP8 cache stores latents in e4m3, with one float32 scale per token and latent, and the RoPE key
    in bfloat16.

    Args:
        layers: layers to allocate; None: the model's.

    Raises:
        ValueError: a size that is not a whole number of at least 1.
    """

    def __init__(
        self,
        model: ModelDescription,
        shard: HeadShard,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str | torch.device,
        layers: int | None = None,
    ) -> None:
        fp8 = dtype == torch.float8_e4m3fn
        latents = shard.core.branches * shard.core.groups
        self.pages, self.page_size = _pages(num_pages, page_size)
        width = latents * model.latent_dim + model.qk_rope_head_dim * (2 if fp8 else 1)
        layers = model.num_layers if layers is None else layers
        self.data = torch.empty(
            layers, self.pages, self.page_size, width, dtype=dtype, device=device
        )
        if fp8:
            shape = (layers, self.pages, latents, self.page_size)
            self.scale = torch.empty(shape, dtype=torch.float32, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Rows `[pages, page_size, width]` and FP8 scales `[pages, n, page_size]` of a layer."""
        return self.data[index], None if self.scale is None else self.scale[index]

    def scratch(self, pages: int) -> tuple[Tensor, Tensor | None]:
        """A layer of `pages` pages outside the cache, in the form of `layer`."""
        data = self.data.new_empty(pages, *self.data.shape[2:])
        if self.scale is None:
            return data, None
        return data, self.scale.new_empty(pages, *self.scale.shape[2:])

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers on this rank."""
        return self.allocated_bytes // (self.data.size(1) * self.page_size)


class GroupedCache(_Cache):
    """Keys and values of grouped-query attention, `[layers, 2, pages, page_size, heads, dim]`.

    One spare page, behind the `num_pages`, takes the writes of a captured step's padding rows.

    Raises:
        ValueError: an FP8 dtype, or a size that is not a whole number of at least 1.
    """

    def __init__(
        self,
        model: ModelDescription,
        kv_heads: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str | torch.device,
        layers: int | None = None,
    ) -> None:
        if dtype == torch.float8_e4m3fn:
            raise ValueError(f"an FP8 cache needs latent attention, this is {model.variant}")
        self.pages, self.page_size = _pages(num_pages, page_size)
        self.data = torch.empty(
            (
                layers or model.num_layers,
                2,
                self.pages + 1,
                self.page_size,
                kv_heads,
                model.head_dim,
            ),
            dtype=dtype,
            device=device,
        )

    def layer(self, index: int) -> Tensor:
        """Keys and values `[2, pages, page_size, heads, dim]` of a layer."""
        return self.data[index]

    def scratch(self, pages: int) -> Tensor:
        """A layer of `pages` pages and a spare page outside the cache."""
        return self.data.new_empty(2, pages + 1, *self.data.shape[3:])

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers on this rank."""
        return self.allocated_bytes // (self.data.size(2) * self.page_size)


def append_grouped(key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
    """Write keys and values `[T, heads, dim]` to `layer` `[2, pages + 1, page_size, heads, dim]`.

    slots: `[T]` int64, page * page_size + offset; a negative slot goes to the spare page.
    """
    pages, page_size = layer.shape[1:3]
    spare = (pages - 1) * page_size
    slots = torch.where(slots < 0, spare, slots)
    flat = layer.flatten(1, 2)
    flat[0].index_copy_(0, slots, key)
    flat[1].index_copy_(0, slots, value)


class BlockTables:
    """Block tables of the running sequences on the device: row i belongs to batch row i.

    If tokens are cut over ranks, a row holds this rank's pages.

    Args:
        pages: page ids of the cache, on all ranks; None: not checked.

    Raises:
        ValueError: a size that is not a whole number of at least 1.
    """

    def __init__(
        self,
        rows: int,
        max_pages: int,
        device: str | torch.device,
        cut: TokenCut | None = None,
        pages: int | None = None,
    ) -> None:
        self.cut, self.pages = cut, pages
        rows, self.max_pages = whole("rows", rows), whole("max_pages", max_pages)
        own = self.max_pages if cut is None else -(-self.max_pages // cut.ranks)
        self.device_table = torch.zeros(rows, own, dtype=torch.int32, device=device)
        self._set: list[list[int]] = [[] for _ in range(rows)]

    def set(self, row: int, pages: list[int]) -> None:
        """Write this rank's part of a sequence's `pages` (of all ranks) to a row.

        Raises:
            ValueError: no such row, no page, too many pages, or no ids of pages.
        """
        row = whole("row of the block table", row, 0, len(self._set) - 1)
        last = None if self.pages is None else self.pages - 1
        pages = [whole(f"page of row {row}", page, 0, last) for page in pages]
        whole(f"number of pages of row {row}", len(pages), 1, self.max_pages)
        own = pages if self.cut is None else self.cut.own_pages(pages)
        table = torch.tensor(own, dtype=torch.int32)
        self.device_table[row, : len(own)].copy_(table)
        self._set[row] = pages

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another."""
        self.device_table[target].copy_(self.device_table[source])
        self._set[target] = self._set[source]

    def check(self, row: int, pages: list[int], last: int) -> None:
        """Compare a row with a sequence's `pages`: the first, and the one of index `last`.

        Raises:
            ValueError: the row was set to other pages, or to none.
        """
        held = self._set[row]
        if len(held) <= last or held[0] != pages[0] or held[last] != pages[last]:
            raise ValueError(
                f"row {row} of the block tables holds pages {shown(held)}, and its sequence has"
                f" {shown(pages)}; call tables.set({row}, pages) before decoding"
            )
