"""What a layer does besides matrix products, as the protocol that every backend fulfils.

Letters: T tokens, b sequences, q query tokens per sequence, n g latent heads of the rank, j heads a
latent serves, l latent dim, r RoPE dim, H heads, e dims of a head.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ops(Protocol):
    """One backend."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[T, d]`, statistics in float32."""

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[T, H, e]` -> the same: the norm of every head, with weights `[H, e]` of its own."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """x + residual, and its norm."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2 f]` -> silu(gate) * up `[T, f]`."""

    def rotate(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        """`[T, H, e]` with dims `start:` of every head rotated; may work in place."""

    def append(self, kv: Tensor, norm: Tensor, tables, step, layer, scale: float, eps: float):
        """Norm, rotate and write new tokens: `mlra_kernels.latent_decode.latent_cache_append`."""

    def decode(
        self, q_absorbed: Tensor, q_rope: Tensor, layer, step, softmax_scale: float, branches: int
    ) -> tuple[Tensor, Tensor]:
        """`mlra_kernels.latent_decode.latent_decode`: output `[b, q, n g, j, l]`, log-sum-exp."""

    def schedule(self, lengths: Tensor, **shape):
        """What `decode` wants computed once a step for these lengths, with an `update`; or None."""

    def append_grouped(self, key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
        """Write `[T, heads, dim]` to a grouped cache; negative slots go to its last page."""

    def decode_grouped(
        self, q: Tensor, layer: Tensor, step, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """`[b, heads, dim]` attends to a grouped cache; with the log-sum-exp `[b, heads]`."""
