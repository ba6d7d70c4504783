"""The attentions MLRA is compared with: GTA, MFA, TPA, and the config of Megatron's MHA, MQA, GQA.

Letters: s tokens, b batch, d hidden size, h heads and h_l = h / tp of this rank, c head dim
(`kv_channels`), g key/value heads, d_r RoPE dims, R factor rank. With sequence parallel the input
and output hold s / tp tokens.

Tensor parallelism shards every weight. Projections to heads are cut by head. Projections to values
that all heads share are cut by column, and their outputs are gathered. A gathered output feeds
rank-local heads, so its gradient is a sum over ranks: the gather's backward is a reduce-scatter. No
parameter is replicated.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import deprecate_inference_params
from torch import Tensor

from megatron_mlra.layers.baselines.config import BaselineConfig
from megatron_mlra.layers.core_attention import SDPACoreAttention
from megatron_mlra.layers.projections import ShardedRMSNorm
from megatron_mlra.layers.submodules import AttentionSubmodules, attention_submodules
from megatron_mlra.maths.rope import apply_rope, rope_cos_sin
from megatron_mlra.sharding.tensor_parallel import gather_columns


def baseline_attention_spec(config: BaselineConfig) -> ModuleSpec:
    """The self-attention of a transformer layer: this project's, or for 'gqa' Megatron's own."""
    use_te = config.transformer_impl == "transformer_engine"
    if config.attention == "gqa":
        from megatron.core.models.gpt import gpt_layer_specs

        if use_te:
            layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
                qk_layernorm=config.qk_layernorm
            )
        else:
            layer = gpt_layer_specs.get_gpt_layer_local_spec(
                qk_layernorm=config.qk_layernorm, normalization=config.normalization
            )
        return layer.submodules.self_attention
    return ModuleSpec(
        module={"gta": GTASelfAttention, "mfa": MFASelfAttention, "tpa": TPASelfAttention}[
            config.attention
        ],
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=attention_submodules(use_te, SDPACoreAttention),
    )


class BaselineSelfAttention(Attention):
    """What GTA, MFA and TPA share: one gather of the input, the core, the output projection.

    A subclass builds its projections in `_build` and computes queries, keys and values in `_qkv`.
    """

    config: BaselineConfig

    def __init__(
        self,
        config: BaselineConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        self._column_linear = partial(
            submodules.column_linear,
            config=config,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )
        self.own_heads = config.num_attention_heads // self.tp_group.size()
        self._build()

    def _build(self) -> None:
        raise NotImplementedError

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[s, b, d]` -> query `[s, b, h_l, c]`, key and value `[s, b, h_l or fewer, c]`."""
        raise NotImplementedError

    @property
    def rope_dim(self) -> int:
        """Dims that RoPE rotates."""
        return self.config.kv_channels

    def _column(
        self, size: int, input_size: int | None = None, init_method=None
    ) -> torch.nn.Module:
        """A column-parallel linear from the hidden state, or from `input_size`."""
        return self._column_linear(
            self.config.hidden_size if input_size is None else input_size,
            size,
            init_method=self.config.init_method if init_method is None else init_method,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context=None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        sequence_len_offset: int | None = None,
        *,
        inference_params=None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the whole sequence (training, evaluation).

        The model's `rotary_pos_emb` is ignored: its width is Megatron's, not always the baseline's.

        Args:
            hidden_states: `[s, b, d]`, or `[s / tp, b, d]` with sequence parallel.
            attention_mask: None for causal, else see SDPACoreAttention.
            sequence_len_offset: position of the first token, default 0.

        Returns:
            The output, of hidden_states' shape and dtype, and the output projection's bias (None
            without biases).

        Raises:
            ValueError: for an inference context, packed sequences or an attention bias.
        """
        if deprecate_inference_params(inference_context, inference_params) is not None:
            raise ValueError(f"attention {self.config.attention} has no KV cache; generate without")
        x = self._enter(hidden_states)  # [s, b, d]
        first = sequence_len_offset or 0
        positions = torch.arange(first, first + x.size(0), device=x.device)
        cos, sin = rope_cos_sin(
            positions,
            self.rope_dim,
            self.config.rotary_base,
            torch.promote_types(x.dtype, torch.float),
        )
        qkv = self._qkv(x, cos, sin)
        attend = self._run_core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        out = attend(
            *qkv,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(out)

    def _enter(self, x: Tensor) -> Tensor:
        """The input of all column-parallel projections, gathered once for all of them."""
        if self.tp_group.size() == 1:
            return x
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def get_query_key_value_tensors(self, *args, **kwargs):
        """Unused: `_qkv` replaces this method."""
        raise NotImplementedError


class GTASelfAttention(BaselineSelfAttention):
    """Grouped tied attention: one projection is a group's value and, in part, its key.

    key = [first c - d_r dims of kv | shared RoPE key], value = kv; RoPE rotates the query's last
    d_r dims and the shared key.
    """

    def _build(self) -> None:
        config = self.config
        self.linear_q_proj = self._column(config.num_attention_heads * config.kv_channels)
        self.linear_kv_proj = self._column(config.num_query_groups * config.kv_channels)
        self.linear_k_rope_proj = self._column(config.qk_pos_emb_head_dim)

    @property
    def rope_dim(self) -> int:
        """d_r."""
        return self.config.qk_pos_emb_head_dim

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nope, rope = self.config.kv_channels - self.rope_dim, self.rope_dim
        q = _heads(self.linear_q_proj(x)[0], self.config.kv_channels)  # [s, b, h_l, c]
        value = _heads(self.linear_kv_proj(x)[0], self.config.kv_channels)  # [s, b, g / tp, c]
        k_rope = self.linear_k_rope_proj(x)[0]  # [s, b, d_r / tp]
        k_rope = gather_columns(self.tp_group, {"k": k_rope}, {})[0]["k"]  # [s, b, d_r]
        q_nope, q_rope = q.split((nope, rope), dim=-1)
        query = torch.cat((q_nope, apply_rope(q_rope, cos, sin)), dim=-1)
        shared = apply_rope(k_rope, cos, sin).unsqueeze(2).expand(-1, -1, value.size(2), -1)
        key = torch.cat((value[..., :nope], shared), dim=-1)
        return query, key, value


class MFASelfAttention(BaselineSelfAttention):
    """Multi-matrix factorization attention: wide query heads from one normalised query latent, and
    one key head and one value head that all query heads share."""

    def _build(self) -> None:
        config, d_q = self.config, self.config.q_lora_rank
        self.linear_q_down_proj = self._column(d_q)
        self.q_norm = ShardedRMSNorm(config, d_q, 1, 1.0, self.tp_group)
        query_size = config.num_attention_heads * config.kv_channels
        self.linear_q_up_proj = self._column(query_size, input_size=d_q)
        self.linear_kv_proj = self._column(2 * config.kv_channels)

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config.kv_channels
        parts = {"q": self.linear_q_down_proj(x)[0], "kv": self.linear_kv_proj(x)[0]}
        whole, weights = gather_columns(self.tp_group, parts, {"q": self.q_norm.weight})
        c_q = self.q_norm.whole(whole["q"], weights["q"])  # [s, b, d_q]
        query = _heads(self.linear_q_up_proj(c_q)[0], c)  # [s, b, h_l, c]
        key, value = _heads(whole["kv"], c).split(1, dim=2)  # [s, b, 1, c]
        return apply_rope(query, cos, sin), apply_rope(key, cos, sin), value


class TPASelfAttention(BaselineSelfAttention):
    """Tensor product attention: head i of q, k and v is a mean over R factors, each a number of
    head i times a vector of c dims that all heads share.

    RoPE rotates the vectors of q and k. All projections start Xavier-uniform.
    """

    def _build(self) -> None:
        config = self.config
        self.ranks = {"q": config.tpa_q_rank, "k": config.tpa_kv_rank, "v": config.tpa_kv_rank}
        for name, rank in self.ranks.items():
            head, dim = config.num_attention_heads * rank, rank * config.kv_channels
            setattr(self, f"linear_{name}_head_factors", self._xavier(head))
            setattr(self, f"linear_{name}_dim_factors", self._xavier(dim))

    def _xavier(self, size: int) -> torch.nn.Module:
        """`[size, d]`, uniform in +-sqrt(6 / (d + size)): the bound of the whole weight."""
        bound = math.sqrt(6.0 / (self.config.hidden_size + size))
        return self._column(size, init_method=partial(torch.nn.init.uniform_, a=-bound, b=bound))

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = {name: getattr(self, f"linear_{name}_dim_factors")(x)[0] for name in self.ranks}
        whole, _ = gather_columns(self.tp_group, parts, {})
        out = []
        for name, vectors in whole.items():
            rank = self.ranks[name]
            numbers = _heads(getattr(self, f"linear_{name}_head_factors")(x)[0], rank)
            vectors = _heads(vectors, self.config.kv_channels)  # [s, b, R, c]
            if name != "v":
                vectors = apply_rope(vectors, cos, sin)
            out.append(numbers @ vectors / rank)  # [s, b, h_l, R] @ [s, b, R, c]
        return tuple(out)


def _heads(x: Tensor, size: int) -> Tensor:
    """`[s, b, n * size]` -> `[s, b, n, size]`."""
    return x.view(*x.shape[:-1], -1, size)
