"""The configuration class of exported models for vLLM: no code of the exported folder is run.

Letters: L `num_latent_heads`, N `num_branches`, d `hidden_size`, d_q `q_lora_rank`, d_c
`kv_lora_rank`.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

_COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size",
    "max_position_embeddings", "num_latent_heads", "num_branches", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "softmax_scale")
_OTHERS = ("q_lora_rank", "output_gate", "variance_scaling", "hidden_act", "rope_parameters")
_OF_EXPERTS = (
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    "scoring_func", "routed_scaling_factor", "use_expert_bias", "norm_topk_prob", "router_dtype",
)  # fmt: skip
_OF_YARN = (
    "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "attention_factor",
)  # fmt: skip


class MLRAConfig(PreTrainedConfig):
    """A Llama-style decoder whose attention is MLA, GLA-n or MLRA-n.

    Every field is in config.json: an export writes all of them.
    """

    model_type = "mlra"

    @property
    def latent_dim(self) -> int:
        """d_l = d_c / L."""
        return self.kv_lora_rank // self.num_latent_heads

    @property
    def q_scale(self) -> float:
        """Factor of the query latent: sqrt(d / d_q); 1 without scaling or query latent."""
        if not self.variance_scaling or self.q_lora_rank is None:
            return 1.0
        return (self.hidden_size / self.q_lora_rank) ** 0.5

    @property
    def kv_scale(self) -> float:
        """Factor of every latent: sqrt(d / d_l); 1 without variance scaling."""
        return (self.hidden_size / self.latent_dim) ** 0.5 if self.variance_scaling else 1.0

    @property
    def branch_scale(self) -> float:
        """Factor of the sum over branches: N^-1/2; 1 without variance scaling."""
        return self.num_branches**-0.5 if self.variance_scaling else 1.0

    @property
    def draft_layers(self) -> int:
        """Layers of multi-token prediction, behind the decoder's."""
        return getattr(self, "num_nextn_predict_layers", 0)

    @property
    def norms_query_heads(self) -> bool:
        """Whether there is an RMSNorm of each query head; older exports do not say."""
        return bool(getattr(self, "query_head_norm", False))

    def layer_has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        types = getattr(self, "mlp_layer_types", None)
        return bool(getattr(self, "num_experts", 0)) and (types is None or types[layer] == "sparse")


def config_problems(config: PreTrainedConfig) -> Iterator[str]:
    """What config.json lacks or contradicts, one line each, the first the most telling."""
    if config.model_type != MLRAConfig.model_type:
        yield (
            f"a layer of multi-token prediction drafts for its own model alone, and the served one"
            f" is a {config.model_type} model; name the served folder in --speculative-config"
        )
        return
    experts = _OF_EXPERTS if getattr(config, "num_experts", 0) else ()
    for name in (*_COUNTS, *_NUMBERS, *_OTHERS, *experts):
        if not hasattr(config, name):
            yield f"config.json names no {name}; export the model again"
            return
    for name in _COUNTS:
        value = getattr(config, name)
        if type(value) is not int or value < (name != "qk_rope_head_dim"):
            yield f"config.json: {name} is {value!r:.60}; it must be a whole number of at least 1"
            return
    for name in _NUMBERS:
        value = getattr(config, name)
        if not _is_positive(value):
            yield f"config.json: {name} is {value!r:.60}; it must be a positive number"
    rank = config.q_lora_rank
    if rank is not None and (type(rank) is not int or rank < 1):
        yield f"config.json: q_lora_rank is {rank!r:.60}; it must be null or at least 1"
    yield from _rope_problems(config.rope_parameters)
    yield from _layer_problems(config)
    latents, branches = config.num_latent_heads, config.num_branches
    for name, value, what, parts in (
        ("num_latent_heads", latents, "num_branches", branches),
        ("kv_lora_rank", config.kv_lora_rank, "num_latent_heads", latents),
        ("num_attention_heads", config.num_attention_heads, "head groups", latents // branches),
    ):
        if not parts or value % parts:
            yield f"config.json: {name} {value} is no multiple of the {parts} {what}"
            return


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _rope_problems(rope: object) -> Iterator[str]:
    if not isinstance(rope, dict) or not {"rope_type", "rope_theta"} <= rope.keys():
        yield f"config.json: rope_parameters {rope!r:.60} name no rope_type or no rope_theta"
        return
    for name in _OF_YARN if rope["rope_type"] == "yarn" else ("rope_theta",):
        if name not in rope:
            yield f"config.json: rope_parameters name no {name}; export the model again"
        elif not _is_positive(value := rope[name]):
            yield (
                f"config.json: rope_parameters have {name} {value!r:.60}; it must be a positive"
                " number"
            )


def _layer_problems(config: PreTrainedConfig) -> Iterator[str]:
    """Of experts and of layers of multi-token prediction."""
    experts = getattr(config, "num_experts", 0)
    least = {"num_experts": 0, "num_nextn_predict_layers": 0}
    if experts:
        least |= {"num_experts_per_tok": 1, "moe_intermediate_size": 1}
        least["shared_expert_intermediate_size"] = 0
    for name, bound in least.items():
        value = getattr(config, name, None)
        if value is None and bound == 0:
            continue
        if type(value) is not int or value < bound:
            said = f"config.json: {name} is {value!r:.60}; it must be a whole number of at least"
            yield f"{said} {bound}"
            return
    if not experts:
        return
    if config.num_experts_per_tok > experts:
        yield (
            f"config.json: num_experts_per_tok is {config.num_experts_per_tok}; it must be at most"
            f" num_experts, {experts}"
        )
    if config.scoring_func not in ("softmax", "sigmoid"):
        yield (
            f"config.json: scoring_func is {config.scoring_func!r:.60}; it must be softmax or"
            " sigmoid"
        )
    if not _is_positive(scale := config.routed_scaling_factor):
        yield f"config.json: routed_scaling_factor is {scale!r:.60}; it must be a positive number"
    types, layers = getattr(config, "mlp_layer_types", None), config.num_hidden_layers
    if types is not None and not (
        isinstance(types, list)
        and len(types) == layers
        and all(each in ("dense", "sparse") for each in types)
    ):
        yield (
            f"config.json: mlp_layer_types is {types!r:.60}; it must name dense or sparse for each"
            f" of the {layers} layers"
        )


def refusing(problem: str) -> type[PreTrainedConfig]:
    """A configuration class that raises ValueError(problem) when a model is opened."""

    class Refused(PreTrainedConfig):
        model_type = "mlra"

        @classmethod
        def from_dict(cls, *_, **__):
            raise ValueError(problem)

    return Refused
