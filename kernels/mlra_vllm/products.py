"""Who multiplies by weights: cuBLAS or, for steps of one or two tokens, the project's kernels.

A step of so few tokens reads all weights and multiplies little, and the kernels read them faster
than cuBLAS does (mlra_kernels/products). `--additional-config '{"products": "cublas"}'` leaves all
products to cuBLAS. The number of tokens is known when a step runs or is captured, not when
vLLM compiles the model; so the choice is inside an operator that the compiler does not open.

Letters: T tokens, K inputs, R outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from mlra_kernels.products.configs import few
from mlra_kernels.products.ops import product

CHOICES = ("auto", "cublas")
"""The first is the default."""
KEY = "products"
"""Of `additional_config`, which other plugins read too."""


def choice(vllm_config: VllmConfig) -> object:
    """What `additional_config` says of products; not checked."""
    told = vllm_config.additional_config
    return told.get(KEY, CHOICES[0]) if isinstance(told, dict) else CHOICES[0]


def misspelt(vllm_config: VllmConfig) -> list[str]:
    """Keys of `additional_config` that are typing errors of `KEY`. Keys that are less alike may be
    another plugin's."""
    told = vllm_config.additional_config
    others = [key for key in told if key != KEY] if isinstance(told, dict) else []
    return [key for key in map(str, others) if get_close_matches(key.lower(), [KEY], cutoff=0.85)]


def kernels_of_few(vllm_config: VllmConfig) -> bool:
    """Whether the project's kernels multiply in steps of few tokens."""
    return choice(vllm_config) == "auto"


@torch.library.custom_op("mlra_vllm::linear_of_few", mutates_args=())
def linear_of_few(x: Tensor, weight: Tensor) -> Tensor:
    """x `[T, K]` times weight `[R, K]`, transposed: `[T, R]`."""
    if not (x.is_cuda and few(x.size(0))):
        return linear(x, weight)
    # No kernel of a step writes weights, so that a product may read them before its turn.
    return product(x, weight, early=True)


@linear_of_few.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


def linear_by(vllm_config: VllmConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The function for x `[T, K]` and weight `[R, K]` -> `[T, R]`."""
    return linear_of_few if kernels_of_few(vllm_config) else linear


class FewTokens(UnquantizedLinearMethod):
    """How vLLM's own linear layers call the operator."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the weight `[R, K]` as it is: on a CPU vLLM packs it for a product of its own."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[T, K]` -> `[T, R]`; the layers have no bias."""
        assert bias is None
        return linear_of_few(x, layer.weight)


def use_by(vllm_config: VllmConfig, *layers: LinearBase) -> None:
    """Let layers of vLLM multiply as `vllm_config` says."""
    if kernels_of_few(vllm_config):
        for layer in layers:
            layer.quant_method = FewTokens()
