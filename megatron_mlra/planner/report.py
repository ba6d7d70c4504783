"""The planner's report on a model and a number of GPUs, with its JSON form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from megatron_mlra.cost.alignment import unaligned_mlps
from megatron_mlra.cost.cache import DTYPE, kv_cache_bytes_per_token
from megatron_mlra.cost.flops import train_flops_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.decoding import Decoding, decode, ways
from megatron_mlra.planner.gpus import GPU, Assumptions
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.search import Misfit, Plan, search
from megatron_mlra.planner.step import traffic
from megatron_mlra.planner.ways_out import ways_out

SURCHARGE_LENGTHS = (2048, 4096, 8192, 32768)


@dataclass(frozen=True)
class Report:
    """The question and the results; its fields are those of `mlra plan --json`."""

    name: str
    shape: ModelDescription
    gpus: int
    gpu: GPU
    global_batch: int
    assume: Assumptions
    fp8: bool
    plans: list[Plan]
    """The `top` fastest layouts that fit, the fastest first."""
    misfits: list[Misfit]
    """The `top` layouts that come nearest to fitting."""
    found: int
    """Number of all layouts that fit."""
    surcharge: dict[int, float]
    """Sequence length -> training FLOPs divided by those of the same model with MLA; only for MLRA
    and GLA."""
    decodings: list[Decoding]
    layouts_traffic: dict[str, float]
    """'head' and 'latent' -> tensor-parallel bytes per GPU and step, at the best plan's sizes."""
    command: list[str]
    """Lines of the command for the best plan; empty if no layout fits."""
    way_out: str = ""
    """If no layout fits: flags, with values, with which one does; empty if none is known."""
    notes: list[str] = field(default_factory=list)
    """What layouts in the report do not suit, one line each."""

    def to_json(self) -> dict:
        flops = train_flops_per_token(self.shape)
        counts = parameters(self.shape)
        return {
            "name": self.name,
            "variant": self.shape.attention_variant,
            "shape": asdict(self.shape),
            "gpus": self.gpus,
            "gpu": asdict(self.gpu),
            "global_batch_size": self.global_batch,
            "assumptions": asdict(self.assume),
            "fp8": self.fp8,
            "parameters": counts.total,
            "active_parameters": counts.active,
            "flops_per_token": {"model": flops.model, "hardware": flops.hardware},
            "kv_bytes_per_token": kv_cache_bytes_per_token(self.shape),
            "kv_dtype": DTYPE,
            "layouts": [
                {
                    "layout": plan.layout.to_json(),
                    "flags": plan.layout.flags(self.shape),
                    "memory": plan.memory.to_json(),
                    "step": plan.step.to_json(),
                    "reason": plan.reason(),
                }
                for plan in self.plans
            ],
            "does_not_fit": [
                {"layout": miss.layout.to_json(), "why": miss.why} for miss in self.misfits
            ],
            "training_flops_over_mla": self.surcharge,
            "tensor_parallel_bytes": self.layouts_traffic,
            "decoding": [row.to_json() for row in self.decodings],
            "command": self.command,
            "way_out": self.way_out,
            "notes": self.notes,
        }


def build(
    *,
    name: str,
    command: Callable[[Layout], list[str]],
    shape: ModelDescription,
    gpus: int,
    gpu: GPU,
    global_batch: int,
    assume: Assumptions,
    tp_layout: str,
    cp: int | None,
    fp8: bool,
    top: int,
    contexts: tuple[int, ...],
    decode_gpus: int,
    decode_batch: int,
) -> Report:
    """Search layouts, and price training and decoding.

    Args:
        command: layout -> lines of the command that starts the run.
        cp: context-parallel size; None tries several.
        top: number of layouts in the report.
        contexts: tokens of a decoded sequence.

    Raises:
        ValueError: the number of GPUs cannot be cut for the model.
    """
    plans, misfits = search(shape, gpus, global_batch, gpu, assume, tp_layout, cp, fp8)
    surcharge = {}
    if shape.attention == "mlra" and shape.num_latent_heads > 1:
        mla = replace(shape, num_latent_heads=1, num_branches=1, core_form="materialized")
        for length in SURCHARGE_LENGTHS:
            ours, theirs = (train_flops_per_token(x, length).model for x in (shape, mla))
            surcharge[length] = ours / theirs
    decodings = [
        decode(way, context, decode_batch, decode_gpus, gpu, assume)
        for context in contexts
        for way in ways(shape, decode_gpus)
    ]
    both = {}
    if plans and shape.attention == "mlra" and plans[0].layout.tp > 1:
        layout = plans[0].layout
        m = global_batch // (layout.dp * layout.micro_batch)
        for kind in ("head", "latent"):
            both[kind] = traffic(shape, replace(layout, tp_layout=kind), m).tensor
    shown = sorted({plan.layout.tp for plan in plans[:top]})
    way_out = ""
    if not plans:
        way_out = ways_out(shape, gpus, global_batch, gpu, assume, tp_layout, cp)
    return Report(
        name=name,
        shape=shape,
        gpus=gpus,
        gpu=gpu,
        global_batch=global_batch,
        assume=assume,
        fp8=fp8,
        plans=plans[:top],
        misfits=misfits[:top],
        found=len(plans),
        surcharge=surcharge,
        decodings=decodings,
        layouts_traffic=both,
        command=command(plans[0].layout) if plans else [],
        way_out=way_out,
        notes=[note for tp in shown if (note := unaligned_mlps(shape, tp))],
    )
