"""What a layer does besides matrix products, by backend: 'triton' (CUDA) or 'reference' (torch).

Letters: T tokens, b sequences, q query tokens a sequence, n g latent heads of the rank, j heads a
latent serves, l latent dim, r RoPE dim, H heads, e dims of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.maths.attention import apply_rope, rms_norm
from mlra_kernels.latent_decode import reference

BACKENDS = ("auto", "triton", "reference")


class Ops(Protocol):
    """One backend."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`[T, d]`, statistics in float32."""

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
    ) -> Tensor:
        """`mlra_kernels.latent_decode.latent_decode`'s output `[b, q, n g, j, l]`."""

    def schedule(self, lengths: Tensor, **shape):
        """What `decode` wants computed once a step for these lengths, with an `update`; or None."""

    def append_grouped(self, key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
        """Write `[T, heads, dim]` to a grouped cache; negative slots go to its last page."""

    def decode_grouped(self, q: Tensor, layer: Tensor, step, softmax_scale: float) -> Tensor:
        """`[b, heads, dim]` attends to a grouped cache."""


def select_backend(
    name: str, model: ModelDescription, dtype: torch.dtype, device: torch.device
) -> Ops:
    """The backend called `name`; 'auto' takes triton wherever it can run.

    Raises:
        ValueError: an unknown name, or triton where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(BACKENDS)}")
    obstacle = _triton_obstacle(model, dtype, device)
    if name == "triton" and obstacle:
        raise ValueError(f"backend triton {obstacle}; use backend reference")
    if name == "reference" or obstacle:
        return ReferenceOps()
    from megatron_mlra.inference.backends.triton import TritonOps

    return TritonOps()


def _triton_obstacle(
    model: ModelDescription, dtype: torch.dtype, device: torch.device
) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype == torch.float32:
        return "takes bfloat16 or float16 weights, these are float32"
    from mlra_kernels.latent_decode.validation import LATENT_DIMS, ROPE_DIMS

    if model.attention == "gqa":
        dim = model.head_dim
        return None if dim in (64, 128, 256) else f"takes heads of 64, 128 or 256, not {dim}"
    if model.latent_dim not in LATENT_DIMS:
        return f"takes latents of {LATENT_DIMS}, not {model.latent_dim}"
    if model.qk_rope_head_dim not in ROPE_DIMS:
        return f"takes RoPE keys of {ROPE_DIMS}, not {model.qk_rope_head_dim}"
    return None


class ReferenceOps:
    """Plain torch, on any device and for any size; float32 inside norms, RoPE and attention."""

    name = "reference"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
    ) -> Tensor:
        data, fp8_scale = layer
        out, _ = reference.latent_decode_reference(
            q_absorbed,
            q_rope,
            data,
            step.block_table,
            step.lengths,
            softmax_scale,
            branches,
            fp8_scale,
        )
        return out

    def schedule(self, lengths: Tensor, **shape):
        return None

    def append_grouped(self, key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
        append_grouped(key, value, layer, slots)

    def decode_grouped(self, q: Tensor, layer: Tensor, step, softmax_scale: float) -> Tensor:
        from mlra_kernels.grouped_decode.reference import grouped_decode_reference

        return grouped_decode_reference(
            q, layer[0], layer[1], step.block_table, step.lengths, softmax_scale
        )


def append_grouped(key: Tensor, value: Tensor, layer: Tensor, slots: Tensor) -> None:
    """Write keys and values `[T, heads, dim]` to `[2, pages + 1, page_size, heads, dim]`."""
    pages, page_size = layer.shape[1:3]
    spare = (pages - 1) * page_size
    slots = torch.where(slots < 0, spare, slots)
    flat = layer.flatten(1, 2)
    flat[0].index_copy_(0, slots, key)
    flat[1].index_copy_(0, slots, value)
