"""The 'mlra_kernels' backend: the project's kernels, with fused norms, rotation and SwiGLU."""

from __future__ import annotations

from torch import Tensor

from megatron_mlra.inference.backends.products import Normed, TorchProducts, Unnormed
from megatron_mlra.inference.cache import append_grouped
from mlra_kernels import latent_projections, products
from mlra_kernels.decoder import add_rms_norm, rotate_heads, silu_mul
from mlra_kernels.grouped_decode import grouped_decode
from mlra_kernels.latent_decode import decode_metadata, latent_cache_append, latent_decode


class TritonOps(TorchProducts):
    """bfloat16 or float16 on a CUDA device; a CUDA graph can capture every call.

    Args:
        products: one of `backends.PRODUCTS`.
    """

    name = "mlra_kernels"

    def __init__(self, products: str = "auto") -> None:
        self.products = products

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x, None, weight, eps)[1]

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return latent_projections.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def rotate(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        return rotate_heads(x, start, cos, sin, positions)

    def append(self, kv: Tensor, norm: Tensor, tables, step, layer, scale: float, eps: float):
        data, fp8_scale = layer
        latent_cache_append(
            kv,
            norm,
            *tables,
            step.positions,
            step.slots,
            data,
            latent_scale=scale,
            norm_eps=eps,
            cache_scale=fp8_scale,
        )

    def decode(
        self, q_absorbed: Tensor, q_rope: Tensor, layer, step, softmax_scale: float, branches: int
    ) -> tuple[Tensor, Tensor]:
        data, fp8_scale = layer
        return latent_decode(
            q_absorbed,
            q_rope,
            data,
            step.block_table,
            step.lengths,
            softmax_scale,
            num_branches=branches,
            cache_scale=fp8_scale,
            metadata=step.metadata,
        )

    def schedule(self, lengths: Tensor, **shape):
        return decode_metadata(lengths, **shape)

    def append_grouped(self, key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
        append_grouped(key, value, layer, slots)

    def decode_grouped(
        self, q: Tensor, layer: Tensor, step, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        return grouped_decode(q, layer[0], layer[1], step.block_table, step.lengths, softmax_scale)

    # -- Products of few rows: one launch each, with the norm of their inputs ----------------------

    def _few(self, x: Normed) -> bool:
        rows = (x.x if isinstance(x, Unnormed) else x).size(0)
        return self.products != "cublas" and products.few(rows)

    def _inputs(self, x: Normed) -> tuple[Tensor, dict]:
        """x, and the options of a product of it."""
        early = {"early": self.products == "auto"}
        if isinstance(x, Unnormed):
            return x.x, early | {"norm": x.weight, "eps": x.eps}
        return x, early

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Normed:
        return Unnormed(x, weight, eps) if self._few(x) else self.rms_norm(x, weight, eps)

    def linear(self, x: Normed, weight: Tensor) -> Tensor:
        if not self._few(x):
            return super().linear(x, weight)
        x, options = self._inputs(x)
        return products.product(x, weight, **options)

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Normed]:
        if not self._few(x):
            return super().linear_add_norm(x, weight, residual, norm, eps)
        x, options = self._inputs(x)
        total = products.product(x, weight, residual=residual, **options)
        return total, Unnormed(total, norm, eps)

    def swiglu(self, x: Normed, fc1: Tensor) -> Tensor:
        if not self._few(x):
            return super().swiglu(x, fc1)
        x, options = self._inputs(x)
        return products.swiglu_product(x, fc1, **options)

    def gated(self, out: Tensor, x: Normed, gate: Tensor) -> Tensor:
        if not self._few(x):
            return super().gated(out, x, gate)
        x, options = self._inputs(x)
        return products.product(x, gate, gated=out, **options)

    def rotated_queries(
        self, x: Normed, weight: Tensor, head: int, start: int, tables, positions: Tensor
    ) -> Tensor:
        if not self._few(x) or head % 2 or start % 2:
            return super().rotated_queries(x, weight, head, start, tables, positions)
        x, options = self._inputs(x)
        cos, sin = tables
        return products.rotated_product(
            x, weight, head=head, start=start, cos=cos, sin=sin, positions=positions, **options
        )

    def absorb_queries(self, q_nope: Tensor, w_uk: Tensor, branches: int) -> Tensor:
        if not self._few(q_nope):
            return super().absorb_queries(q_nope, w_uk, branches)
        return products.absorb_queries(q_nope, w_uk, branches, early=self.products == "auto")

    def sum_branches(self, z: Tensor, w_uv: Tensor) -> Tensor:
        if not self._few(z):
            return super().sum_branches(z, w_uv)
        return products.sum_branches(z, w_uv, early=self.products == "auto")
