"""Which rank caches which tokens of a sequence, where its tokens are cut over ranks; pure Python.

The cut is by pages, round robin: a sequence's page k lies on the rank behind that of page k - 1.
While a sequence is decoded its ranks therefore hold equal numbers of tokens, to within one page,
whatever its length: the rank that caches the next 64 tokens is the one that waited longest. (Cut
into one run a rank, the last rank would cache all new tokens, and read them at every step.) And a
rank's page is a page of the sequence, so kernels, block tables and page accounting stay as they
are. The rank of the first page is the pool's choice: were it always rank 0, a batch of short
sequences would lie there.

A page id names its rank: id i is page i // ranks of the cache of rank i % ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mlra.inference.checks import whole


@dataclass(frozen=True)
class TokenCut:
    """One rank's part of every sequence; of one rank: all of it."""

    page_size: int
    ranks: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        whole("page size", self.page_size)
        whole("context parallel size", self.ranks)
        whole("context parallel rank", self.rank, 0, self.ranks - 1)

    def owner(self, page: int) -> int:
        """The rank that holds a page."""
        return page % self.ranks

    def own_pages(self, pages: list[int]) -> list[int]:
        """This rank's pages of a sequence, as its cache numbers them, in order."""
        return [page // self.ranks for page in pages[self._turn(pages) :: self.ranks]]

    def own_tokens(self, pages: list[int], tokens: int) -> int:
        """How many of a sequence's first `tokens` this rank caches: those of its own pages."""
        full, rest = divmod(tokens, self.page_size)
        turn = self._turn(pages)
        own = max(0, full - turn + self.ranks - 1) // self.ranks * self.page_size
        return own + (rest if full % self.ranks == turn else 0)

    def slot(self, pages: list[int], position: int) -> int:
        """Where this rank writes a sequence's token `position`; -1 where another rank does."""
        page = pages[position // self.page_size]
        if self.owner(page) != self.rank:
            return -1
        return page // self.ranks * self.page_size + position % self.page_size

    def _turn(self, pages: list[int]) -> int:
        """This rank's first page of a sequence."""
        return (self.rank - pages[0]) % self.ranks
