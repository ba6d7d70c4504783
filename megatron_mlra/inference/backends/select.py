"""Which backend a model runs on: 'mlra_kernels' (CUDA) or 'torch'."""

from __future__ import annotations

import torch

from megatron_mlra.description.backends import DECODE_BACKENDS, PRODUCTS, current_name
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.backends.base import Ops
from megatron_mlra.inference.backends.reference import ReferenceOps


def select_backend(
    name: str,
    model: ModelDescription,
    dtype: torch.dtype,
    device: torch.device,
    products: str = "auto",
    page_size: int = 64,
    tp: int = 1,
) -> Ops:
    """The backend called `name`; 'auto' takes mlra_kernels where the kernels can run, else torch.

    Args:
        products: one of `PRODUCTS`.
        page_size: tokens per page of the cache, a multiple of 16.
        tp: ranks over which heads are cut.

    Raises:
        ValueError: an unknown name, or mlra_kernels where the kernels cannot run.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products is {products!r}; use one of {', '.join(PRODUCTS)}")
    name = current_name("backend", name)
    if name not in DECODE_BACKENDS:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(DECODE_BACKENDS)}")
    misfit = _kernels_misfit(model, dtype, device, page_size, tp)
    if name == "mlra_kernels" and misfit:
        raise ValueError(f"backend mlra_kernels {misfit}; use backend torch")
    if name == "torch" or misfit:
        return ReferenceOps()
    from megatron_mlra.inference.backends.triton import TritonOps

    return TritonOps(products)


def _kernels_misfit(
    model: ModelDescription, dtype: torch.dtype, device: torch.device, page_size: int, tp: int
) -> str | None:
    if device.type != "cuda":
        return f"need a CUDA device, this is {device.type}"
    if dtype == torch.float32:
        return "take bfloat16 or float16 weights, these are float32"
    if model.attention == "gqa":
        return _grouped_misfit(model, page_size, tp)
    from mlra_kernels.latent_decode.validation import LATENT_DIMS, ROPE_DIMS

    if model.latent_dim not in LATENT_DIMS:
        return f"take latents of {LATENT_DIMS}, not {model.latent_dim}"
    if model.qk_rope_head_dim not in ROPE_DIMS:
        return f"take RoPE keys of {ROPE_DIMS}, not {model.qk_rope_head_dim}"
    return None


def _grouped_misfit(model: ModelDescription, page_size: int, tp: int) -> str | None:
    from mlra_kernels.grouped_decode.ops import MAX_GROUP, PAGE_UNIT

    if model.head_dim not in (64, 128, 256):
        return f"take heads of 64, 128 or 256, not {model.head_dim}"
    if page_size % PAGE_UNIT:
        pages = f"pages of a multiple of {PAGE_UNIT} tokens"
        return f"take {pages} for grouped queries, not {page_size}"
    group = model.num_attention_heads // max(model.num_query_groups, tp)
    return None if group <= MAX_GROUP else f"take {MAX_GROUP} query heads a key head, not {group}"
