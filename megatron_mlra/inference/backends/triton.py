"""The 'mlra_kernels' backend: the project's kernels, with fused norms, rotation and SwiGLU."""

from __future__ import annotations

from torch import Tensor

from megatron_mlra.inference.cache import append_grouped
from mlra_kernels import latent_projections
from mlra_kernels.decoder import add_rms_norm, rotate_heads, silu_mul
from mlra_kernels.grouped_decode import grouped_decode
from mlra_kernels.latent_decode import decode_metadata, latent_cache_append, latent_decode


class TritonOps:
    """bfloat16 or float16 on a CUDA device; a CUDA graph can capture every call."""

    name = "mlra_kernels"

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
