"""The planner against whole training steps on a GPU: the 2.9B shape cut to six layers.

python -m pytest -m gpu -s tests/gpu/test_planner_gpu.py

Peak memory must be within a tenth of the prediction; step time and MFU are printed beside theirs.
The first two cases are among the steps that the planner's rates were chosen on (docs/scale.md), the
others are not.
"""

from __future__ import annotations

import pytest
import torch

from megatron_mlra.benchmarks.training import measure
from megatron_mlra.benchmarks.training.case import Load, parse_case
from megatron_mlra.benchmarks.training.cases import Case
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.planner.gpus import GPUS, Assumptions
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import GIB, memory
from megatron_mlra.planner.step import predict

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("world")]

LAYERS, FLAGS = 6, ("--cross-entropy-loss-fusion",)
# (case, tokens of a micro-batch, micro-batches of a step, what backward computes again)
CASES = [
    ("mla/bf16/auto/2048", 16384, 2, "none"),
    ("mlra4/bf16/auto/4096", 16384, 2, "none"),
    ("mlra4/bf16/auto/2048", 8192, 4, "none"),
    ("mlra4/bf16/auto/16384", 16384, 1, "none"),
    ("mlra4/bf16/materialized/2048", 16384, 1, "none"),
    ("mlra4/bf16/auto/4096", 16384, 2, "core"),
    ("mlra4/bf16/auto/4096", 32768, 2, "full"),
    ("mlra2/bf16/auto/4096", 16384, 2, "none"),
    ("gqa/bf16/auto/4096", 16384, 2, "none"),
]


def flags_of(values: dict) -> tuple[str, ...]:
    """A layout's preset keys as flags."""
    flags = []
    for name, value in values.items():
        if name.startswith("recompute"):
            flags.append(f"--{name.replace('_', '-')}")
            flags += [str(v) for v in (value if isinstance(value, list) else [value])]
    return tuple(flags)


@pytest.mark.parametrize(("text", "tokens", "micro_batches", "recompute"), CASES)
def test_a_training_step(text, tokens, micro_batches, recompute):
    case = Case.parse(text)
    layout = Layout(micro_batch=max(1, tokens // case.seq_length), recompute=recompute)
    load = Load(LAYERS, tokens, micro_batches)
    shape = from_megatron_args(parse_case(case, load)[0], seq_length=case.seq_length)
    load = Load(LAYERS, tokens, micro_batches, flags=(*FLAGS, *flags_of(layout.flags(shape))))
    held = memory(shape, layout)

    measure.free_memory()
    before = torch.cuda.memory_allocated()
    found = measure.measure(case, load, gate=0.0, matmul=1.0, steps=4, warmup=2, trace=None)
    peak = found.peak_gib - before / GIB

    said = f"{held.total / GIB:.1f}"
    print(f"\n{text}, {tokens} x {micro_batches} tokens, recompute {recompute}:", end="")
    print(f" peak {peak:.1f} GiB, planned {said}", end="")
    name = next((n for n in ("h100", "h200") if n in torch.cuda.get_device_name().lower()), None)
    if name is not None:
        batch = layout.micro_batch * micro_batches
        step = predict(shape, layout, batch, GPUS[name], Assumptions())
        mfu = found.model_tflops / GPUS[name].bf16_tflops
        print(f"; step {found.step_ms:.0f} ms, planned {1e3 * step.seconds:.0f}", end="")
        print(f"; MFU {mfu:.1%}, planned {step.mfu:.1%}")
    assert peak == pytest.approx(held.total / GIB, rel=0.1)
