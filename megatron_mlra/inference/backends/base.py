"""What a layer does, as the protocol that every backend implements: products in products.py.

Letters: T tokens, b sequences, q query tokens per sequence, n g latent heads of the rank, j heads
per latent head, l latent dim, f hidden size of an MLP, H heads, e dims of a head.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_mlra.inference.backends.products import Normed


class Ops(Protocol):
    """One backend. Outputs have the dtype of the first argument; log-sum-exps are float32."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[T, d]` -> `[T, d]`; statistics in float32."""

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[T, H, e]` -> `[T, H, e]`: the norm of every head, with weights `[H, e]`."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum x + residual, `[T, d]`, and the norm of the sum."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`[T, 2 f]` -> silu(gate) * up `[T, f]`."""

    def rotate(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        """`[T, H, e]` with dims `start:` of every head rotated; may overwrite x."""

    def append(self, kv: Tensor, norm: Tensor, tables, step, layer, scale: float, eps: float):
        """Norm, rotate and write new tokens: `mlra_kernels.latent_decode.latent_cache_append`."""

    def decode(
        self, q_absorbed: Tensor, q_rope: Tensor, layer, step, softmax_scale: float, branches: int
    ) -> tuple[Tensor, Tensor]:
        """`mlra_kernels.latent_decode.latent_decode`: output `[b, q, n g, j, l]`, log-sum-exp."""

    def schedule(self, lengths: Tensor, **shape):
        """What `decode` needs computed once per step for `lengths` `[b]` int32: an object with a
        method `update(lengths)`, or None."""

    def append_grouped(self, key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
        """Write key and value `[T, heads, dim]` to a grouped cache; see `cache.append_grouped`."""

    def decode_grouped(
        self, q: Tensor, layer: Tensor, step, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attention of q `[b, heads, dim]` to a grouped cache: output, log-sum-exp `[b, heads]`."""

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        """The norm of x `[T, d]`, for this backend's products; they are `TorchProducts`'."""

    def plain(self, x: Normed) -> Tensor: ...

    def linear(self, x: Normed, weight: Tensor) -> Tensor: ...

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Normed]: ...

    def swiglu(self, x: Normed, fc1: Tensor) -> Tensor: ...

    def gated(self, out: Tensor, x: Normed, gate: Tensor) -> Tensor: ...

    def rotated_queries(
        self, x: Normed, weight: Tensor, head: int, start: int, tables, positions: Tensor
    ) -> Tensor: ...

    def absorb_queries(self, q_nope: Tensor, w_uk: Tensor, branches: int) -> Tensor: ...

    def sum_branches(self, z: Tensor, w_uv: Tensor) -> Tensor: ...
