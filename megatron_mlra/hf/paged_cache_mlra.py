"""A paged latent cache behind transformers' DynamicCache, and calls of the kernels that read it.

Letters: b sequences, s new tokens per sequence, t cached tokens, L latent heads, w = L * d_l + d_r
numbers per token, j = h / G attention heads per latent head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import logging

from .configuration_mlra import MLRAConfig

logger = logging.get_logger(__name__)

PAGE_SIZE = 64
MAX_KERNEL_TOKENS = 8
"""Most new tokens per sequence with which a step runs in the decoding kernel."""


class PagedLatentLayer(DynamicLayer):
    """One layer's latents and RoPE keys, in pages that the decoding kernels read in place.

    `keys` `[b, 1, capacity, w]` holds the pages of all sequences; the pages of one sequence are
    contiguous. `values` stays empty. Padding is not stored: token t of a left-padded row lies at
    index `t - starts[row]`, so that the kernels need no mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.starts: Tensor | None = None

    def get_seq_length(self) -> int:
        """Cached tokens per row, padding included."""
        return self.length

    def append(self, rows: Tensor, starts: Tensor) -> None:
        """Store new tokens.

        Args:
            rows: `[b, s, w]`, latents, then RoPE key.
            starts: `[b]` int64, padding tokens in front of each row. All padding must lie within
                the tokens of the first call.
        """
        b, s, w = rows.shape
        if not self.is_initialized:
            self.dtype, self.device = rows.dtype, rows.device
            self.keys = rows.new_empty(b, 1, 0, w)
            self.values = rows.new_empty(b, 1, 0, 0)
            self.is_initialized = True
        self._reserve(self.length + s)
        token = torch.arange(s, device=rows.device)
        if self.length == 0:
            self.starts = starts
            # Entries after a sequence's end are overwritten by later tokens before they are read.
            shifted = (token + starts[:, None]).clamp_max(s - 1)
            self.keys[:, 0, :s] = rows.gather(1, shifted[..., None].expand(-1, -1, w))
        else:
            row = torch.arange(b, device=rows.device)[:, None]
            self.keys[row, 0, self.length + token - starts[:, None]] = rows
        self.length += s

    def _reserve(self, tokens: int) -> None:
        b, _, capacity, w = self.keys.shape
        if tokens <= capacity:
            return
        # Capacity grows by a quarter at least, so that copying has a constant cost per token.
        pages = -(-max(tokens, capacity * 5 // 4) // PAGE_SIZE)
        grown = self.keys.new_zeros(b, 1, pages * PAGE_SIZE, w)
        grown[:, :, :capacity] = self.keys
        self.keys = grown

    def padded(self) -> Tensor:
        """Rows `[b, t, w]` with every token at its index in the padded row. Padding positions hold
        copies of arbitrary tokens."""
        token = torch.arange(self.length, device=self.keys.device)
        index = (token - self.starts[:, None]).clamp_min(0)
        return self.keys[:, 0].gather(1, index[..., None].expand(-1, -1, self.keys.size(-1)))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Not supported: `append` fills the cache, since it takes the padding of each row.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the paged latent cache is filled by append")

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; a positive number is the length to keep."""
        tokens = int(tokens_to_remove)  # assisted generation may count in tensors
        self.length = min(self.length, tokens) if tokens > 0 else max(self.length + tokens, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        if self.length:
            super().batch_select_indices(indices.to(self.keys.device))
            self.starts = self.starts[indices.to(self.starts.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.length:
            super().batch_repeat_interleave(repeats)
            self.starts = self.starts.repeat_interleave(repeats, dim=0)


class PagedStep:
    """One forward over a paged cache: the padding of rows, and the schedule that all layers share.

    Args:
        config: the model's configuration.
        cache: of PagedLatentLayer layers.
        attention_mask: `[b, t]`, 0 for padding, or None without padding.
        shape: (b, s) of the new tokens.
        backend: "mlra_kernels" or "torch".
        device: of the new tokens.

    Raises:
        ValueError: the mask is not plain left padding.
    """

    def __init__(
        self,
        config: MLRAConfig,
        cache: Cache,
        attention_mask: Tensor | None,
        shape: tuple[int, int],
        backend: str,
        device: torch.device,
    ) -> None:
        self.config, self.layers, self.backend = config, cache.layers, backend
        self.past, (b, self.tokens) = cache.get_seq_length(), shape
        problem = _unsuited(attention_mask, self.layers[0].starts if self.past else None)
        if problem:
            raise ValueError(_refused(config, problem))
        if self.past:
            self.starts = self.layers[0].starts
        elif attention_mask is None:
            self.starts = torch.zeros(b, dtype=torch.int64, device=device)
        else:
            self.starts = (attention_mask == 0).sum(-1)
        self.in_kernel = self.past > 0 and self.tokens <= MAX_KERNEL_TOKENS
        self._schedules: dict[torch.device, tuple] = {}

    def append(self, rows: Tensor, layer: int) -> Tensor | None:
        """Store a layer's new tokens `[b, s, w]`.

        Returns:
            the rows `[b, t, w]` for attention in torch, or None if `attend` reads the pages.
        """
        pages = self.layers[layer]
        pages.append(rows, self.starts.to(rows.device))
        if self.in_kernel:
            return None
        return pages.padded() if self.past else rows

    def attend(self, q_absorbed: Tensor, q_rope: Tensor, layer: int) -> Tensor:
        """Attend to a layer's cache.

        Args:
            q_absorbed: `[b, s, L, j, d_l]`, queries in latent space.
            q_rope: `[b, s, h, d_r]`, rotated.

        Returns:
            attended latents `[b, s, L, j, d_l]`.
        """
        keys = self.layers[layer].keys
        seqlens, block_table, metadata = self._schedule(keys, q_absorbed)
        out, _ = _kernels().latent_decode(
            q_absorbed.contiguous(),
            q_rope.contiguous(),
            keys.view(-1, PAGE_SIZE, keys.size(-1)),
            block_table,
            seqlens,
            self.config.softmax_scale,
            num_branches=self.config.num_branches,
            metadata=metadata,
            backend=self.backend,
        )
        return out

    def _schedule(self, keys: Tensor, q_absorbed: Tensor) -> tuple:
        if keys.device not in self._schedules:
            b, pages = keys.size(0), keys.size(2) // PAGE_SIZE
            table = torch.arange(b * pages, dtype=torch.int32, device=keys.device).view(b, pages)
            seqlens = (self.past + self.tokens - self.starts).to(keys.device, torch.int32)
            metadata = None
            if self.backend == "mlra_kernels":
                metadata = _kernels().decode_metadata(
                    seqlens,
                    q_len=self.tokens,
                    num_latents=q_absorbed.size(2),
                    heads_per_latent=q_absorbed.size(3),
                    latent_dim=q_absorbed.size(4),
                    cache_dtype=keys.dtype,
                    page_size=PAGE_SIZE,
                )
            self._schedules[keys.device] = seqlens, table, metadata
        return self._schedules[keys.device]


def paged_step(
    config: MLRAConfig, cache: Cache | None, attention_mask: Tensor | None, embeds: Tensor
) -> PagedStep | None:
    """The paged step of a forward, or None where transformers' own cache layout is used.

    An empty DynamicCache gets paged layers if `config.decode_backend` asks for them. "auto" asks
    for paged layers if the kernels can run, and on a GPU prints its choice and the reason once.

    Args:
        attention_mask: as the model's forward takes it.
        embeds: `[b, s, d]`, the new tokens.

    Raises:
        ValueError: the backend that the config names cannot run here, or not on this cache.
    """
    config.check_backend()
    backend = config.decode_backend
    if cache is None or (backend == "torch" and not config.decode_pages):
        return None
    if not any(isinstance(layer, PagedLatentLayer) for layer in cache.layers):
        problem = _unsupported(config, embeds) or _not_pageable(cache) or _unsuited(attention_mask)
        if backend == "auto" and embeds.is_cuda and not cache.get_seq_length():
            chosen = f"torch ({problem})" if problem else "mlra_kernels"
            logger.warning_once(f"MLRA decodes with {chosen}; decode_backend chooses another")
        if problem and backend != "auto":
            raise ValueError(_refused(config, problem))
        if problem:
            return None
        cache.layers = [PagedLatentLayer() for _ in range(config.num_hidden_layers)]
    backend = "mlra_kernels" if backend == "auto" else backend
    return PagedStep(config, cache, attention_mask, embeds.shape[:2], backend, embeds.device)


def _refused(config: MLRAConfig, problem: str) -> str:
    """The error's line for pages that the config asks for and that cannot be used."""
    if config.decode_backend == "torch":
        return f"decode_pages: {problem}; use decode_pages=False"
    return f"decode_backend {config.decode_backend}: {problem}; use decode_backend='torch'"


def _kernels():
    """The module of the decoding kernels, or None where it is not installed."""
    try:
        from mlra_kernels import latent_decode
    except ImportError:
        return None
    return latent_decode


def _unsupported(config: MLRAConfig, embeds: Tensor) -> str | None:
    """Why the kernels cannot serve this model here, or None."""
    kernels = _kernels()
    if kernels is None:
        return "mlra_kernels is not installed"
    latent_dims, rope_dims = kernels.validation.LATENT_DIMS, kernels.validation.ROPE_DIMS
    if config.latent_dim not in latent_dims:
        return f"the kernels take latent dims {latent_dims}, this model has {config.latent_dim}"
    if config.qk_rope_head_dim not in rope_dims:
        return f"the kernels take RoPE dims {rope_dims}, this model has {config.qk_rope_head_dim}"
    if config.decode_backend == "torch":
        return None
    if embeds.requires_grad:
        return "the kernels compute no gradients; decode under torch.no_grad()"
    if not embeds.is_cuda:
        return f"the kernels need a CUDA GPU, this model is on {embeds.device}"
    if embeds.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, this model runs in {embeds.dtype}"
    return None


def _not_pageable(cache: Cache) -> str | None:
    """Why a cache cannot get paged layers, or None."""
    plain = type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)
    if not plain or cache.offloading:
        return f"only a DynamicCache without offloading can be paged, not {type(cache).__name__}"
    if cache.get_seq_length():
        return "the cache was filled by another backend"
    return None


def _unsuited(mask: Tensor | None, starts: Tensor | None = None) -> str | None:
    """Why pages cannot serve a mask, or None.

    Args:
        starts: `[b]`, the padding that was in front of each row when the cache was filled.
    """
    if mask is None:
        return None
    if mask.dim() != 2:
        return f"pages take attention masks [batch, tokens], got {list(mask.shape)}"
    real = mask != 0
    holes = (real.cummax(-1).values != real).any()
    if starts is None:
        starts = (~real).sum(-1)
    # Both flags in one copy from the GPU, since each copy waits for the GPU.
    has_holes, has_moved = torch.stack((holes, ((~real).sum(-1) != starts).any())).tolist()
    if has_holes:
        return "pages take left padding only, and the attention mask has zeros behind a token"
    if has_moved:
        return "the padding of a row must end within the first call, and this mask has more"
    return None
