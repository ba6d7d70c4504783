"""Which backend a model runs on: 'triton' (CUDA) or 'reference' (torch)."""

from __future__ import annotations

import torch

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.backends.base import Ops
from megatron_mlra.inference.backends.reference import ReferenceOps

BACKENDS = ("auto", "triton", "reference")


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
