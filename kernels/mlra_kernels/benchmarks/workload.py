"""Inputs of a decoding benchmark: shapes, random paged caches, and the bytes that must be read.

Letters: b sequences, q query tokens per sequence, L latent heads, j heads per latent, D latent dim,
R RoPE dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mlra_kernels.latent_decode.reference import FP8_DTYPE, FP8_MAX, split_cache

MIN_ROTATION_BYTES = 256 << 20
"""Bytes of cache over which calls rotate: several times the L2, which must not be measured."""


@dataclass(frozen=True)
class Shape:
    """One decoding shape: a rank's part of a model, and the batch that it decodes."""

    model: str
    batch: int
    length: int
    num_latents: int = 1
    num_branches: int = 1
    heads: int = 64
    latent_dim: int = 128
    rope_dim: int = 64
    q_len: int = 1
    page_size: int = 64
    fp8: bool = False

    @property
    def label(self) -> str:
        """Short name, as in "MLRA-4/TP4 1 x 128K"."""
        size = f"{self.length >> 20}M" if self.length >= 1 << 20 else f"{self.length >> 10}K"
        return f"{self.model} {self.batch} x {size}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one cached token, each of which must be read once."""
        latents = self.num_latents * self.latent_dim
        scales = 4 * self.num_latents if self.fp8 else 0
        return latents * (1 if self.fp8 else 2) + 2 * self.rope_dim + scales

    @property
    def cache_bytes(self) -> int:
        """Bytes of cache that one call must read."""
        return self.batch * self.length * self.row_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of one call: the two products of every head and token."""
        per_token = 2 * self.heads * self.num_latents * (2 * self.latent_dim + self.rope_dim)
        return self.batch * self.length * self.q_len * per_token


@dataclass
class Workload:
    """Random inputs of a shape; `tables` holds several block tables over disjoint pages."""

    shape: Shape
    q_absorbed: Tensor
    q_rope: Tensor
    cache: Tensor
    cache_scale: Tensor | None
    tables: list[Tensor]
    cache_seqlens: Tensor
    softmax_scale: float


def make_workload(
    shape: Shape, dtype: torch.dtype, device: str, seed: int, rotation: int = MIN_ROTATION_BYTES
) -> Workload:
    """Random inputs: pages in random order, block tables over `rotation` bytes of cache in all."""
    gen = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device, dtype=dtype)

    pages_a_seq = -(-shape.length // shape.page_size)
    copies = max(2, -(-rotation // shape.cache_bytes))
    pages = copies * shape.batch * pages_a_seq
    order = torch.randperm(pages, generator=gen, device=device).int()
    latent_width = shape.num_latents * shape.latent_dim
    cache = randn(pages, shape.page_size, latent_width + shape.rope_dim)
    scale = None
    if shape.fp8:
        cache, scale = quantise(cache, shape)
    groups = shape.num_latents // shape.num_branches
    q_shape = (shape.batch, shape.q_len, shape.num_latents, shape.heads, shape.latent_dim)
    return Workload(
        shape=shape,
        q_absorbed=randn(*q_shape),
        q_rope=randn(shape.batch, shape.q_len, groups * shape.heads, shape.rope_dim),
        cache=cache,
        cache_scale=scale,
        tables=list(order.view(copies, shape.batch, pages_a_seq)),
        cache_seqlens=torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device),
        softmax_scale=192**-0.5,
    )


def quantise(cache: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The FP8 form of a 16-bit cache, and its scales `[pages, L, page_size]` float32."""
    pages, page_size = cache.shape[:2]
    latents, rope = split_cache(cache, shape.rope_dim)
    out = torch.empty(
        pages,
        page_size,
        latents.shape[-1] + 2 * shape.rope_dim,
        dtype=FP8_DTYPE,
        device=cache.device,
    )
    scale = torch.empty(pages, shape.num_latents, page_size, device=cache.device)
    out_latents, out_rope = split_cache(out, shape.rope_dim)
    out_rope.copy_(rope)
    for part in torch.arange(pages, device=cache.device).split(1 << 14):
        x = latents[part[0] : part[-1] + 1].float()
        x = x.unflatten(-1, (shape.num_latents, shape.latent_dim))
        s = x.abs().amax(-1) / FP8_MAX
        bits = (x / s[..., None]).flatten(-2).to(FP8_DTYPE).view(torch.uint8)
        out_latents.view(torch.uint8)[part[0] : part[-1] + 1] = bits
        scale[part[0] : part[-1] + 1] = s.transpose(1, 2)
    return out, scale
