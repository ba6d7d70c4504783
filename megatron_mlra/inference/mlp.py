"""The MLP of a layer under tensor parallelism: dense, or a mixture of experts.

A rank holds its part of the hidden size of every MLP, routed expert and shared expert, and the
whole router. So all ranks choose the same experts, and one all-reduce per layer sums routed and
shared parts.

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
from megatron_mlra.inference.backends.base import Ops
from megatron_mlra.maths.routing import choose_experts

MLP_MULTIPLE = 16
"""A rank's part f is padded to a multiple of this: GEMMs want rows of whole 32 bytes."""

GATHER_TRAFFIC = 3
"""Passes over memory per gathered weight: gathering reads and writes it, the product reads it."""


@dataclass
class DenseWeights:
    """A rank's part of an MLP, or of all shared experts as one MLP."""

    fc1: Tensor
    """`[2 f, d]`: gate rows, then up rows."""
    fc2: Tensor
    """`[d, f]`."""


@dataclass
class ExpertWeights:
    """The whole router and a rank's part of the experts of one layer."""

    router: Tensor
    """`[E, d]`."""
    bias: Tensor | None
    """`[E]` float32, see `choose_experts`."""
    fc1: Tensor
    """`[E, 2 f, d]`."""
    fc2: Tensor
    """`[E, f, d]`, so that one product can sum over experts and their hidden dims (E f) at once."""
    shared: DenseWeights | None


def load_mlp(
    model: ModelDescription,
    layer: int,
    get: Callable[[str], Tensor],
    tp: int,
    rank: int,
    place: Callable[[Tensor], Tensor],
) -> DenseWeights | ExpertWeights:
    """The MLP weights of rank `rank` of `tp`; reads one expert at a time.

    Args:
        get: name behind the layer's prefix -> global tensor.
        place: moves a tensor to the device and dtype of the model.
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
    ops: Ops,
    static: bool,
) -> Tensor:
    """The rank's summand of an MLP's output, `[T, d]` -> `[T, d]`.

    Args:
        ops: the backend.
        static: never synchronise with the device, so that a CUDA graph can capture the step.
    """
    if isinstance(weights, DenseWeights):
        return ops.linear(ops.swiglu(x, weights.fc1), weights.fc2)
    silu_mul = ops.silu_mul
    scales, chosen = choose_experts(x, weights.router, weights.bias, model)
    scales = scales.to(x.dtype)
    if not static:
        out = _by_expert(x, scales, chosen, weights, silu_mul)
    elif GATHER_TRAFFIC * chosen.numel() <= weights.router.size(0):
        out = _gathered(x, scales, chosen, weights, silu_mul)
    else:
        out = _all_experts(x, scales, chosen, weights, silu_mul)
    if weights.shared is not None:
        out = out + run_mlp(x, weights.shared, model, ops, static)
    return out


def _by_expert(x: Tensor, scales: Tensor, chosen: Tensor, weights: ExpertWeights, silu_mul):
    """One product per expert over its tokens: the fewest FLOPs. Copies the experts' token counts
    to the host."""
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
    """Copies the chosen experts' weights: the least memory traffic where few are chosen."""
    t, k = chosen.shape
    gate_up = weights.fc1[chosen].flatten(1, 2)  # [T, k 2f, d]
    hidden = silu_mul(torch.bmm(gate_up, x.unsqueeze(-1)).view(t * k, -1))
    hidden = hidden * scales.flatten().unsqueeze(-1)
    down = weights.fc2[chosen].flatten(1, 2)  # [T, k f, d]
    return torch.bmm(hidden.view(t, 1, -1), down).squeeze(1)


def _all_experts(x: Tensor, scales: Tensor, chosen: Tensor, weights: ExpertWeights, silu_mul):
    """Every expert over every token, with weight 0 where not chosen: each expert is read once. In
    a decoding batch the extra FLOPs take less time than that read."""
    tokens, experts = x.size(0), weights.router.size(0)
    by_expert = x.new_zeros(tokens, experts).scatter(1, chosen, scales).view(-1, 1)
    gate_up = linear(x, weights.fc1.flatten(0, 1))  # [T, E 2 f]
    hidden = silu_mul(gate_up.view(tokens * experts, -1))
    # Not 0 * hidden, which is NaN where the hidden values of an unchosen expert overflow float16.
    hidden = torch.where(by_expert == 0, 0, hidden * by_expert)
    return hidden.view(tokens, -1) @ weights.fc2.flatten(0, 1)


def _part(ffn: int, tp: int) -> int:
    return -(-ffn // (tp * MLP_MULTIPLE)) * MLP_MULTIPLE


def _own(fc1: Tensor, fc2: Tensor, ffn: int, tp: int, rank: int) -> tuple[Tensor, Tensor]:
    """The rank's fc1 `[2 f, d]` and fc2 `[d, f]`; padding is zero and adds nothing."""
    part = _part(ffn, tp)

    def own(x: Tensor) -> Tensor:
        x = x[rank * part : (rank + 1) * part]
        return pad(x, (0, 0, 0, part - x.size(0)))

    gate, up = fc1.chunk(2)
    return torch.cat((own(gate), own(up))), own(fc2.T).T
