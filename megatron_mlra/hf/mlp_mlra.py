"""The MLP of a layer, dense or a mixture of experts.

Letters in shapes: T tokens, d hidden size, E routed experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_mlra import MLRAConfig


class MLRAMLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: MLRAConfig, ffn: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.gate_proj = nn.Linear(d, ffn, bias=False)
        self.up_proj = nn.Linear(d, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, d, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` -> `[..., d]`."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MLRARouter(nn.Module):
    """Chooses each token's experts, and the weights of these experts, by `weight` `[E, d]`.

    Scores are in float32. The router is no nn.Linear, since adapters and quantizers replace every
    nn.Linear by a module that returns one tensor, and the router returns two.
    """

    def __init__(self, config: MLRAConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.config = config
        if config.use_expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[T, d]` -> weights `[T, k]` and int64 indices `[T, k]` of the chosen experts."""
        config, weight = self.config, self.weight
        if config.router_dtype == "float32":
            x, weight = x.float(), weight.float()
        logits = nn.functional.linear(x, weight)
        wide = logits.float()
        scores = wide.sigmoid() if config.scoring_func == "sigmoid" else wide.softmax(-1)
        ranked = scores
        if config.use_expert_bias:
            ranked = scores + self.e_score_correction_bias
        chosen = ranked.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (weights * config.routed_scaling_factor).to(logits.dtype), chosen


def _has_other_ranks() -> bool:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


class MLRAExperts(nn.Module):
    """Routed experts, weighted by the router, and shared experts, which every token visits."""

    def __init__(self, config: MLRAConfig) -> None:
        super().__init__()
        self.gate = MLRARouter(config)
        self.experts = nn.ModuleList(
            MLRAMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        shared = config.shared_expert_intermediate_size
        self.shared_experts = MLRAMLP(config, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` -> `[..., d]`; each expert runs once, over the tokens that chose it.

        Where gradients are computed, or several processes run, experts without tokens run too, on
        empty input. Ranks gather sharded weights (FSDP, ZeRO-3) together, so each rank must run
        every expert, though the tokens of different ranks choose different experts. Every rank must
        also give each weight a gradient.
        """
        tokens = x.reshape(-1, x.size(-1))
        weights, chosen = self.gate(tokens)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(tokens)
        run_all = torch.is_grad_enabled() or _has_other_ranks()
        for e in range(len(self.experts)) if run_all else chosen.unique().tolist():
            rows, slots = (chosen == e).nonzero(as_tuple=True)
            part = self.experts[e](tokens[rows]) * weights[rows, slots, None]
            out = out.index_add(0, rows, part)
        out = out.view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)
