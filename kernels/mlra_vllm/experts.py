"""A mixture of experts by vLLM's FusedMoE, with the routing of the exported model.

Letters: T tokens, d hidden size, E routed experts, k experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.fused_moe import FusedMoE

from mlra_vllm.config import MLRAConfig
from mlra_vllm.mlp import PaddedMLP


class MLRARouter(nn.Module):
    """Chooses the experts of each token and their weights, on every platform. vLLM's own routing on
    a CPU has neither sigmoid scores nor a scaling factor."""

    def __init__(self, config: MLRAConfig) -> None:
        super().__init__()
        self.config = config
        size = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(*size), requires_grad=False)
        if config.use_expert_bias:
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[T, d]` -> logits `[T, E]` in the router's dtype."""
        if self.config.router_dtype == "float32":
            return linear(x.float(), self.weight.float())
        return linear(x, self.weight)

    def choose(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Weights `[T, k]` float32 and numbers `[T, k]` int32 of each token's experts."""
        config, wide = self.config, gating_output.float()
        scores = wide.sigmoid() if config.scoring_func == "sigmoid" else wide.softmax(-1)
        ranked = scores + self.e_score_correction_bias if config.use_expert_bias else scores
        chosen = ranked.topk(topk, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        # Rounded to the router's dtype, as in training.
        weights = (weights * config.routed_scaling_factor).to(gating_output.dtype)
        return weights.float(), chosen.to(torch.int32)


class MLRAExperts(nn.Module):
    """Routed experts, weighted by the router, and shared experts, which process every token."""

    def __init__(self, config: MLRAConfig, prefix: str) -> None:
        super().__init__()
        self.gate = MLRARouter(config)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = None
        if shared:
            self.shared_experts = PaddedMLP(
                config.hidden_size, shared, f"{prefix}.shared_experts", reduce_results=False
            )
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            custom_routing_function=self.gate.choose,
            shared_experts=self.shared_experts,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[T, d]` -> `[T, d]`, summed over tensor-parallel ranks."""
        return self.experts(hidden_states=x, router_logits=self.gate(x))
