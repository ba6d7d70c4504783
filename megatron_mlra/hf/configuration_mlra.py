"""Configuration of MLA, GLA and MLRA language models for Hugging Face transformers.

Letters: L `num_latent_heads`, N `num_branches`, G = L / N head groups, d `hidden_size`, h
`num_attention_heads`, d_q `q_lora_rank`, d_c `kv_lora_rank`, d_l = d_c / L, d_h `qk_nope_head_dim`,
d_r `qk_rope_head_dim`, d_v `v_head_dim`.
"""

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

DECODE_BACKENDS = ("auto", "torch", "mlra_kernels")
SCORING_FUNCTIONS = ("softmax", "sigmoid")


class MLRAConfig(PreTrainedConfig):
    """A Llama-style decoder whose attention is MLA, GLA-n or MLRA-n.

    MLA is (L, N) = (1, 1), GLA-2 (2, 1), GLA-4 (4, 1), MLRA-2 (4, 2), MLRA-4 (4, 4), MLRA-8 (8, 8).

    Raises:
        ValueError: sizes do not fit each other, or a field names an unknown choice.
    """

    model_type = "mlra"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 50304
    hidden_size: int = 3072
    intermediate_size: int = 9880
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_latent_heads: int = 4
    """L: parts of the latent, each with its own norm and up-projection."""
    num_branches: int = 4
    """N: branches, i.e. latent heads per attention head. The outputs of the branches are summed."""
    q_lora_rank: int | None = 1024
    """d_q; None projects queries straight from the hidden state."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    query_head_norm: bool = False
    """RMSNorm of each query head's d_h + d_r numbers before RoPE."""
    output_gate: bool = False
    """Multiply the attention output by sigmoid(x W_G) before the output projection."""
    variance_scaling: bool = True
    """Scale the query latent by sqrt(d / d_q), each latent head by sqrt(d / d_l) and the branch sum
    by N^-1/2; False sets all three factors to 1."""
    softmax_scale: float | None = None
    """Factor of the attention scores; None is (d_h + d_r)^-1/2."""
    num_experts: int = 0
    """Routed experts per layer; 0 is a dense model."""
    num_experts_per_tok: int = 0
    """Routed experts that each token visits."""
    moe_intermediate_size: int = 0
    """Hidden size of one routed expert."""
    shared_expert_intermediate_size: int = 0
    """Hidden size of all shared experts together; 0 for none."""
    mlp_layer_types: list[str] | None = None
    """"dense" or "sparse" for each layer; None: all sparse where there are experts."""
    scoring_func: str = "softmax"
    """The router's scores: "softmax" over the experts, or "sigmoid" of each expert's logit."""
    norm_topk_prob: bool = False
    """Divide the weights of a token's experts by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor of the weights of a token's experts."""
    use_expert_bias: bool = False
    """Choose experts by scores plus e_score_correction_bias; the weights are the plain scores."""
    router_dtype: str | None = None
    """dtype of the router's matrix product: "float32", or None for that of the activations."""
    num_nextn_predict_layers: int = 0
    """Layers of multi-token prediction in the folder, numbered after the decoder's layers. The
    model does not load these layers, and sets this field to 0."""
    num_nextn_predict_depths: int = 0
    """Tokens that one layer of multi-token prediction predicts in turn; 0 where each layer predicts
    one token."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    """RoPE values as in transformers; `rope_type` is "default" or "yarn". RoPE rotates the pairs
    (i, i + d_r / 2)."""
    rope_layer_types: list[str] | None = None
    """"rope", or "nope" (no rotation), for each layer; None: all "rope"."""
    use_cache: bool = True
    decode_backend: str = "auto"
    """The code that attends to the cache in steps of 1 to 8 tokens: "torch" (the attention
    implementation, on transformers' own cache) or "mlra_kernels" (CUDA kernels, on a paged cache).
    "auto" is mlra_kernels if the package is installed and supports the shapes, dtype and GPU, else
    torch."""
    decode_pages: bool = False
    """For tests: with "torch", attend to a paged cache in plain torch, on any device."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        # The RoPE functions of transformers derive frequencies from head_dim.
        self.head_dim = self.qk_rope_head_dim
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.softmax_scale is None:
            self.softmax_scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        super().__post_init__(**kwargs)
        self.check()

    @property
    def latent_dim(self) -> int:
        """d_l = d_c / L."""
        return self.kv_lora_rank // self.num_latent_heads

    @property
    def num_head_groups(self) -> int:
        """G = L / N: groups of heads that share their latents."""
        return self.num_latent_heads // self.num_branches

    @property
    def q_scale(self) -> float:
        """sqrt(d / d_q), or 1."""
        if not self.variance_scaling or self.q_lora_rank is None:
            return 1.0
        return (self.hidden_size / self.q_lora_rank) ** 0.5

    @property
    def kv_scale(self) -> float:
        """sqrt(d / d_l), or 1."""
        return (self.hidden_size / self.latent_dim) ** 0.5 if self.variance_scaling else 1.0

    @property
    def branch_scale(self) -> float:
        """N^-1/2, or 1."""
        return self.num_branches**-0.5 if self.variance_scaling else 1.0

    def layer_has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        types = self.mlp_layer_types
        return self.num_experts > 0 and (types is None or types[layer] == "sparse")

    def layer_rotates(self, layer: int) -> bool:
        """Whether a layer rotates the RoPE dims of queries and keys."""
        return self.rope_layer_types is None or self.rope_layer_types[layer] == "rope"

    def check(self) -> None:
        """Check the fields; the model calls this again, since fields may change after construction.

        Raises:
            ValueError: one line that names the field and the fix.
        """
        L, N, h = self.num_latent_heads, self.num_branches, self.num_attention_heads
        if self.kv_lora_rank % L:
            raise ValueError(
                f"num_latent_heads {L} does not divide kv_lora_rank {self.kv_lora_rank};"
                f" use kv_lora_rank {-(-self.kv_lora_rank // L) * L}"
            )
        if L % N or h % (L // N):
            raise ValueError(
                f"num_branches {N} must divide num_latent_heads {L}, and their quotient"
                f" num_attention_heads {h}; use num_branches {L}"
            )
        if self.rope_parameters["rope_type"] not in ("default", "yarn"):
            raise ValueError(
                f"rope_type is {self.rope_parameters['rope_type']!r}; use default or yarn"
            )
        if self.rope_parameters["rope_type"] == "yarn" and not self.qk_rope_head_dim:
            raise ValueError("rope_type yarn stretches RoPE, qk_rope_head_dim is 0; use default")
        types = self.rope_layer_types
        if types is not None and (
            len(types) != self.num_hidden_layers or set(types) - {"rope", "nope"}
        ):
            raise ValueError(
                f"rope_layer_types is {types}; name 'rope' or 'nope' for each of"
                f" {self.num_hidden_layers} layers"
            )
        if self.num_experts:
            self._check_experts()
        self.check_backend()

    def check_backend(self) -> None:
        """Check `decode_backend`; replace the name of an earlier version, with a warning.

        Raises:
            ValueError: `decode_backend` is unknown.
        """
        if self.decode_backend == "reference":  # the name in an earlier version
            self.decode_backend, self.decode_pages = "torch", True
            logger.warning_once(
                "decode_backend reference is now called torch with pages: use decode_backend"
                " torch and decode_pages true"
            )
        if self.decode_backend not in DECODE_BACKENDS:
            raise ValueError(
                f"decode_backend is {self.decode_backend!r};"
                f" use one of {', '.join(DECODE_BACKENDS)}"
            )

    def _check_experts(self) -> None:
        k, E, types = self.num_experts_per_tok, self.num_experts, self.mlp_layer_types
        if not 1 <= k <= E:
            raise ValueError(f"num_experts_per_tok is {k}; use 1 to num_experts {E}")
        if self.scoring_func not in SCORING_FUNCTIONS:
            raise ValueError(
                f"scoring_func is {self.scoring_func!r}; use one of {', '.join(SCORING_FUNCTIONS)}"
            )
        if types is not None and (
            len(types) != self.num_hidden_layers or set(types) - {"dense", "sparse"}
        ):
            raise ValueError(
                f"mlp_layer_types is {types}; name 'dense' or 'sparse' for each of"
                f" {self.num_hidden_layers} layers"
            )


MLRAConfig.register_for_auto_class()

__all__ = ["MLRAConfig"]
