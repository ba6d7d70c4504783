"""A rank's weights, cut from a checkpoint's global tensors one at a time and prepared once.

Letters: h_q and h_o heads whose query and output projections a rank holds, h_c heads, n branches
and g head groups of the rank's core, l latent dim, e = d_h + d_r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import (
    EMBEDDING,
    FINAL_NORM,
    MULTI_TOKEN_LAYER,
    OUTPUT,
    layer_prefix,
    multi_token_prefix,
)
from megatron_mlra.inference.mlp import DenseWeights, ExpertWeights, load_mlp
from megatron_mlra.inference.parallel import HeadShard, TensorParallel, check_parallel
from megatron_mlra.sharding.placement import Share, placements, serving_share


@dataclass
class LatentWeights:
    """Attention of one layer of MLA, GLA or MLRA."""

    down: Tensor
    """`[(d_q +) n g l + d_r, d]`: query latent (if any), own latents, RoPE key, in one GEMM."""
    q_norm: Tensor | None
    """`[d_q]`, times `q_scale`."""
    q_up: Tensor
    """`[h_q e, d_q]`, or `[h_q e, d]` without q_lora_rank."""
    head_norm: Tensor | None
    """`[h_q, e]`, the norm weights of the query heads."""
    kv_norm: Tensor
    """`[n g, l]`; `kv_scale` is applied where the cache is written."""
    w_uk: Tensor
    """`[h_c, d_h, n l]`: one product absorbs a head's query for all its branches."""
    w_uv: Tensor
    """`[h_c, n l, d_v]`, times N^-1/2: the sum over branches is part of the product."""
    merged: slice
    """The core's heads whose outputs the rank gets; decoding reads w_uv of these heads alone."""
    gate: Tensor | None
    """`[h_o d_v, d]`."""
    proj: Tensor
    """`[d, h_o d_v]`."""


@dataclass
class GroupedWeights:
    """Attention of one layer of MHA, MQA or GQA."""

    qkv: Tensor
    """`[(q heads + kv heads + kv heads) dim, d]`: queries, keys, values."""
    gate: Tensor | None
    """`[h_o dim, d]`."""
    proj: Tensor
    """`[d, h_o dim]`."""


@dataclass
class LayerWeights:
    """One transformer layer."""

    input_norm: Tensor
    attention: LatentWeights | GroupedWeights
    mlp_norm: Tensor
    mlp: DenseWeights | ExpertWeights


@dataclass
class ModelWeights:
    """All weights of one rank."""

    embedding: Tensor
    """`[vocab, d]`, whole on every rank, so that a step starts without a collective."""
    layers: list[LayerWeights]
    final_norm: Tensor
    output: Tensor
    """`[rows, d]`, rows = ceil(vocab / world); a view of the embedding where that is possible."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that a decoding step reads in full, once each; all experts count as read."""
        return [self.final_norm, self.output, *_tensors(self.layers)]

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that one decoding step reads; the embedding's rows are left out."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


@dataclass
class DraftWeights(ModelWeights):
    """The weights of a layer of multi-token prediction, as a model of one layer."""

    embedding_norm: Tensor
    states_norm: Tensor
    join: Tensor
    """`[d, 2 d]`: columns for the normed embedding, then for the normed states."""


def _tensors(part: object) -> Iterator[Tensor]:
    """The tensors that a step reads in a list or dataclass, nested ones included."""
    if isinstance(part, LatentWeights):
        yield part.w_uv[part.merged]
        yield from _tensors([x for name, x in vars(part).items() if name not in ("w_uv", "merged")])
    elif isinstance(part, Tensor):
        yield part
    elif part is not None:
        for inner in part if isinstance(part, list) else vars(part).values():
            yield from _tensors(inner)


def load_weights(
    model: ModelDescription,
    read: Callable[[str], Tensor],
    parallel: TensorParallel,
    weight_mode: str,
    dtype: torch.dtype,
    device: str | torch.device,
    progress: Callable[[range], object] = iter,
) -> ModelWeights:
    """Cut and prepare one rank's weights.

    Args:
        read: canonical name -> global tensor (`CheckpointFolder.tensor`, or a dict's `get`).
        parallel: the rank and the sizes of the groups.
        weight_mode: see `backends.WEIGHT_MODES`; without meaning for 'gqa'.
        progress: wraps the range of layers (tqdm).

    Raises:
        ValueError: the model cannot be cut over these ranks; the message names sizes that work.
    """
    check_parallel(model, parallel.size, parallel.context)
    world, world_rank = parallel.world, parallel.world_rank

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype).contiguous()

    layers = [
        _layer(model, i, partial(_under, read, layer_prefix(i)), parallel, weight_mode, place)
        for i in progress(range(model.num_layers))
    ]
    embedding = place(read(EMBEDDING))
    output = embedding if model.tie_embeddings else place(read(OUTPUT))
    rows = -(-model.vocab_size // world)
    output = output[world_rank * rows : (world_rank + 1) * rows]
    if output.size(0) < rows:
        output = torch.cat((output, output.new_zeros(rows - output.size(0), output.size(1))))
    if not model.tie_embeddings:
        output = output.clone()
    return ModelWeights(embedding, layers, place(read(FINAL_NORM)), output)


def load_draft(
    model: ModelDescription,
    read: Callable[[str], Tensor],
    parallel: TensorParallel,
    weight_mode: str,
    like: ModelWeights,
) -> DraftWeights:
    """Cut and prepare one rank's part of the first layer of multi-token prediction.

    Args:
        read: canonical name -> global tensor.
        like: the decoder's weights; embedding and output layer are shared.
    """

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(like.embedding).contiguous()

    own = partial(_under, read, multi_token_prefix(0))
    inner = partial(_under, own, MULTI_TOKEN_LAYER)
    return DraftWeights(
        embedding=like.embedding,
        layers=[_layer(model, model.num_layers - 1, inner, parallel, weight_mode, place)],
        final_norm=place(own("final_layernorm.weight")),
        output=like.output,
        embedding_norm=place(own("enorm.weight")),
        states_norm=place(own("hnorm.weight")),
        join=place(own("eh_proj.weight")),
    )


def _under(read: Callable[[str], Tensor], prefix: str, name: str) -> Tensor:
    return read(prefix + name)


def _layer(
    model: ModelDescription,
    index: int,
    read: Callable[[str], Tensor],
    parallel: TensorParallel,
    weight_mode: str,
    place: Callable,
) -> LayerWeights:
    """A layer of the kind of decoder layer `index`; `read` takes names behind the prefix."""

    def get(name: str) -> Tensor:
        return read(f"{name}.weight")

    if model.attention == "gqa":
        attention = _grouped(model, get, parallel, place)
    else:
        shard = HeadShard.plan(
            model, parallel.size, parallel.rank, weight_mode,
            parallel.context, parallel.context_rank,
        )  # fmt: skip
        attention = _latent(model, get, shard, place)
    return LayerWeights(
        input_norm=place(get("input_layernorm")),
        attention=attention,
        mlp_norm=place(get("pre_mlp_layernorm")),
        mlp=load_mlp(model, index, read, parallel.world, parallel.world_rank, place),
    )


def _latent(
    model: ModelDescription, get: Callable[[str], Tensor], shard: HeadShard, place: Callable
) -> LatentWeights:
    core, nope = shard.core, model.qk_nope_head_dim
    queries = serving_share(model, core, shard.query_start, shard.query_heads)
    outputs = serving_share(model, core, shard.own_start, shard.own_heads)
    placed = placements(model)

    def own(name: str, share: Share = queries) -> Tensor:
        whole = get(f"self_attention.{name}")
        parts = [whole[box] for box in placed[name].boxes(share)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    down, q_norm = [own("linear_kv_down_proj")], None
    if model.q_lora_rank is None:
        q_up = own("linear_q_proj")
    else:
        down.insert(0, own("linear_q_down_proj"))
        q_norm = place(own("q_norm").float() * model.q_scale)
        q_up = own("linear_q_up_proj")
    up = own("linear_kv_up_proj")  # [n, h_c, d_h + d_v, l]
    w_uk, w_uv = up[:, :, :nope], up[:, :, nope:]
    return LatentWeights(
        down=place(torch.cat(down)),
        q_norm=q_norm,
        q_up=place(q_up),
        head_norm=place(own("query_head_norm").unflatten(0, (shard.query_heads, -1)))
        if model.query_head_norm
        else None,
        kv_norm=place(own("kv_norm").unflatten(0, (-1, model.latent_dim))),
        w_uk=place(w_uk.permute(1, 2, 0, 3).flatten(2)),
        w_uv=place(w_uv.permute(1, 0, 3, 2).flatten(1, 2).float() * model.branch_scale),
        merged=shard.merged,
        gate=place(own("linear_gate_proj", outputs)) if model.output_gate else None,
        proj=place(own("linear_proj", outputs)),
    )


def _grouped(
    model: ModelDescription, get: Callable[[str], Tensor], parallel: TensorParallel, place: Callable
) -> GroupedWeights:
    g, dim = model.num_query_groups, model.head_dim
    per_group = model.num_attention_heads // g
    gates = per_group if model.output_gate else 0
    heads = get("self_attention.linear_qkv").unflatten(0, (g, per_group + gates + 2, dim))
    q, gate, k, v = heads.split((per_group, gates, 1, 1), dim=1)
    rank, own = parallel.rank, model.num_attention_heads // parallel.size
    queries = slice(rank * own, (rank + 1) * own)
    kv = slice(rank * own // per_group, -(-(rank + 1) * own // per_group))
    merged = own // parallel.context
    start = rank * own + parallel.context_rank * merged
    outputs = slice(start, start + merged)
    rows = (q.flatten(0, 1)[queries], k.flatten(0, 1)[kv], v.flatten(0, 1)[kv])
    proj = get("self_attention.linear_proj")
    return GroupedWeights(
        qkv=place(torch.cat(rows).flatten(0, 1)),
        gate=place(gate.flatten(0, 1)[outputs].flatten(0, 1)) if gates else None,
        proj=place(proj[:, outputs.start * dim : outputs.stop * dim]),
    )
