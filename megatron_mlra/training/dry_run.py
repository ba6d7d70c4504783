"""`--dry-run`: the plan of a launch, from the checked arguments. Nothing is started."""

from __future__ import annotations

import shlex
from argparse import Namespace

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mlra.command_line.parser import flag
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.planner.command import ENTRY, launcher
from megatron_mlra.planner.gpus import Assumptions, find
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import GIB, memory, size_unit, time_unit
from megatron_mlra.planner.search import Plan
from megatron_mlra.planner.step import predict
from megatron_mlra.sharding.partition import LatentShard
from megatron_mlra.training import batch_schedule

FLAGS = ("--dry-run", "--dry-run-gpu")
FOLDERS = ("--save", "--load")
UNEVEN = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Arguments under which pipeline stages have unequal numbers of layers, which the planner does not
know."""
MOST_RANKS = 16
"""Most ranks in the shard map. Of more tensor-parallel ranks, those in the middle are left out."""


def describe(
    args: Namespace, config: TransformerConfig, shape: ModelDescription, argv: list[str]
) -> list[str]:
    """The plan, the shard map of one layer and the command, as lines.

    Args:
        args: parsed and validated, for the world size of the launch.
        config: the configuration of the model's transformer.
        shape: the model's sizes, for the plan.
        argv: the command line after the script's name.
    """
    return [*_plan(args, shape), *_shard_map(args, config), *_stages(args), _command(args, argv)]


def layout_of(args: Namespace) -> Layout:
    """The planner's layout for validated arguments."""
    recompute = "none"
    if args.recompute_granularity == "full":
        recompute = "full"
    elif args.recompute_granularity == "selective":
        names = {"core_attn": "core", "mla_up_proj": "up_proj"}
        modules = args.recompute_modules or ["core_attn"]
        recompute = "+".join(names[m] for m in names if m in modules) or "none"
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vpp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        dp=args.data_parallel_size,
        micro_batch=args.micro_batch_size,
        recompute=recompute,
        sequence_parallel=args.sequence_parallel,
        tp_layout=args.latent_tp_layout,
        distributed_optimizer=args.use_distributed_optimizer,
        keep_absorbed_query=not args.recompute_absorbed_query,
    )


def _plan(args: Namespace, shape: ModelDescription) -> list[str]:
    if shape.mtp_num_layers:
        return ["plan: none, since the planner does not know multi-token prediction"]
    if cut := _uneven(args):
        return [f"plan: none, since the planner cuts layers evenly, and {cut} does not"]
    gpu, layout = find(args.dry_run_gpu), layout_of(args)
    held = memory(shape, layout, half=args.bf16 or args.fp16)
    fp8 = bool(args.fp8) and bool(gpu.fp8_tflops)
    step = predict(shape, layout, batch_schedule.sizes(args)[1], gpu, Assumptions(), fp8)
    limit = gpu.memory_gb * 1e9 * Assumptions().memory
    verdict = "fits" if held.total <= limit else "does NOT fit"
    size, unit = size_unit(held.total)
    second, clock = time_unit(step.seconds)
    parts = ("weights", "gradients", "optimizer", "activations", "working")
    sizes = ", ".join(f"{name} {getattr(held, name) / size:.1f}" for name in parts)
    sent = ", ".join(
        f"{name} {value / 1e9:,.1f}" for name, value in step.traffic.to_json().items() if value
    )
    return [
        f"plan: {layout} on {args.world_size:,} x {gpu.name} (predictions; mlra plan searches)",
        f"  memory: {held.total / size:.1f} {unit} on the fullest GPU ({sizes}), {verdict} in"
        f" {limit / GIB:.1f} GiB",
        f"  step: {step.seconds / second:.3g} {clock},"
        f" {step.tokens_per_gpu_second:,.0f} tokens/s a GPU,"
        f" MFU {step.mfu:.0%}; beside products {Plan(layout, held, step).reason()}",
        f"  a GPU sends, GB per step: {sent or 'nothing'}",
    ]


def _shard_map(args: Namespace, config: TransformerConfig) -> list[str]:
    tp = args.tensor_model_parallel_size
    ranks = list(range(tp))
    lines = [f"one layer's attention on each of {tp} tensor-parallel ranks:"]
    if isinstance(config, MLRAConfig):
        lines[0] = f"{lines[0][:-1]} ({config.latent_tp_layout} layout):"
    skipped = tp - MOST_RANKS
    if skipped > 0:
        ranks = [*range(MOST_RANKS - 1), tp - 1]
    for rank in ranks:
        if skipped > 0 and rank == tp - 1:
            lines.append(f"  ... {skipped} more alike")
        lines.append(f"  rank {rank}: {_shard(config, tp, rank)}")
    return lines


def _shard(config: TransformerConfig, tp: int, rank: int) -> str:
    if not isinstance(config, MLRAConfig):
        heads = config.num_attention_heads // tp
        groups = max(1, config.num_query_groups // tp)
        first = rank * config.num_query_groups // tp
        return f"heads {_span(rank * heads, heads)}, key/value heads {_span(first, groups)}"
    shard = LatentShard.plan(config, tp, rank)
    G = config.num_head_groups
    latents = [
        b * G + g
        for b in range(shard.branch_start, shard.branch_start + shard.branches)
        for g in range(shard.group_start, shard.group_start + shard.groups)
    ]
    own = config.num_attention_heads // tp
    made = "its own" if shard.owns_latents else "gathered"
    return (
        f"projections of heads {_span(rank * own, own)}; core: branches"
        f" {_span(shard.branch_start, shard.branches)} of heads"
        f" {_span(shard.head_start, shard.heads)}, latents {', '.join(map(str, latents))} ({made})"
    )


def _span(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _uneven(args: Namespace) -> str | None:
    """The first flag that cuts the layers unevenly over pipeline stages, if any."""
    asked = (flag(name) for name in UNEVEN if getattr(args, name))
    return next(asked, None) if args.pipeline_model_parallel_size > 1 else None


def _stages(args: Namespace) -> list[str]:
    tp, pp, dp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.data_parallel_size * args.context_parallel_size,
    )
    chunks = args.virtual_pipeline_model_parallel_size or 1
    lines = [f"global rank = tp + {tp} (dp + {dp} pp); layers of a pipeline stage:"]
    if cut := _uneven(args):
        return [*lines, f"  as {cut} and Megatron divide them"]
    each = args.num_layers // (pp * chunks)
    for stage in range(pp):
        spans = (_span(each * (chunk * pp + stage) + 1, each) for chunk in range(chunks))
        ranks = _span(tp * dp * stage, tp * dp)
        ends = (["embedding"] if stage == 0 else []) + (["output"] if stage == pp - 1 else [])
        lines.append(f"  stage {stage} (ranks {ranks}): {', '.join([*spans, *ends])}")
    return lines


def _command(args: Namespace, argv: list[str]) -> str:
    """The launch. It resumes from --save, so that every restart is the same command."""
    given: dict[str, str] = {}
    kept, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in (*FLAGS, *FOLDERS):
            value = value if equals else next(words, "")
            given[name] = value
        else:
            kept.append(word)
    save = given.get("--save", "RUN")
    folders = ["--save", save, "--load", given.get("--load", save)]
    start = launcher(args.world_size, args.tensor_model_parallel_size)
    command = shlex.join([*start, *ENTRY, *kept, *folders])
    return f"command{', the same on every node' if '--nnodes' in start else ''}: {command}"
