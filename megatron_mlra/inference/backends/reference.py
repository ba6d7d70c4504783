"""The 'torch' backend: plain torch, on any device and for any size. Letters as in base.py."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mlra.inference.backends.products import TorchProducts
from megatron_mlra.inference.cache import append_grouped
from megatron_mlra.maths.norms import rms_norm
from megatron_mlra.maths.rope import apply_rope
from mlra_kernels.latent_decode import reference


class ReferenceOps(TorchProducts):
    """Plain torch; float32 inside norms, RoPE and attention."""

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, rms_norm(total, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def rotate(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        turned = apply_rope(x[..., start:], cos[positions], sin[positions])
        return torch.cat((x[..., :start], turned), dim=-1)

    def append(self, kv: Tensor, norm: Tensor, tables, step, layer, scale: float, eps: float):
        data, fp8_scale = layer
        reference.latent_cache_append_reference(
            kv, norm, *tables, step.positions, step.slots, data, fp8_scale, scale, eps
        )

    def decode(
        self, q_absorbed: Tensor, q_rope: Tensor, layer, step, softmax_scale: float, branches: int
    ) -> tuple[Tensor, Tensor]:
        data, fp8_scale = layer
        return reference.latent_decode_reference(
            q_absorbed,
            q_rope,
            data,
            step.block_table,
            step.lengths,
            softmax_scale,
            branches,
            fp8_scale,
        )

    def schedule(self, lengths: Tensor, **shape):
        return None

    def append_grouped(self, key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
        append_grouped(key, value, layer, slots)

    def decode_grouped(
        self, q: Tensor, layer: Tensor, step, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        from mlra_kernels.grouped_decode.reference import grouped_decode_reference

        return grouped_decode_reference(
            q, layer[0], layer[1], step.block_table, step.lengths, softmax_scale
        )
