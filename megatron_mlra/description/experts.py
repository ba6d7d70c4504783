"""The mixture-of-experts part of a model's description, and Megatron's arguments for it.

Letters: E `num_experts`, k `moe_router_topk`, f `moe_ffn_hidden_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCORE_FUNCTIONS = ("softmax", "sigmoid")
ROUTER_DTYPES = (None, "fp32")

_COUNTS = ("moe_ffn_hidden_size", "moe_router_topk")
_SAME = (
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_enable_expert_bias",
    "moe_router_dtype",
)
"""Fields whose name and value are those of Megatron's arguments."""

REFUSED = (
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_limited_devices",
    "moe_input_jitter_eps",
    "moe_shared_expert_gate",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    "moe_expert_capacity_factor",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
)
"""Megatron's arguments that change the function of a layer, which this project does not support."""

REFUSED_BALANCING = ("sinkhorn", "quantile_balancing")
"""Values of `moe_router_load_balancing_type` that choose experts by another rule than top-k."""


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Routed and shared experts; all at their defaults in a dense model."""

    num_experts: int = 0
    """E, routed experts of a layer; 0 is a dense model."""

    moe_layer_pattern: tuple[int, ...] = ()
    """1 for a layer with experts, 0 for a dense one; empty in a dense model."""

    moe_ffn_hidden_size: int = 0
    """f, hidden size of one routed expert."""

    moe_shared_expert_intermediate_size: int = 0
    """Hidden size of all shared experts together; 0 for none."""

    moe_router_topk: int = 0
    """k, experts per token."""

    moe_router_score_function: str = "softmax"
    """'softmax' over the experts, or 'sigmoid' of each."""

    moe_router_pre_softmax: bool = False
    """Of 'softmax': the weights are the k largest of a softmax over all experts, instead of a
    softmax over the k largest logits, which sums to 1."""

    moe_router_topk_scaling_factor: float = 1.0
    """Multiplies the weights of the k experts."""

    moe_router_enable_expert_bias: bool = False
    """Of 'sigmoid': whether a bias is added in the choice of experts (not in their weights)."""

    moe_router_dtype: str | None = None
    """Dtype of the router's logits and weights: None for that of the activations, or 'fp32'."""

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return bool(self.num_experts and self.moe_layer_pattern[layer])

    @property
    def num_dense_layers(self) -> int:
        """Number of layers with a dense MLP in a mixture of experts; 0 in a dense model."""
        return self.moe_layer_pattern.count(0)

    @property
    def stacks_layers(self) -> bool:
        """Whether all layers are of one kind, which Megatron stores stacked in one tensor."""
        return len(set(self.moe_layer_pattern)) <= 1

    @property
    def normalizes_topk(self) -> bool:
        """Whether the weights of the k experts sum to 1 (before the scaling factor)."""
        if self.moe_router_score_function == "softmax":
            return not self.moe_router_pre_softmax
        return self.moe_router_topk > 1

    def experts_problem(self, num_layers: int) -> str | None:
        """One line on the first field with an invalid value, or None."""
        if not self.num_experts:
            set_fields = [n for n in (*_COUNTS, "moe_layer_pattern") if getattr(self, n)]
            return f"{set_fields[0]} is set, and num_experts is 0" if set_fields else None
        sizes = ("num_experts", *_COUNTS)
        if self.moe_shared_expert_intermediate_size:
            sizes += ("moe_shared_expert_intermediate_size",)
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                return f"{name} is {value!r}; it must be a whole number of at least 1"
        pattern = self.moe_layer_pattern
        if len(pattern) != num_layers or set(pattern) - {0, 1} or 1 not in pattern:
            return (
                f"moe_layer_pattern is {list(pattern)}; it needs a 0 or 1 for each of {num_layers}"
                " layers, and a 1"
            )
        if self.moe_router_topk > self.num_experts:
            return f"moe_router_topk is {self.moe_router_topk}, of {self.num_experts} experts"
        return None

    def routing_problem(self) -> str | None:
        """One line on routing that this project's checkpoints, exports and inference do not
        support, or None."""
        if not self.num_experts:
            return None
        for name, allowed in (
            ("moe_router_score_function", SCORE_FUNCTIONS),
            ("moe_router_dtype", ROUTER_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                return f"{name} {getattr(self, name)!r} is not supported; {_listed(allowed)} are"
        softmax = self.moe_router_score_function == "softmax"
        if softmax and self.moe_router_topk == 1 and not self.moe_router_pre_softmax:
            return "moe_router_topk is 1 and needs moe_router_pre_softmax"
        if softmax and self.moe_router_enable_expert_bias:
            return "moe_router_enable_expert_bias needs moe_router_score_function sigmoid"
        return None


def refused_experts(args: Mapping[str, Any]) -> str | None:
    """One line on routing in a run's arguments that cannot be converted, or None."""
    if not args.get("num_experts"):
        return None
    for name in REFUSED:
        if args.get(name):
            return f"a model with {name} ({args[name]!r}) cannot be converted"
    balancing = args.get("moe_router_load_balancing_type")
    for kind in balancing if isinstance(balancing, list | tuple) else [balancing]:
        if kind in REFUSED_BALANCING:
            return f"moe_router_load_balancing_type {kind!r} cannot be converted"
    return None


def expert_fields(args: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Fields of ExpertSizes from a run's arguments, a preset or a config.

    Raises:
        ValueError: moe_layer_freq is no pattern of the layers.
    """
    experts = args.get("num_experts") or args.get("num_moe_experts")
    if not experts:
        return {}
    freq = args.get("moe_layer_freq") or 1
    if isinstance(freq, int):
        pattern = tuple(int(i % freq == 0) for i in range(num_layers))
    elif isinstance(freq, list | tuple) and len(freq) == num_layers:
        pattern = tuple(freq)
    else:
        raise ValueError(
            f"moe_layer_freq is {freq!r}; use an integer or {num_layers} zeros and ones"
        )
    fields = {name: args[name] for name in _SAME if args.get(name) is not None}
    if fields.get("moe_router_score_function", "softmax") != "softmax":
        fields["moe_router_pre_softmax"] = False
    return fields | {
        "num_experts": experts,
        "moe_layer_pattern": pattern,
        "moe_ffn_hidden_size": args.get("moe_ffn_hidden_size") or args["ffn_hidden_size"],
        "moe_shared_expert_intermediate_size": args.get("moe_shared_expert_intermediate_size") or 0,
        "moe_router_topk": args.get("moe_router_topk") or 2,
        "moe_router_topk_scaling_factor": float(args.get("moe_router_topk_scaling_factor") or 1.0),
    }


def expert_args(sizes: ExpertSizes) -> dict[str, Any]:
    """Megatron's arguments of the experts. Its config has the same names, but `num_moe_experts` for
    `num_experts`."""
    if not sizes.num_experts:
        return {}
    pattern, scale = sizes.moe_layer_pattern, sizes.moe_router_topk_scaling_factor
    return {name: getattr(sizes, name) for name in _SAME} | {
        "num_experts": sizes.num_experts,
        "moe_layer_freq": 1 if sizes.stacks_layers else list(pattern),
        "moe_ffn_hidden_size": sizes.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": sizes.moe_shared_expert_intermediate_size or None,
        "moe_router_topk_scaling_factor": None if scale == 1.0 else scale,
    }


def _listed(values: tuple[Any, ...]) -> str:
    return " and ".join(map(repr, values))
