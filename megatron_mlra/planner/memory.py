"""Memory of one GPU of a training run: weights, gradients, optimizer, activations.

Letters of cost/flops.py; `e` bytes per number (2 in bfloat16). Activations are the tensors that
torch saves for backward. There are two implementations: `local`, the torch layers on a CPU, with
which tests/distributed/test_planner_memory.py compares the counts; and `transformer_engine`, the
fused layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.layout import Layout
from megatron_mlra.sharding.partition import LatentShard

GIB, MIB = 2**30, 2**20
FUSED = "transformer_engine"


def size_unit(most: float) -> tuple[int, str]:
    """(Bytes of a unit, its name) in which to tell memory of `most` bytes at most."""
    return (GIB, "GiB") if most >= GIB else (MIB, "MiB")


def time_unit(longest: float) -> tuple[float, str]:
    """(Seconds of a unit, its name) in which to tell times of `longest` seconds at most."""
    return (1.0, "s") if longest >= 0.1 else (1e-3, "ms")


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter: bfloat16 with float32 gradients and main weights, or all float32."""

    weight: int = 2
    gradient: int = 4
    main: int = 4
    """The float32 copy of a weight; 0 if the weight itself is float32."""
    moments: int = 8
    """Adam's two moments."""

    @classmethod
    def of(cls, half: bool) -> Precision:
        """The precision with 16-bit weights, or with float32 weights."""
        return cls() if half else cls(weight=4, main=0)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    parameters: int
    """Number of parameters on that GPU (not bytes)."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    """Additional bytes while a micro-batch runs: logits and their gradient or, where more, what the
    layer holds that is computed again."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


def rank_parameters(shape: ModelDescription, layout: Layout, stage: int = 0) -> tuple[int, int]:
    """(Parameters outside experts, parameters of experts) of one rank of a pipeline stage."""
    p, tp, n = parameters(shape), layout.tp, shape.num_layers
    attention = sum(p.attention.values())
    replicated = 0
    if shape.attention == "gqa":
        kv = 2 * shape.num_query_groups * shape.head_dim * shape.hidden_size
        own = -(-shape.num_query_groups // tp) * 2 * shape.head_dim * shape.hidden_size
        attention += tp * own - kv
        replicated = sum(p.attention_norms.values())
    elif shape.attention != "mlra":
        replicated = sum(p.attention_norms.values())
    else:
        attention += sum(p.attention_norms.values())
    per_layer = attention // tp + replicated + p.layer_norms
    first, count = stage * n // layout.pp, n // layout.pp
    experts_of_layer = 0
    if shape.num_experts:
        matrices = 3 if shape.swiglu else 2
        expert = matrices * shape.hidden_size * shape.moe_ffn_hidden_size
        experts_of_layer = shape.num_experts // layout.ep * (expert // tp)
        shared = matrices * shape.hidden_size * shape.moe_shared_expert_intermediate_size // tp
        router = shape.hidden_size * shape.num_experts
    dense = experts = 0
    for is_moe in _moe_layers(shape)[first : first + count]:
        dense += per_layer + ((shared + router) if is_moe else p.mlp // tp)
        experts += experts_of_layer if is_moe else 0
    if stage == 0:
        dense += p.embedding // tp
    if stage == layout.pp - 1:
        dense += p.final_norm + p.output_layer // tp
        if shape.tie_embeddings and layout.pp > 1:
            dense += p.embedding // tp
    return dense, experts


def attention_activations(
    shape: ModelDescription, layout: Layout, implementation: str, e: int
) -> dict[str, float]:
    """Bytes per token of each tensor that one layer's attention saves for backward."""
    d, h, tp = shape.hidden_size, shape.num_attention_heads, layout.tp
    local, full = implementation == "local", not layout.sequence_parallel or tp == 1
    drop = layout.recompute.split("+")
    if shape.attention != "mlra":
        return _baseline_items(shape, layout, local, e, 1.0 if full else 1 / tp)
    shard = LatentShard.plan(shape, tp, 0, layout.tp_layout)
    n, heads, groups, l = shard.branches, shard.heads, shard.groups, shape.latent_dim
    d_h, d_r, d_v = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    # torch's norm saves its input and its result in float32, the fused norm its input unchanged.
    norm = 2 * 4 if local else e
    items: dict[str, float] = {"input": e * d}
    if shape.q_lora_rank:
        items["q_norm"] = norm * shape.q_lora_rank / tp
        items["q_latent"] = e * shape.q_lora_rank
    items["kv_norm"] = norm * shape.kv_lora_rank / tp
    if shape.query_head_norm:
        items["query_head_norm"] = norm * h * (d_h + d_r) / tp
    latents = e * n * groups * l
    query, core_key = e * n * heads * (l + d_r), e * n * groups * (l + d_r)
    value_dim = l
    items["q"] = e * heads * (d_h + d_r)
    if shape.absorbed:
        items["query"] = query if layout.keep_absorbed_query else 0.0
        items["key"] = core_key
        items["latents"] = latents
    else:
        value_dim = d_v
        items["q"] = 0.0
        items["latents"] = latents
        items["query"] = items["key"] = e * n * heads * (d_h + d_r)
        items["value"] = e * n * heads * d_v
    width = max(l + d_r if shape.absorbed else d_h + d_r, value_dim)
    if local:
        # torch's CPU kernel needs one head dim for query, key and value, and one key and value head
        # per query head.
        items["core"] = e * n * heads * width + 4 * n * heads
        repeated = e * n * heads * width
        if groups < heads:
            items["key"] = repeated
        items["value"] = repeated
        items["z"] = e * n * heads * value_dim if shape.absorbed else 0.0
    else:
        items["core"] = e * n * heads * value_dim + 4 * n * heads
    items["output"] = e * h * d_v / tp
    if shape.output_gate:
        items["gate"] = (4 + 2 * e) * h * d_v / tp
    items = _without(items, drop, shape, local, core_key, latents)
    # Context parallelism gathers latents: keys and values are of the whole sequence.
    return {
        name: size * (layout.cp if name in ("key", "value", "latents") else 1)
        for name, size in items.items()
    }


def _without(items, drop, shape, local, core_key, latents) -> dict[str, float]:
    """The saved tensors when backward recomputes the core, the up-projections, or both."""
    if "core" in drop:
        items["core"] = 0.0
        if local:
            items["key"], items["value"] = core_key, 0.0
            if not shape.absorbed:
                items["key"] = items["query"]
    if "up_proj" in drop:
        items["q"] = items["query"] = items["query_head_norm"] = 0.0
        if not (local and "core" not in drop):
            items["key"] = 0.0
            items["value"] = 0.0
        items["latents"] = latents
    return items


def _baseline_items(
    shape: ModelDescription, layout: Layout, local: bool, e: int, share: float
) -> dict[str, float]:
    d, tp, c = shape.hidden_size, layout.tp, shape.head_dim
    heads = shape.num_attention_heads / tp
    groups = max(1.0, (shape.num_query_groups or shape.num_attention_heads) / tp)
    if shape.attention in ("mfa", "tpa"):
        groups = 1.0 if shape.attention == "mfa" else heads
    items: dict[str, float] = {"input": e * d * share}
    items["query"], items["key"] = e * heads * c, e * groups * c
    items["value"] = e * groups * c
    if local:
        # Megatron's torch core saves the softmax in float32 and its copy in e bytes.
        items["key"] = items["value"] = e * heads * c
        items["core"] = (4 + e) * heads * shape.seq_length
    else:
        items["core"] = e * heads * c + 4 * heads
    if shape.attention == "mfa":
        items["q_latent"] = (2 * 4 / tp + e) * (shape.q_lora_rank or 0)
    if "core" in layout.recompute:
        items["core"] = 0.0
    items["output"] = e * heads * c if local or "core" in layout.recompute else 0.0
    if shape.output_gate:
        items["gate"] = (4 + 2 * e) * heads * c
    return items


def layer_activations(
    shape: ModelDescription, layout: Layout, implementation: str, e: int, moe: bool = False
) -> float:
    """Bytes per token that one layer saves for backward with `layout.recompute`."""
    d, tp = shape.hidden_size, layout.tp
    share = layout.sequence_share
    if layout.recompute == "full":
        return e * d * share
    local = implementation == "local"
    norm = (2 * 4 if local else e) * d * share
    products = (5 if local else 3) if shape.swiglu else 2
    if moe:
        routed = shape.moe_router_topk * (e * d + products * e * shape.moe_ffn_hidden_size / tp)
        shared = products * e * shape.moe_shared_expert_intermediate_size / tp
        mlp = e * d * share + routed + shared + 4 * shape.num_experts * share
    else:
        mlp = e * d * share + products * e * shape.ffn_hidden_size / tp
    attention = sum(attention_activations(shape, layout, implementation, e).values())
    return 2 * norm + attention + mlp


def output_activations(
    shape: ModelDescription, layout: Layout, implementation: str, e: int
) -> float:
    """Saved bytes per token of the final norm, the output layer's input and the softmax."""
    norm = (2 * 4 if implementation == "local" else e) * shape.hidden_size
    kept = (norm + e * shape.hidden_size) * layout.sequence_share
    return kept + 4 * shape.embedding_rows / layout.tp


def _moe_layers(shape: ModelDescription) -> list[bool]:
    return [shape.is_moe(layer) for layer in range(shape.num_layers)]


def optimizer_bytes(dense: int, experts: int, layout: Layout, half: bool = True) -> int:
    """Bytes of main weights and Adam's moments, which the distributed optimizer divides among
    replicas."""
    precision = Precision.of(half)
    each = precision.main + precision.moments
    if not layout.distributed_optimizer:
        return each * (dense + experts)
    replicas = layout.dp * layout.cp
    return int(each * (dense / replicas + experts / max(1, replicas // layout.ep)))


def memory(shape: ModelDescription, layout: Layout, half: bool = True) -> Memory:
    """Memory of the fullest pipeline stage: the first has most micro-batches in flight, the last
    has the logits.

    Args:
        half: 16-bit weights; else float32.
    """
    stages = (_stage_memory(shape, layout, stage, half) for stage in {0, layout.pp - 1})
    return max(stages, key=lambda m: m.total)


def _stage_memory(shape: ModelDescription, layout: Layout, stage: int, half: bool) -> Memory:
    e, precision = 2 if half else 4, Precision.of(half)
    dense, experts = rank_parameters(shape, layout, stage)
    pp, vpp = layout.pp, layout.vpp
    tokens = layout.micro_batch * shape.seq_length / layout.cp
    count = shape.num_layers // pp
    # Micro-batches whose activations a stage holds in a 1F1B schedule, in units of the whole stage.
    in_flight = float(pp - stage)
    if vpp > 1:
        in_flight = pp + (pp - 1) / vpp - stage * (vpp - 1) / vpp
    kinds = _moe_layers(shape)[stage * count : (stage + 1) * count]
    layers = sum(layer_activations(shape, layout, FUSED, e, moe) for moe in kinds)
    activations = tokens * layers * in_flight
    output = working = 0.0
    if stage == pp - 1:
        output = tokens * output_activations(shape, layout, FUSED, e)
        working = tokens * (4 + e) * shape.embedding_rows / layout.tp
    if layout.recompute == "full":
        whole = replace(layout, recompute="none")
        again = tokens * layer_activations(shape, whole, FUSED, e, kinds[-1])
        # Backward frees the logits before it computes a layer again.
        working = max(working, again - output)
    return Memory(
        parameters=dense + experts,
        weights=(dense + experts) * precision.weight,
        gradients=(dense + experts) * precision.gradient,
        optimizer=optimizer_bytes(dense, experts, layout, half),
        activations=int(activations + output),
        working=int(working),
    )
