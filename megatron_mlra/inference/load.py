"""From a checkpoint's tensors to a model that runs: precision, cache and weights of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mlra.description.backends import CACHE_DTYPES, LOAD_DTYPES, check_page_size
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.backends.select import select_backend
from megatron_mlra.inference.cache import GroupedCache, LatentCache
from megatron_mlra.inference.checks import whole
from megatron_mlra.inference.model import DraftModel, InferenceModel
from megatron_mlra.inference.parallel import (
    HeadShard,
    TensorParallel,
    check_parallel,
)
from megatron_mlra.inference.reduction import choose_reduction
from megatron_mlra.inference.weights import load_draft as weights_of_draft
from megatron_mlra.inference.weights import load_weights


@dataclass(frozen=True)
class LoadOptions:
    """How a model is run; the ModelDescription says what the model computes."""

    dtype: str = "auto"
    """Dtype of weights and activations; 'auto': the checkpoint's, but float32 on a CPU."""
    cache_dtype: str = "auto"
    """'auto': as `dtype`; 'fp8' (e4m3) halves the bytes of 16-bit latents."""
    cache_tokens: int = 4096
    """Tokens that all running sequences can cache together, rounded up to whole pages on every
    context-parallel rank."""
    page_size: int = 64
    """Tokens per page, a multiple of 16; multiples of 64 take the Hopper kernel, and mlra_kernels
    take no others for grouped queries."""
    max_positions: int | None = None
    """Tokens of the longest sequence; None: the model's max_position_embeddings."""
    backend: str = "auto"
    """'mlra_kernels' (CUDA), 'torch', or 'auto': the kernels where they can run, else torch."""
    products: str = "auto"
    """How mlra_kernels multiplies few rows, see `backends.PRODUCTS`."""
    weight_mode: str = "replicated"
    """See `backends.WEIGHT_MODES`."""
    all_reduce: str = "auto"
    """How layers sum over ranks, see `backends.ALL_REDUCES`."""
    draft: bool = False
    """Room in the cache for a layer of multi-token prediction (`load_draft`)."""


def load_model(
    model: ModelDescription,
    read: Callable[[str], Tensor],
    options: LoadOptions,
    device: str | torch.device = "cpu",
    parallel: TensorParallel | None = None,
    progress: Callable[[range], object] = iter,
) -> InferenceModel:
    """One rank's model, with its weights loaded and its cache allocated.

    Args:
        read: canonical name -> global tensor, e.g. `CheckpointFolder.tensor`.
        parallel: this rank's collectives; None: a world of one rank.
        progress: wraps the range of layers (tqdm).

    Raises:
        ValueError: an option does not fit the model or the device; raised before any tensor is
            read. Or a tensor is missing, of another shape than the model's, or not of floats.
    """
    device, parallel = torch.device(device), parallel or TensorParallel()
    dtype = _dtype(model, options, device)
    cache_dtype = _cache_dtype(options, dtype, model)
    check_page_size(whole("page size", options.page_size))
    whole("cache tokens", options.cache_tokens)
    max_positions = model.max_position_embeddings
    if options.max_positions is not None:
        max_positions = whole("max positions", options.max_positions)
    check_parallel(model, parallel.size, parallel.context)
    ops = select_backend(
        options.backend, model, dtype, device, options.products, options.page_size, parallel.size
    )
    reduction = choose_reduction(
        options.all_reduce, parallel, model.hidden_size, dtype, device, ops
    )
    pages = -(-options.cache_tokens // (options.page_size * parallel.context))
    shard, layers = None, model.num_layers + options.draft
    if model.attention == "mlra":
        shard = HeadShard.plan(
            model, parallel.size, parallel.rank, options.weight_mode,
            parallel.context, parallel.context_rank,
        )  # fmt: skip
        cache = LatentCache(model, shard, pages, options.page_size, cache_dtype, device, layers)
    else:
        kv_heads = max(1, model.num_query_groups // parallel.size)
        cache = GroupedCache(model, kv_heads, pages, options.page_size, cache_dtype, device, layers)
    weights = load_weights(
        model, _fitting(model, read), parallel, options.weight_mode, dtype, device, progress
    )
    # No token has a position beyond the cache's room, whatever the checkpoint declares.
    rows = min(max_positions, pages * options.page_size * parallel.context)
    return InferenceModel(
        model, weights, cache, ops, max_positions, parallel, shard, rows, reduction
    )


def load_draft(
    main: InferenceModel, read: Callable[[str], Tensor], weight_mode: str = "replicated"
) -> DraftModel:
    """The first layer of multi-token prediction of a model loaded with `LoadOptions.draft`.

    Args:
        read: canonical name -> global tensor.

    Raises:
        ValueError: some layers have no RoPE, and nothing says whether this one has. Or a tensor of
            the layer is missing or does not fit.
    """
    if main.model.no_rope_pattern:
        raise ValueError(
            "no_rope_pattern says nothing of the layer that guesses; leave guesses out"
        )
    own = _fitting(main.model.replace(mtp_num_layers=main.model.mtp_num_layers or 1), read)
    weights = weights_of_draft(main.model, own, main.parallel, weight_mode, main.weights)
    return DraftModel(main, weights)


def _fitting(model: ModelDescription, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """`read` with a check of each tensor: most products take a cut weight and give another model's
    result, or none."""
    shapes = expected_tensors(model)

    def checked(name: str) -> Tensor:
        try:
            tensor = read(name)
        except KeyError:
            raise ValueError(f"there is no tensor {name}, which {model.variant} needs") from None
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(
                f"{name} is {list(tensor.shape)}, and the model's is {list(shapes[name])}; give the"
                " global tensor, and the ModelDescription that belongs to it"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is of {str(tensor.dtype)[6:]}; give floating-point numbers")
        return tensor

    return checked


def _dtype(model: ModelDescription, options: LoadOptions, device: torch.device) -> torch.dtype:
    if options.dtype not in LOAD_DTYPES:
        raise ValueError(f"dtype is {options.dtype!r}; use one of {', '.join(LOAD_DTYPES)}")
    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else getattr(torch, model.dtype)
    return getattr(torch, options.dtype)


def _cache_dtype(options: LoadOptions, dtype: torch.dtype, model: ModelDescription) -> torch.dtype:
    name = options.cache_dtype
    if name not in CACHE_DTYPES:
        raise ValueError(f"cache dtype is {name!r}; use one of {', '.join(CACHE_DTYPES)}")
    if name == "auto":
        return dtype
    if name == "fp8":
        if model.attention == "gqa":
            raise ValueError(f"an FP8 cache needs latent attention, this is {model.variant}")
        return torch.float8_e4m3fn
    if getattr(torch, name) != dtype:
        raise ValueError(
            f"cache dtype {name} does not go with {str(dtype)[6:]} weights; use auto or fp8"
        )
    return dtype
