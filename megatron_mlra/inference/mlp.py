"""The MLP of a layer under tensor parallelism: dense, or a mixture of experts.

A rank holds its part of every MLP's hidden size, of each routed and shared expert too, and the
whole router, so the ranks choose alike and one all-reduce a layer sums routed and shared parts.

Letters: T tokens, d hidden size, f the rank's part of an MLP (padded to a multiple of 16), E
experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import EXPERTS
from megatron_mlra.maths.routing import choose_experts

MLP_MULTIPLE = 16
"""A rank's part of an MLP is padded to this: GEMMs want rows of whole 32 bytes."""

GATHER_TRAFFIC = 3
"""Gathering an expert's weights reads and writes them before they are read once more."""


@dataclass
class DenseWeights:
    """An MLP, or all shared experts as one."""

    fc1: Tensor
    """`[2 f, d]`: gate rows, then up rows."""
    fc2: Tensor
    """`[d, f]`."""


@dataclass
class ExpertWeights:
    """Router and experts of one layer."""

    router: Tensor
    """`[E, d]`."""
    bias: Tensor | None
    """`[E]` float32, see `choose_experts`."""
    fc1: Tensor
    """`[E, 2 f, d]`."""
    fc2: Tensor
    """`[E, f, d]`: experts and their hidden dims are one dimension of a product that sums both."""
    shared: DenseWeights | None


def load_mlp(
    model: ModelDescription,
    layer: int,
    get: Callable[[str], Tensor],
    tp: int,
    rank: int,
    place: Callable[[Tensor], Tensor],
) -> DenseWeights | ExpertWeights:
    """Rank `rank` of `tp`'s part; one expert at a time is read.

    Args:
        get: name behind the layer's prefix -> global tensor.
        place: to the device and dtype of the model.
    """

    def dense(prefix: str, ffn: int) -> DenseWeights:
        fc1, fc2 = get(f"{prefix}linear_fc1.weight"), get(f"{prefix}linear_fc2.weight")
        own_fc1, own_fc2 = _own(fc1, fc2, ffn, tp, rank)
        return DenseWeights(place(own_fc1), place(own_fc2))

    if not model.is_moe(layer):
        return dense("mlp.", model.ffn_hidden_size)
    router = place(get("mlp.router.weight"))
    bias = None
    if model.moe_router_enable_expert_bias:
        bias = get("mlp.router.expert_bias").to(router.device, torch.float32)
    shared = None
    if model.moe_shared_expert_intermediate_size:
        shared = dense("mlp.shared_experts.", model.moe_shared_expert_intermediate_size)
    part = _part(model.moe_ffn_hidden_size, tp)
    fc1 = router.new_empty(model.num_experts, 2 * part, model.hidden_size)
    fc2 = router.new_empty(model.num_experts, part, model.hidden_size)
    for e in range(model.num_experts):
        expert = dense(f"{EXPERTS}{e}.", model.moe_ffn_hidden_size)
        fc1[e], fc2[e] = expert.fc1, expert.fc2.T
    return ExpertWeights(router, bias, fc1, fc2, shared)


def run_mlp(
    x: Tensor,
    weights: DenseWeights | ExpertWeights,
    model: ModelDescription,
    silu_mul: Callable[[Tensor], Tensor],
    static: bool,
) -> Tensor:
    """The rank's summand of an MLP's output, `[T, d]` -> the same.

    Args:
        silu_mul: `[T, 2 f]` -> `[T, f]`.
        static: ask the device for nothing, so that the step can be captured in a CUDA graph.
    """
    if isinstance(weights, DenseWeights):
        return linear(silu_mul(linear(x, weights.fc1)), weights.fc2)
    scales, chosen = choose_experts(x, weights.router, weights.bias, model)
    scales = scales.to(x.dtype)
    if not static:
        out = _by_expert(x, scales, chosen, weights, silu_mul)
    elif GATHER_TRAFFIC * chosen.numel() <= weights.router.size(0):
        out = _gathered(x, scales, chosen, weights, silu_mul)
    else:
        out = _all_experts(x, scales, chosen, weights, silu_mul)
    if weights.shared is not None:
        out = out + run_mlp(x, weights.shared, model, silu_mul, static)
    return out


def _by_expert(x: Tensor, scales: Tensor, chosen: Tensor, weights: ExpertWeights, silu_mul):
    """A product for each expert over its tokens: the fewest FLOPs. The counts come from the
    device."""
    k = chosen.size(1)
    order = chosen.flatten().argsort(stable=True)  # (token, slot) pairs by expert
    counts = chosen.flatten().bincount(minlength=weights.router.size(0)).tolist()
    parts = torch.empty(order.numel(), x.size(1), dtype=x.dtype, device=x.device)
    for e, pairs in enumerate(order.split(counts)):
        if pairs.numel():
            hidden = silu_mul(linear(x[pairs // k], weights.fc1[e]))
            parts[pairs] = (hidden * scales.flatten()[pairs, None]) @ weights.fc2[e]
    return parts.unflatten(0, (-1, k)).sum(1)


def _gathered(x: Tensor, scales: Tensor, chosen: Tensor, weights: ExpertWeights, silu_mul):
    """Copies of the chosen experts' weights: least traffic where few are chosen."""
    t, k = chosen.shape
    gate_up = weights.fc1[chosen].flatten(1, 2)  # [T, k 2f, d]
    hidden = silu_mul(torch.bmm(gate_up, x.unsqueeze(-1)).view(t * k, -1))
    hidden = hidden * scales.flatten().unsqueeze(-1)
    down = weights.fc2[chosen].flatten(1, 2)  # [T, k f, d]
    return torch.bmm(hidden.view(t, 1, -1), down).squeeze(1)


def _all_experts(x: Tensor, scales: Tensor, chosen: Tensor, weights: ExpertWeights, silu_mul):
    """Every expert over every token, those not chosen times zero: each weight is read once, and
    decoding batches are too small for the extra FLOPs to take longer than that."""
    tokens, experts = x.size(0), weights.router.size(0)
    by_expert = x.new_zeros(tokens, experts).scatter(1, chosen, scales).view(-1, 1)
    gate_up = linear(x, weights.fc1.flatten(0, 1))  # [T, E 2 f]
    hidden = silu_mul(gate_up.view(tokens * experts, -1))
    # Not 0 * hidden: that of an expert which was not chosen may be infinite in float16.
    hidden = torch.where(by_expert == 0, 0, hidden * by_expert)
    return hidden.view(tokens, -1) @ weights.fc2.flatten(0, 1)


def _part(ffn: int, tp: int) -> int:
    return -(-ffn // (tp * MLP_MULTIPLE)) * MLP_MULTIPLE


def _own(fc1: Tensor, fc2: Tensor, ffn: int, tp: int, rank: int) -> tuple[Tensor, Tensor]:
    """fc1 `[2 f, d]`, fc2 `[d, f]`; rows added as padding are zero and change nothing."""
    part = _part(ffn, tp)

    def own(x: Tensor) -> Tensor:
        x = x[rank * part : (rank + 1) * part]
        return pad(x, (0, 0, 0, part - x.size(0)))

    gate, up = fc1.chunk(2)
    return torch.cat((own(gate), own(up))), own(fc2.T).T
