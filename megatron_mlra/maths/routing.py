"""The choice of experts for each token, and their weights, as Megatron's router computes them.

Letters: T tokens, d hidden size, E experts, k experts of a token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class RoutingSizes(Protocol):
    """The fields of a ModelDescription that determine the routing."""

    moe_router_topk: int
    moe_router_score_function: str
    moe_router_pre_softmax: bool
    moe_router_topk_scaling_factor: float
    moe_router_dtype: str | None


def choose_experts(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: RoutingSizes
) -> tuple[Tensor, Tensor]:
    """The k experts of each token: their weights `[T, k]` in the router's dtype, and their numbers
    `[T, k]` int64.

    Logits are in the router's dtype, scores in float32. Nothing waits for the device, so that a
    CUDA graph can capture a decoding step with routing.

    Args:
        x: `[T, d]`.
        weight: `[E, d]`.
        bias: `[E]` float32, added to sigmoid scores in the choice of experts, not in their weights.
    """
    if sizes.moe_router_dtype == "fp32":
        x, weight = x.float(), weight.float()
    logits, k = linear(x, weight), sizes.moe_router_topk
    if sizes.moe_router_score_function == "sigmoid":
        scores = logits.float().sigmoid()
        chosen = (scores if bias is None else scores + bias).topk(k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif sizes.moe_router_pre_softmax:
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
    else:
        largest, chosen = logits.topk(k, dim=-1)
        weights = largest.softmax(-1, dtype=torch.float32)
    return (weights * sizes.moe_router_topk_scaling_factor).to(logits.dtype), chosen
