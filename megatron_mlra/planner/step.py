"""Predicted time of a training step from vendors' rates. Letters of cost/flops.py.

A step is m micro-batches through pp stages (1F1B or interleaved), then gradients and optimizer:

    (m + (pp - 1) / vpp) (compute + elementwise + tensor + context + expert parallel + pipeline)
    + the data-parallel time that a micro-batch does not hide + optimizer
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.cost.traffic import cp_communication, tp_communication
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.gpus import GPU, Assumptions
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import layer_activations, output_activations, rank_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends per step, by kind of parallelism."""

    tensor: float
    context: float
    pipeline: float
    data: float
    expert: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """Predicted seconds of one training step on the slowest stage, by cause."""

    compute: float
    elementwise: float
    tensor: float
    context: float
    pipeline: float
    expert: float
    bubble: float
    data: float
    """Data-parallel seconds that computation does not hide."""
    optimizer: float
    traffic: Traffic
    tokens: int
    """Tokens of the whole step."""
    gpus: int
    model_flops: float
    """FLOPs of the whole step, all GPUs together."""
    peak: float
    """FLOP/s of all GPUs in the precision of the matrix products."""

    @property
    def seconds(self) -> float:
        parts = (self.compute, self.elementwise, self.tensor, self.context, self.pipeline)
        return sum(parts) + self.expert + self.bubble + self.data + self.optimizer

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: model FLOPs / (seconds * peak)."""
        return self.model_flops / (self.seconds * self.peak)

    @property
    def tokens_per_gpu_second(self) -> float:
        return self.tokens / self.seconds / self.gpus

    def to_json(self) -> dict:
        return asdict(self) | {
            "seconds": self.seconds,
            "mfu": self.mfu,
            "tokens_per_gpu_second": self.tokens_per_gpu_second,
        }


def core_flops_per_token(shape: ModelDescription, hardware: bool) -> float:
    """FLOPs per token of the score and value products of all layers, forward and backward."""
    at = train_flops_per_token
    name = "hardware" if hardware else "model"
    s = shape.seq_length
    # Only these products depend on the length: two lengths give the slope in (s + 1) / 2 keys.
    slope = getattr(at(shape, 3), name) - getattr(at(shape, 1), name)
    return slope * (s + 1) / 2


def micro_batch_seconds(
    shape: ModelDescription, layout: Layout, gpu: GPU, assume: Assumptions, fp8: bool
) -> tuple[float, float]:
    """(compute, elementwise) seconds of one micro-batch on the slowest stage, with backward."""
    tokens = layout.micro_batch * shape.seq_length / layout.cp
    flops = train_flops_per_token(shape)
    core = core_flops_per_token(shape, hardware=True)
    p = parameters(shape)
    output = 6.0 * p.embedding
    linear = flops.hardware - core - output
    again = 0.0
    if shape.attention == "mlra" and not shape.absorbed:
        # The materialized form expands keys and values of the whole sequence on each rank.
        linear += (layout.cp - 1) * 6.0 * shape.num_layers * p.attention["linear_kv_up_proj"]
    if layout.recompute == "full":
        again, core = linear / 3, core * 4 / 3
    elif layout.recompute != "none":
        if "core" in layout.recompute:
            core *= 4 / 3
        if "up_proj" in layout.recompute and shape.attention == "mlra":
            again = train_flops_per_token(shape, recompute="up_proj").hardware - flops.hardware
    # Flash-style backwards repeat the score product: 7 products instead of the counted 6.
    core *= 7 / 6
    peak = (gpu.fp8_tflops if fp8 else gpu.bf16_tflops) * 1e12 * assume.gemm
    own = shape.attention == "mlra" and shape.absorbed and shape.latent_dim <= 128
    own = own and shape.qk_rope_head_dim > 0
    share = assume.latent_core if own and gpu.name in ("h100", "h200") else assume.core
    core_peak = gpu.bf16_tflops * 1e12 * share
    stage = tokens / layout.tp / layout.pp
    output_peak = gpu.bf16_tflops * 1e12 * assume.gemm
    last = tokens / layout.tp * output / output_peak
    compute = stage * ((linear + again) / peak + core / core_peak)
    # The last stage also has the output layer. All stages wait for the slowest.
    compute += last
    saved = layer_activations(shape, replace(layout, recompute="none"), "transformer_engine", 2)
    moved = shape.num_layers / layout.pp * saved
    moved += output_activations(shape, layout, "transformer_engine", 2)
    passes = assume.passes * (4 / 3 if layout.recompute == "full" else 1)
    elementwise = tokens * moved * passes / (gpu.memory_gb_s * 1e9 * assume.bandwidth)
    return compute, elementwise


def traffic(shape: ModelDescription, layout: Layout, micro_batches: int) -> Traffic:
    """Bytes that one GPU sends per step: ring algorithms, bfloat16 activations and weights, float32
    gradients."""
    e, d, tp = 2, shape.hidden_size, layout.tp
    tokens = layout.micro_batch * shape.seq_length / layout.cp * micro_batches
    layers = shape.num_layers / layout.pp
    tensor = 0.0
    if tp > 1:
        attention = tp_communication(shape, tp, layout.tp_layout, layout.sequence_parallel)
        # The MLP: entry and exit, forward and backward; with sequence parallel the input again for
        # the weight gradient.
        mlp = (5 if layout.sequence_parallel else 4) * (tp - 1) / tp * d
        tensor = e * tokens * layers * (attention.wire_numbers + mlp)
        if layout.recompute == "full":
            tensor += e * tokens * layers * (attention.wire_numbers + mlp) / 3
    context = e * tokens * layers * context_numbers(shape, layout)
    pipeline = 0.0
    if layout.pp > 1:
        pipeline = 2 * e * tokens * d * layout.sequence_share * layout.vpp
    dense, experts = rank_parameters(shape, layout, 0)
    replicas = layout.dp * layout.cp
    data = (replicas - 1) / replicas * (4 + 2) * dense
    expert_replicas = max(1, replicas // layout.ep)
    data += (expert_replicas - 1) / expert_replicas * (4 + 2) * experts
    expert = 0.0
    if layout.ep > 1:
        moe = (shape.num_layers - shape.num_dense_layers) / layout.pp
        share = (layout.ep - 1) / layout.ep * layout.sequence_share
        expert = 4 * e * tokens * moe * shape.moe_router_topk * d * share
    return Traffic(tensor, context, pipeline, data, expert)


def context_numbers(shape: ModelDescription, layout: Layout) -> float:
    """Numbers that a GPU sends to its context-parallel group, per own token and layer, forward and
    backward. MLRA gathers latents. Megatron's attention passes keys and values around a ring, in
    backward again and with their gradients."""
    cp, full = layout.cp, layout.recompute == "full"
    if shape.attention == "mlra":
        sent = cp_communication(shape, cp, layout.tp, layout.tp_layout)
        # Its numbers are per token of the whole sequence, which has `cp` times the rank's tokens.
        again = sum(c.wire_numbers(cp) for c in sent.forward) if full else 0.0
        return cp * (sent.wire_numbers + again)
    groups = max(1.0, (shape.num_query_groups or shape.num_attention_heads) / layout.tp)
    return (4 if full else 3) * (cp - 1) * 2 * groups * shape.head_dim


def predict(
    shape: ModelDescription,
    layout: Layout,
    global_batch: int,
    gpu: GPU,
    assume: Assumptions,
    fp8: bool = False,
) -> Step:
    """The predicted step of `global_batch` sequences."""
    m = global_batch // (layout.dp * layout.micro_batch)
    compute, elementwise = micro_batch_seconds(shape, layout, gpu, assume, fp8)
    sent = traffic(shape, layout, m)

    def seconds(amount: float, span: int) -> float:
        return amount / assume.sends(gpu, span)

    inner = layout.tp * layout.cp
    tensor = seconds(sent.tensor, layout.tp)
    context = seconds(sent.context, inner)
    expert = seconds(sent.expert, layout.tp * layout.ep)
    # Stages are the outermost cut: neighbouring stages are on other nodes once a node is full.
    pipeline = seconds(sent.pipeline, layout.gpus)
    data = seconds(sent.data, inner * layout.dp)
    busy = m * (compute + elementwise) + tensor + context + expert + pipeline
    bubble = busy / m * (layout.pp - 1) / layout.vpp
    hidden = assume.dp_overlap * busy / m
    dense, experts = rank_parameters(shape, layout, 0)
    replicas = layout.dp * layout.cp if layout.distributed_optimizer else 1
    own = dense / replicas + experts / max(1, replicas // layout.ep)
    # Bytes: main weights and moments read and written, gradient read, weight written.
    updated = own * (2 * 12 + 4 + 2) / (gpu.memory_gb_s * 1e9 * assume.bandwidth)
    tokens = global_batch * shape.seq_length
    return Step(
        compute=m * compute,
        elementwise=m * elementwise,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        expert=expert,
        bubble=bubble,
        data=max(0.0, data - hidden),
        optimizer=updated,
        traffic=sent,
        tokens=tokens,
        gpus=layout.gpus,
        model_flops=train_flops_per_token(shape).model * tokens,
        peak=layout.gpus * (gpu.fp8_tflops if fp8 else gpu.bf16_tflops) * 1e12,
    )
