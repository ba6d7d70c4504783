"""The decoder for inference: one forward for prompts and for decoding, over paged caches.

Letters: T tokens of a step, b sequences, q query tokens per sequence, d hidden size, h heads of the
rank's core, h_q and h_o heads whose query and output projections the rank holds, h_m heads whose
outputs the rank gets (h, or h / cp where tokens are cut over cp ranks), n g latent heads of the
rank, l latent dim, e = d_h + d_r.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.inference.backends.base import Ops
from megatron_mlra.inference.backends.products import Normed
from megatron_mlra.inference.cache import GroupedCache, LatentCache
from megatron_mlra.inference.mlp import DenseWeights, run_mlp
from megatron_mlra.inference.parallel import HeadShard, TensorParallel
from megatron_mlra.inference.reduction import Reduction
from megatron_mlra.inference.weights import (
    DraftWeights,
    GroupedWeights,
    LatentWeights,
    ModelWeights,
)
from megatron_mlra.maths.rope import rotary_tables, unrotated
from mlra_kernels.absorption import sum_branches
from mlra_kernels.prefill import (
    EXPANDED_KEYS,
    grouped_states,
    keys_at_once,
    latent_states,
    merged,
    merged_all,
    prefill_grouped,
    prefill_latent,
    runs_absorbed,
)
from mlra_kernels.prompts import Bundle


@dataclass
class Fresh:
    """The tokens of a prefill step where tokens are cut over ranks. Every rank has all of them.

    Each rank writes the step's tokens to a scratch layer and attends to them causally with its h_m
    heads, so no rank sends them. With all h heads the rank attends to the earlier tokens in its own
    cache.
    """

    pages: int
    """Pages of the scratch layer."""
    slots: Tensor
    """`[T]` int64 slots in the scratch layer."""
    history: tuple[Bundle, ...]
    """The earlier tokens that this rank caches."""
    has_history: bool
    """Whether any rank caches earlier tokens."""


@dataclass
class Step:
    """The tokens of one forward, and where their cache rows are written and read."""

    tokens: Tensor
    """`[T]` int64."""
    positions: Tensor
    """`[T]` int64."""
    slots: Tensor
    """`[T]` int64: page * page_size + offset; a token with a negative slot is not cached."""
    bundles: tuple[Bundle, ...] = ()
    """Prefill: the rows and the keys of each kernel launch, for all rows. Empty for decoding."""
    fresh: Fresh | None = None
    """Prefill where tokens are cut over ranks; the keys of `bundles` are the step's own then."""
    block_table: Tensor | None = None
    """Decoding: `[b, max_pages]` int32."""
    lengths: Tensor | None = None
    """Decoding: `[b]` int32 tokens in this rank's cache, new ones included; 0 for padding rows.
    Each sequence has q = T / b rows; row i sees all tokens but the last q - 1 - i."""
    metadata: object = None
    """Decoding: the backend's schedule (`InferenceModel.decode_schedule`)."""
    behind: Tensor | None = None
    """For a `DraftModel`: the decoder's states `[T, d]`, each of the token before."""


class InferenceModel:
    """A rank's part of a decoder.

    Args:
        model: sizes and options of the decoder.
        weights: this rank's, see `load_weights`.
        cache: this rank's cache of all layers.
        ops: the backend.
        max_positions: tokens of the longest sequence.
        parallel: this rank's collectives; None: a world of one rank.
        shard: this rank's heads (latent attention); None: planned from `parallel`.
        table_rows: rows of the RoPE tables; None: `max_positions`.
        reduction: how layers sum over ranks; None: by collectives.
    """

    def __init__(
        self,
        model: ModelDescription,
        weights: ModelWeights,
        cache: LatentCache | GroupedCache,
        ops: Ops,
        max_positions: int,
        parallel: TensorParallel | None = None,
        shard: HeadShard | None = None,
        table_rows: int | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self.model, self.weights, self.cache, self.ops = model, weights, cache, ops
        self.parallel = parallel or TensorParallel()
        if shard is None and model.attention == "mlra":
            shard = HeadShard.plan(
                model, self.parallel.size, self.parallel.rank, "replicated",
                self.parallel.context, self.parallel.context_rank,
            )  # fmt: skip
        self.shard = shard
        self.reduction = reduction or Reduction()
        self.max_positions = max_positions
        self.static_decoding = ops.name == "mlra_kernels"
        """Whether CUDA graphs may capture decoding steps. Where not, experts run as in prefill,
        which is several times faster on a CPU."""
        self.device = weights.embedding.device
        self.first_layer = 0
        """Layer of the cache that belongs to this model's first layer."""
        self.tables = rotary_tables(model, table_rows or max_positions, self.device)
        self.still = unrotated(*self.tables) if model.no_rope_pattern else self.tables
        """The tables of layers without RoPE."""

    @torch.inference_mode()
    def forward(self, step: Step, rows: Tensor | None = None) -> Tensor:
        """Logits of a step, float32.

        Args:
            step: prefill (with bundles) or decoding.
            rows: `[R]` int64, the rows to compute logits of; None: all.

        Returns:
            `[R, vocab_size]`.
        """
        hidden = self.states(step)
        return self.logits(hidden if rows is None else hidden[rows])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `states` `[R, d]` -> logits `[R, vocab_size]` float32."""
        logits = self.parallel.gather_vocabulary(self.ops.linear(hidden, self.weights.output))
        return logits[:, : self.model.vocab_size].float()

    @property
    def prompt_keys(self) -> int:
        """Keys that one prefill launch takes at most."""
        if self.model.attention == "gqa":
            return EXPANDED_KEYS
        return keys_at_once(self.model.qk_nope_head_dim, self.model.latent_dim)

    def decode_schedule(self, lengths: Tensor, q: int = 1) -> object:
        """The backend's schedule of a decoding step for `lengths` `[b]` int32 and `q` tokens per
        sequence; None where the backend needs no schedule."""
        if self.model.attention == "gqa":
            return None
        core = self.shard.core
        return self.ops.schedule(
            lengths,
            q_len=q,
            num_latents=core.branches * core.groups,
            heads_per_latent=core.heads // core.groups,
            latent_dim=self.model.latent_dim,
            cache_dtype=self.cache.data.dtype,
            page_size=self.cache.page_size,
        )

    @torch.inference_mode()
    def states(self, step: Step) -> Tensor:
        """The states behind the last norm, `[T, d]`."""
        ops, layers, eps = self.ops, self.weights.layers, self.model.layernorm_epsilon
        attend = self._latent
        if self.model.attention == "gqa":
            attend, step = self._grouped, _one_row_each(step)
        static = self.static_decoding and not step.bundles
        x = self._inputs(step)
        normed = ops.normed(x, layers[0].input_norm, eps)
        following = [layer.input_norm for layer in layers[1:]] + [self.weights.final_norm]
        for i, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            out = attend(self.first_layer + i, layer.attention, normed, step)
            x, normed = self._add_product(out, layer.attention.proj, x, layer.mlp_norm)
            if isinstance(layer.mlp, DenseWeights):
                hidden = ops.swiglu(normed, layer.mlp.fc1)
                x, normed = self._add_product(hidden, layer.mlp.fc2, x, next_norm)
            else:
                out = run_mlp(ops.plain(normed), layer.mlp, self.model, ops, static)
                x, normed = self._sum_over_ranks(out, x, next_norm)
        return ops.plain(normed)

    def _add_product(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor
    ) -> tuple[Tensor, Normed]:
        """residual `[T, d]` plus all ranks' products x weight^T, and the norm of the sum."""
        if self.parallel.group is None or self.parallel.world == 1:
            return self.ops.linear_add_norm(x, weight, residual, norm, self.model.layernorm_epsilon)
        return self._sum_over_ranks(self.ops.linear(x, weight), residual, norm)

    def _sum_over_ranks(self, x: Tensor, residual: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of all ranks' x plus the residual, `[T, d]`, and the norm of that."""
        eps = self.model.layernorm_epsilon
        return self.reduction.add_rms_norm(self.ops, self.parallel, x, residual, norm, eps)

    def _inputs(self, step: Step) -> Tensor:
        """The first layer's input, `[T, d]`."""
        return self.weights.embedding[step.tokens]

    # -- MLA, GLA, MLRA ----------------------------------------------------------------------------

    def _latent(self, index: int, weights: LatentWeights, x: Normed, step: Step) -> Tensor:
        """`[T, d]` -> the core's gated output `[T, h_o d_v]`."""
        model, ops, eps = self.model, self.ops, self.model.layernorm_epsilon
        core, shard = self.shard.core, self.shard
        tables = self.tables if model.rotates(index) else self.still
        down = ops.linear(x, weights.down)
        c_q, kv = x, down
        if weights.q_norm is not None:
            c_q, kv = down.split((model.q_lora_rank, down.size(1) - model.q_lora_rank), dim=1)
            c_q = ops.normed(c_q, weights.q_norm, eps)
        head, nope = weights.q_up.size(0) // shard.query_heads, model.qk_nope_head_dim
        if weights.head_norm is None:
            q = ops.rotated_queries(c_q, weights.q_up, head, nope, tables, step.positions)
        else:
            q = ops.linear(c_q, weights.q_up).unflatten(1, (-1, head))  # [T, h_q, e]
            q = ops.norm_heads(q, weights.head_norm, eps)
            q = ops.rotate(q, nope, *tables, step.positions)
        q = self.parallel.gather_queries(q, core.heads // shard.query_heads)  # [T, h, e]

        layer = self.cache.layer(index)
        ops.append(kv, weights.kv_norm, tables, step, layer, model.kv_scale, eps)
        if step.fresh is not None:
            scratch = self.cache.scratch(step.fresh.pages)
            beside = replace(step, slots=step.fresh.slots)
            ops.append(kv, weights.kv_norm, tables, beside, scratch, model.kv_scale, eps)
            out = self._prefill_cut(q, scratch, layer, weights, step)
        elif step.bundles:
            out = prefill_latent(
                q,
                layer,
                step.bundles,
                w_uk=weights.w_uk,
                w_uv=weights.w_uv,
                rope_dim=model.qk_rope_head_dim,
                branches=core.branches,
                softmax_scale=model.softmax_scale,
            )
        else:
            out = self._decode_latent(q, layer, weights, step)
        parts = shard.merged_heads // shard.own_heads
        out = self.parallel.reduce_outputs(out, parts).flatten(1)  # [T, h_o d_v]
        return out if weights.gate is None else ops.gated(out, x, weights.gate)

    def _prefill_cut(self, q: Tensor, scratch, layer, weights: LatentWeights, step: Step) -> Tensor:
        """`[T, h, e]` -> `[T, h_m, d_v]`, summed over this rank's branches. Attention to the step's
        own tokens is merged with all ranks' attention to the earlier tokens."""
        model, shard, heads = self.model, self.shard, self.shard.merged
        w_uk, w_uv = weights.w_uk, weights.w_uv
        sizes = {
            "rope_dim": model.qk_rope_head_dim,
            "branches": shard.core.branches,
            "softmax_scale": model.softmax_scale,
        }
        state = latent_states(
            q[:, heads], scratch, step.bundles, w_uk=w_uk[heads], w_uv=w_uv[heads],
            groups=shard.merged_groups, **sizes,
        )  # fmt: skip
        if step.fresh.has_history:
            before = latent_states(q, layer, step.fresh.history, w_uk=w_uk, w_uv=w_uv, **sizes)
            state = merged(state, self._over_ranks(*before))
        if runs_absorbed(model.qk_nope_head_dim, model.latent_dim):
            return sum_branches(state[0], w_uv[heads])
        return state[0].sum(1)

    def _over_ranks(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Attention `[T, ..., h, w]` to this rank's tokens -> `[T, ..., h_m, w]` to all ranks'."""
        if self.parallel.context == 1:
            return out, lse
        return merged_all(*self.parallel.exchange_tokens(out, lse))

    def _decode_latent(self, q: Tensor, layer, weights: LatentWeights, step: Step) -> Tensor:
        """`[T, h, e]` -> `[T, h_m, d_v]`, summed over this rank's branches; T = b q."""
        core, l, nope = self.shard.core, self.model.latent_dim, self.model.qk_nope_head_dim
        n, g, h = core.branches, core.groups, core.heads
        b = step.lengths.size(0)
        head = self.ops.absorb_queries(q[..., :nope], weights.w_uk, n)  # [T, n, h, l]
        head = head.reshape(b, -1, n * g, h // g, l)
        q_rope = q[..., nope:].unflatten(0, (b, -1))
        z, lse = self.ops.decode(head, q_rope, layer, step, self.model.softmax_scale, n)
        z, _ = self._over_ranks(z.view(q.size(0), n, h, l), lse.view(q.size(0), n, h))
        return self.ops.sum_branches(z, weights.w_uv[self.shard.merged])

    # -- MHA, MQA, GQA -----------------------------------------------------------------------------

    def _grouped(self, index: int, weights: GroupedWeights, x: Normed, step: Step) -> Tensor:
        """`[T, d]` -> the core's gated output `[T, heads dim]`."""
        dim, parallel = self.model.head_dim, self.parallel
        own = weights.proj.size(1) // dim
        heads = own * parallel.context
        qkv = self.ops.linear(x, weights.qkv).unflatten(1, (-1, dim))
        kv = (qkv.size(1) - heads) // 2
        tables = self.tables if self.model.rotates(index) else self.still
        turned = self.ops.rotate(qkv[:, : heads + kv], 0, *tables, step.positions)
        q, k = turned[:, :heads], turned[:, heads:]
        layer = self.cache.layer(index)
        v = qkv[:, heads + kv :]
        self.ops.append_grouped(k, v, layer, step.slots)
        scale = self.model.softmax_scale
        if step.fresh is not None:
            scratch = self.cache.scratch(step.fresh.pages)
            self.ops.append_grouped(k, v, scratch, step.fresh.slots)
            merges = slice(parallel.context_rank * own, (parallel.context_rank + 1) * own)
            each = heads // kv
            groups = slice(merges.start // each, -(-merges.stop // each))
            state = grouped_states(q[:, merges], scratch, step.bundles, scale, groups)
            if step.fresh.has_history:
                before = grouped_states(q, layer, step.fresh.history, scale)
                state = merged(state, self._over_ranks(*before))
            out = state[0]
        elif step.bundles:
            out = prefill_grouped(q, layer, step.bundles, scale)
        else:
            out, _ = self._over_ranks(*self.ops.decode_grouped(q, layer, step, scale))
        out = out.flatten(1)
        return out if weights.gate is None else self.ops.gated(out, x, weights.gate)


class DraftModel(InferenceModel):
    """A decoder's layer of multi-token prediction, with its own layer in the decoder's cache.

    From the decoder's state of token i (`Step.behind`) and token i + 1, the layer computes the
    logits of token i + 2. Token i + 1 has position i here, the position of the state.
    """

    weights: DraftWeights

    def __init__(self, main: InferenceModel, weights: DraftWeights) -> None:
        rows = main.tables[0].size(0)
        super().__init__(
            main.model, weights, main.cache, main.ops, main.max_positions, main.parallel,
            main.shard, rows, main.reduction,
        )  # fmt: skip
        self.first_layer = main.model.num_layers

    def _inputs(self, step: Step) -> Tensor:
        weights, eps = self.weights, self.model.layernorm_epsilon
        embedded = self.ops.rms_norm(super()._inputs(step), weights.embedding_norm, eps)
        states = self.ops.rms_norm(step.behind, weights.states_norm, eps)
        return self.ops.linear(torch.cat((embedded, states), dim=1), weights.join)


def _one_row_each(step: Step) -> Step:
    """The decoding step with each row as a sequence: grouped kernels take one token each."""
    if step.bundles or step.lengths.size(0) == step.tokens.size(0):
        return step
    b = step.lengths.size(0)
    q = step.tokens.size(0) // b
    ahead = torch.arange(1 - q, 1, dtype=torch.int32, device=step.lengths.device)
    lengths = (step.lengths[:, None] + ahead).clamp(min=0).flatten()
    table = step.block_table[:, None].expand(-1, q, -1).flatten(0, 1)
    return replace(step, lengths=lengths, block_table=table)
