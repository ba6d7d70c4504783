"""MLRASelfAttention: Multi-Head Low-Rank Attention as a Megatron self-attention submodule.

Letters in shape comments: s tokens of this rank, t tokens of the whole sequence (s without context
parallel), b batch, d hidden size, tp tensor-parallel size, h / tp own heads; n branches, h_c heads
and g head groups of this rank's core (sharding/partition.py), l latent dim, `e` d_h + d_r. With
sequence parallel the input and output hold s / tp tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import deprecate_inference_params
from torch import Tensor

from megatron_mlra.layers.config import MLRAConfig, resolve_core_backend
from megatron_mlra.layers.fp8 import linear_config
from megatron_mlra.layers.offload import OffloadGroup
from megatron_mlra.layers.projections import (
    LatentUpProjection,
    ShardedRMSNorm,
    latent_functions,
    split_rows_factory,
)
from megatron_mlra.layers.recompute import rebuilt_in_backward
from megatron_mlra.layers.rotary import rotary_tables
from megatron_mlra.layers.submodules import AttentionSubmodules
from megatron_mlra.maths.attention import materialized_qkv, split_up_projection
from megatron_mlra.maths.rope import unrotated
from megatron_mlra.sharding.context_parallel import ContextParallel
from megatron_mlra.sharding.matrices import latent_matrices
from megatron_mlra.sharding.partition import LatentShard
from megatron_mlra.sharding.placement import placements, training_share
from megatron_mlra.sharding.tensor_parallel import LatentParallel
from megatron_mlra.sharding.token_plan import TokenPlan, plan_tokens


class MLRASelfAttention(Attention):
    """Self-attention of MLA, GLA and MLRA models, as `num_latent_heads` and `num_branches` say.

    Parameters at tensor parallel size tp. Without q_lora_rank, `linear_q_proj.weight`
    `[h / tp * (d_h + d_r), d]` replaces the first three:

    - `linear_q_down_proj.weight` `[d_q / tp, d]`, `q_norm.weight` `[d_q / tp]`
    - `linear_q_up_proj.weight` `[h / tp * (d_h + d_r), d_q]`
    - `query_head_norm.weight` `[h / tp * (d_h + d_r)]` (query_head_norm)
    - `linear_kv_down_proj.weight` `[d_c / tp + d_r / tp, d]`, `kv_norm.weight` `[d_c / tp]`
    - `linear_kv_up_proj.weight` `[n, h_c, d_h + d_v, l]`
    - `linear_gate_proj.weight` `[h / tp * d_v, d]` (output_gate)
    - `linear_proj.weight` `[d, h / tp * d_v]`

    Every parameter is sharded and none is replicated, so no gradient needs a tensor-parallel sum of
    its own.
    """

    config: MLRAConfig

    def __init__(
        self,
        config: MLRAConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
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
        group = self.tp_group
        self.shard = LatentShard.plan(config, group.size(), group.rank())
        self.parallel = LatentParallel(config, self.shard, group, config.sequence_parallel)
        self.context = ContextParallel(pg_collection.cp)
        self.latent_functions = latent_functions(config)
        # Offloading of whole layers copies tensors by saved-tensor hooks. Rebuilding nests its own
        # hooks in those, which would then miss the tensors.
        self.rebuilds_query = (
            config.absorbed and config.recompute_absorbed_query and not config.cpu_offloading
        )
        self.rotates = config.rotates(layer_number - 1)
        self.own_heads = config.num_attention_heads // group.size()
        self.recompute_up_projection = (
            config.recompute_granularity == "selective"
            and "mla_up_proj" in config.recompute_modules
        )

        placed = placements(config)

        def column(linear_name: str) -> torch.nn.Module:
            output_size, input_size = placed[linear_name].shape
            return submodules.column_linear(
                input_size,
                output_size,
                config=linear_config(config, linear_name),
                init_method=config.init_method,
                gather_output=False,
                bias=False,
                skip_bias_add=False,
                is_expert=False,
                tp_group=group,
                name=linear_name if name is None else f"{name}.{linear_name}",
            )

        if config.q_lora_rank is None:
            self.linear_q_proj = column("linear_q_proj")
        else:
            self.linear_q_down_proj = column("linear_q_down_proj")
            self.q_norm = ShardedRMSNorm(config, config.q_lora_rank, 1, config.q_scale, group)
            self.linear_q_up_proj = column("linear_q_up_proj")
        if config.query_head_norm:
            h = config.num_attention_heads
            self.query_head_norm = ShardedRMSNorm(config, h * config.qk_dim, h, 1.0, group)
        self.linear_kv_down_proj = column("linear_kv_down_proj")
        d_c, L = config.kv_lora_rank, config.num_latent_heads
        self.kv_norm = ShardedRMSNorm(config, d_c, L, config.kv_scale, group)
        self.linear_kv_up_proj = LatentUpProjection(config, self.shard, group, config.init_method)
        if config.output_gate:
            self.linear_gate_proj = column("linear_gate_proj")
        for linear_name, rows in latent_matrices(config, self.shard).items():
            getattr(self, linear_name).weight.matrices = rows

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
        packed_seq_params: PackedSeqParams | None = None,
        position_ids: Tensor | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params=None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the whole sequence (training, evaluation).

        Args:
            hidden_states: `[s, b, d]`, or `[s / tp, b, d]` with sequence parallel.
            attention_mask: None for causal attention; else `[b or 1, 1, s, t]` bool, True where not
                attended to, keys in the order of the sequence. Only core_backend torch reads it.
            packed_seq_params: the documents that one row of tokens (b = 1) is made of. Each
                document attends to itself alone and its positions start at 0. How context parallel
                cuts documents: sharding/token_plan.py.
            sequence_len_offset: position of the first token, default 0.

        Returns:
            The output, of hidden_states' shape and dtype, and None: the output projection has no
            bias.

        Raises:
            ValueError: for an inference context, an attention bias, or packed sequences that do not
                fit the tokens or come with a mask.
        """
        assert rotary_pos_emb is None, "MLRA rotates its own RoPE dims"
        if deprecate_inference_params(inference_context, inference_params) is not None:
            raise ValueError(
                "Megatron's inference contexts hold expanded heads; MLRA caches latents"
            )

        if attention_bias is not None:
            raise ValueError("MLRA attention takes no attention bias; leave it out")
        if packed_seq_params is not None and attention_mask is not None:
            raise ValueError("packed sequences say what is attended to; leave the mask out")

        recomputes = self.recompute_up_projection and self.training
        group = self._offload("qkv_linear", self.offload_qkv_linear, hidden_states)
        with group as hidden_states:
            x = self.parallel.enter(hidden_states)  # [s, b, d]
            q, latents, k_rope = self._compress(x)
            gate = self.linear_gate_proj(x)[0] if self.config.output_gate else None
            del x
            plan = self._plan_tokens(q, packed_seq_params)
            angles = self._rotary_angles(plan, sequence_len_offset or 0)
            gather = self.context.start_gather(latents, k_rope)
            if not recomputes:
                q = self._query_heads(q)
            latents, k_rope = gather.finish(plan)  # [t, b, n, g, l], [t, b, d_r]
        q = group.commit(q)

        with (group := self._offload("core_attn", self.offload_core_attention, q)) as q:
            if recomputes:
                fp8 = self.config.fp8 or self.config.fp4 or None
                up_projection = tensor_parallel.CheckpointWithoutOutput(fp8=fp8)
                # From the query latent: recomputation repeats both steps.
                qkv = up_projection.checkpoint(
                    lambda q, *rest: self._assemble(self._query_heads(q), *rest),
                    *(q, latents, k_rope, *angles),
                )
                z = self._attend(qkv, latents, attention_mask, plan)
                up_projection.discard_output_and_register_recompute(z)
            else:
                qkv = self._assemble(q, latents, k_rope, *angles)
                with self._query_rebuilt(qkv[0], q, angles[:2], plan, group):
                    z = self._attend(qkv, latents, attention_mask, plan)
            # Backward fetches these from the host or rebuilds them: drop the references here, so
            # that the memory is free.
            del q, qkv, latents
            out = self._combine_branches(z)  # [s, b, h / tp * d_v]
            del z
        out = group.commit(out)

        with (group := self._offload("attn_proj", self.offload_attn_proj, out)) as out:
            if gate is not None:
                out = out * torch.sigmoid(gate.float()).to(out.dtype)
            out, bias = self.linear_proj(out)
        return group.commit(out), bias

    def _offload(self, name: str, wanted: bool, tensor: Tensor) -> OffloadGroup:
        """The part `name`, computed from `tensor`; if wanted, its saved tensors go to the host."""
        wanted = wanted and self.training and torch.is_grad_enabled()
        return OffloadGroup(wanted, tensor, name, (self.linear_kv_up_proj.weight,))

    def backward_dw(self) -> None:
        """The linears' weight gradients, where `delay_wgrad_compute` keeps them from backward.

        Norms and the up-projection of the latents compute their weight gradients in backward.
        """
        for linear in reversed([m for m in self.children() if hasattr(m, "backward_dw")]):
            linear.backward_dw()

    def _compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query latent `[s, b, d_q]` (without q_lora_rank: x), latents `[s, b, n, g, l]`, RoPE key
        `[s, b, d_r]`, not yet rotated."""
        config, tp = self.config, self.shard.tp_size
        parts, norms = {}, {"c": self.kv_norm}
        if config.q_lora_rank is not None:
            parts["c_q"], norms["c_q"] = self.linear_q_down_proj(x)[0], self.q_norm
        ckv, _ = self.linear_kv_down_proj(x)
        widths = (config.kv_lora_rank // tp, config.qk_rope_head_dim // tp)
        # [s, b, d_c / tp], [s, b, d_r / tp]
        parts["c"], parts["k_rope"] = ckv.split(widths, dim=-1)
        # A norm of columns that lie on several ranks comes behind the gather.
        weights = {name: norm.weight for name, norm in norms.items() if not norm.is_local}
        for name in norms.keys() - weights.keys():
            parts[name] = norms[name](parts[name])
        parts, weights = self.parallel.gather_compressed(parts, weights)
        for name, weight in weights.items():
            parts[name] = norms[name].whole(parts[name], weight)
        return parts.get("c_q", x), self.parallel.own_latents(parts["c"]), parts["k_rope"]

    def _plan_tokens(self, q: Tensor, packed_seq_params: PackedSeqParams | None) -> TokenPlan:
        """Which tokens the tokens of `q` `[s, b, .]` attend to."""
        if packed_seq_params is not None and q.size(1) != 1:
            raise ValueError(f"packed sequences come in one row of tokens, not {q.size(1)}")
        cp = self.context.group
        return plan_tokens(q.size(0), cp.size(), cp.rank(), packed_seq_params, q.device)

    def _query_heads(self, q: Tensor) -> Tensor:
        """Query latent (or x) -> the core's heads `[s, b, h_c, e]`, not yet rotated."""
        linear = self.linear_q_proj if self.config.q_lora_rank is None else self.linear_q_up_proj
        q, _ = linear(q)
        if self.config.query_head_norm:
            q = self.query_head_norm(q)  # a rank has whole heads in either layout: all is local
        q = q.view(*q.shape[:-1], self.own_heads, self.config.qk_dim)  # [s, b, h / tp, e]
        return self.parallel.exchange_queries(q)

    def _assemble(
        self, q: Tensor, latents: Tensor, k_rope: Tensor, *angles: Tensor
    ) -> tuple[Tensor, ...]:
        """Query, key and, if materialized, value; if absorbed, the values are the latents."""
        own, keys = angles[:2], angles[2:]
        if not self.config.absorbed:
            weight = self.linear_kv_up_proj.weight
            return materialized_qkv(q, latents, k_rope, weight, own, keys)
        query = self.latent_functions.rotate_absorb(q, self._up_projections[0], *own)
        return query, self.latent_functions.join_keys(latents, k_rope, *keys)

    @property
    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK `[n, h_c, d_h, l]`, W_UV `[n, h_c, d_v, l]`."""
        return split_up_projection(self.linear_kv_up_proj.weight, self.config.qk_nope_head_dim)

    def _query_rebuilt(
        self,
        query: Tensor,
        q: Tensor,
        angles: tuple[Tensor, Tensor],
        plan: TokenPlan,
        group: OffloadGroup,
    ) -> AbstractContextManager:
        """A context in which the absorbed core saves how to rebuild `query`, not `query` itself."""
        config = self.config
        # torch's core is called for every span, and each call would rebuild the whole query.
        backend = resolve_core_backend(config.core_backend, config.transformer_impl)
        many_calls = backend == "torch" and len(plan.spans) > 2
        if many_calls or not self.rebuilds_query:
            return nullcontext()
        w_uk = self._up_projections[0].detach()
        kept = group.kept(q)
        return rebuilt_in_backward(
            query, lambda: self.latent_functions.rotate_absorb(kept(), w_uk, *angles), group
        )

    def _attend(
        self,
        qkv: tuple[Tensor, ...],
        latents: Tensor,
        attention_mask: Tensor | None,
        plan: TokenPlan,
    ) -> Tensor:
        """The core's output `[s, b, n * h_c * (l or d_v)]`."""
        query, key, *value = qkv
        value = value[0] if value else latents.flatten(2, 3)
        if self.checkpoint_core_attention and self.training:
            return self._checkpointed_attention_forward(
                query, key, value, attention_mask, core_attention_extra_kwargs={"plan": plan}
            )
        return self._run_core_attention(query, key, value, attention_mask, plan=plan)

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: None = None,
        *,
        plan: TokenPlan,
    ) -> Tensor:
        """The core alone, which recomputation repeats: `[s, b, n * h_c * (l or d_v)]`.

        Megatron's activation checkpointing passes `packed_seq_params=None`; the plan already knows
        the documents.
        """
        return self.core_attention(query, key, value, attention_mask, plan=plan)

    def _combine_branches(self, z: Tensor) -> Tensor:
        """N^-1/2 times the sum of the core's output over branches: own heads
        `[s, b, h / tp * d_v]`."""
        config, shard = self.config, self.shard
        z = z.view(*z.shape[:2], shard.branches, shard.heads, -1)
        if config.absorbed:
            w_uv = self._up_projections[1]
            out = self.latent_functions.sum_branches(z, w_uv, config.branch_scale)
        else:
            out = z.sum(2) * config.branch_scale
        return self.parallel.reduce_branches(out).flatten(2)

    def _rotary_angles(self, plan: TokenPlan, offset: int) -> tuple[Tensor, ...]:
        """cos and sin of the queries `[s, d_r / 2]` and of the keys `[t, d_r / 2]`, float32."""
        tables = rotary_tables(self.config).cos_sin(plan.tokens, offset)
        if not self.rotates:
            tables = unrotated(*tables)
        if plan.positions is None:
            return *tables, *tables
        places = (plan.positions, plan.key_positions)
        return tuple(table[place] for place in places for table in tables)

    def get_query_key_value_tensors(self, *args, **kwargs):
        """Unused: `_compress`, `_query_heads` and `_assemble` take its place."""
        raise NotImplementedError

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Megatron's, with the kv down-projection stored as latent rows, then RoPE rows."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        key = f"{prefix}linear_kv_down_proj.weight"
        if self.shard.tp_size > 1:
            placed = placements(self.config)["linear_kv_down_proj"]
            boxes = placed.boxes(training_share(self.config, self.shard))
            blocks = tuple(rows.stop - rows.start for (rows,) in boxes if rows.stop > rows.start)
            sharded[key] = split_rows_factory(sharded[key], blocks, sharded_offsets)
        return sharded
