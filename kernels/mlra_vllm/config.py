"""The configuration class of exported models for vLLM: no code of the exported folder is run.

Letters: L `num_latent_heads`, N `num_branches`, d `hidden_size`, d_q `q_lora_rank`, d_c
`kv_lora_rank`.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


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


def refusing(problem: str) -> type[PreTrainedConfig]:
    """A configuration class that raises ValueError(problem) when a model is opened."""

    class Refused(PreTrainedConfig):
        model_type = "mlra"

        @classmethod
        def from_dict(cls, *_, **__):
            raise ValueError(problem)

    return Refused
