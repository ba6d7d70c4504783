"""Training speed of MLRA, its relatives and Megatron's own MLA on the GPUs of one host.

    mlra benchmark-training --case mlra4 --case stock-mla --out runs/benchmark
    torchrun --nproc-per-node 2 --no-python mlra benchmark-training --case mlra4@tp2-latent

Each case is VARIANT[/RECIPE[/FORM[/SEQ_LENGTH]]][@LAYOUT], e.g. mlra4/tensorwise/absorbed/4096: a
preset of 2.9B by its variant, or any by its name, cut to --num-layers, or stock-mla,
stock-mla_moe_16b (stock-mla-fused with its RoPE fusion). On one GPU it is checked against the torch
layers (experts lie on this GPU alone). Then it is timed through Megatron's DDP, schedule and
optimizer. LAYOUT cuts it over GPUs: `one`, `tp2-head`, `cp2`, `pp2`, `dp2`, `dp2-ep2`, ...
(layouts.py has all); a step has the same tokens in each. Flags this tool does not know go to
Megatron.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import logging
import os
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_mlra.benchmarks.training.cases import Case
from megatron_mlra.command_line.early import reads, writes
from megatron_mlra.command_line.numbers import real, whole
from megatron_mlra.command_line.parser import OneLineParser, fail, make_folder
from megatron_mlra.command_line.results import check_figure, check_json
from megatron_mlra.training.early_checks import parsed

warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

DEFAULT_CASES = [
    f"{variant}/bf16/auto/{s}" for s in (2048, 4096, 8192) for variant in ("stock-mla", "mlra4")
]

TWO_GPUS = [
    "mlra4/bf16/auto/4096@one",
    "mlra4/bf16/auto/4096@tp2-head",
    "stock-mla/bf16/auto/4096@tp2",
    "mlra4/bf16/auto/4096@tp2-latent",
    "stock-mla/bf16/auto/4096@one",
    "mlra4/bf16/auto/4096@tp2-head-wide4",
    "mlra4/bf16/auto/4096@tp2-head-graphs",
    "mlra4/bf16/auto/4096@dp2",
    "mlra4/bf16/auto/4096@dp2-serial",
    "mlra4/bf16/auto/4096@pp2",
    "mlra4/bf16/auto/4096@cp2",
    "mlra4/bf16/auto/4096@one-wide4",
    "stock-mla/bf16/auto/4096@tp2-wide4",
    "mlra4/tensorwise/auto/4096@tp2-head-wide4",
    "mlra4_moe_16b/bf16/auto/4096@one",
    "mlra4_moe_16b/bf16/auto/4096@dp2-ep2",
    "mlra4/bf16/auto/4096@tp2-latent-wide4",
    "mlra4/bf16/auto/4096@one-graphs",
    "stock-mla/bf16/auto/4096@one-wide4",
    "mlra4/bf16/auto/4096@one-half",
]
"""What two GPUs are measured with by default, the most important first."""


def parser() -> OneLineParser:
    """The parser of the command's own flags."""
    flags = OneLineParser(
        description="Training speed of MLRA, its relatives and Megatron's own MLA on the GPUs of"
        " one host.",
        epilog="Other flags go to Megatron.",
        passes_on=True,
    )
    add = flags.add_argument
    case = add(
        "--case",
        action="append",
        metavar="VARIANT[/RECIPE[/FORM[/LENGTH]]][@CUT]",
        help="a preset of 2.9B by its variant (mlra4), any by its name (mlra4_moe_16b), or"
        " stock-mla and stock-mla_moe_16b, Megatron's own; may be repeated (default:"
        " mlra4 and stock-mla at 2, 4 and 8 K tokens; with two processes the layouts of two GPUs)",
    )
    reads(case, lambda text, _: Case.parse(text))
    add("--only", default="*", metavar="PATTERN", help="run the cases that match, as in *@tp2*")
    add(
        "--seconds",
        type=real(above=0),
        default=1e9,
        metavar="N",
        help="start no case after N seconds",
    )
    add("--num-layers", type=whole(1), default=6, help="layers of every case (default: 6)")
    add("--tokens", type=whole(1), default=16384, help="tokens of a micro-batch (default: 16384)")
    add(
        "--micro-batches",
        type=whole(1),
        default=8 if two_processes() else 1,
        help="micro-batches of a step (default: 1, of two processes 8, which all layouts divide)",
    )
    add("--steps", type=whole(1), default=10, help="steps that are timed (default: 10)")
    add("--warmup", type=whole(0), default=3, help="steps before those (default: 3)")
    add("--profile", action="store_true", help="trace two more steps, and sum them up")
    add("--sublayer", action="store_true", help="time the attention sublayer alone, ungated")
    out = add(
        "--out",
        type=Path,
        default=Path("runs/benchmark_training"),
        metavar="FOLDER",
        help="folder for results (default: runs/benchmark_training)",
    )
    writes(out, _check_out)
    flags.together.append(chosen)
    return flags


def _check_out(folder: Path, flag: str) -> None:
    """Make the folder of the results, and check that they replace nothing else.

    Raises:
        ValueError: it cannot be written, or holds another file of their names.
    """
    make_folder(folder, f"{flag} {folder}")
    for name in ("training.json", "progress.json"):
        check_json(folder / name, flag)
    check_figure(folder / "training.png", flag)


def two_processes() -> bool:
    """Whether torchrun started two processes, of which every layout of TWO_GPUS is made."""
    return os.environ.get("WORLD_SIZE") == "2"


def chosen(args: Namespace) -> list[Case]:
    """The cases that the flags ask for.

    Raises:
        ValueError: a case is unknown, none is left, or the micro-batches do not divide into one;
            names the flag.
    """
    texts = args.case or (TWO_GPUS if two_processes() else DEFAULT_CASES)
    cases = [Case.parse(text) for text in texts if fnmatch.fnmatch(text, args.only)]
    if not cases:
        raise ValueError(f"--only {args.only} leaves no case of {', '.join(texts)}")
    # A sublayer alone has no steps.
    for case in cases if not args.sublayer else ():
        case.layout.micro_batches(args.micro_batches)
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case; returns the exit code: 1 if a case failed."""
    own = parser()
    args, flags = own.parse_known_args(argv)
    try:
        cases = chosen(args)
        _check_out(args.out, "--out")
        parsed(flags)
    except ValueError as error:
        return fail(str(error), 2)

    import torch

    if not torch.cuda.is_available():
        own.error(
            "this benchmark needs a CUDA GPU, and torch sees none; mlra benchmark-cpu measures a"
            " CPU"
        )
    from megatron_mlra.fault_tolerance import fingerprint
    from megatron_mlra.inference import world
    from megatron_mlra.training import arguments

    told = {"arguments": fingerprint.of_arguments(args) | {"the flags of training": repr(flags)}}
    try:
        _kept = world.meet(lambda: told)  # rank 0 may hold the store of all
    except ValueError as error:
        return world.refuse(error)
    arguments.join_world()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return measure_all(cases, args, flags, "nccl")


def measure_all(cases: list, args: Namespace, flags: list[str], backend: str) -> int:
    """Measure every case in the world of its layout; returns the exit code: 1 if a case failed.

    Every process of the launch calls it; the first one says and writes the results.
    """
    from megatron_mlra.benchmarks.training import measure, report
    from megatron_mlra.benchmarks.training.case import Load
    from megatron_mlra.benchmarks.training.progress import Progress
    from megatron_mlra.benchmarks.training.worlds import Worlds

    load = Load(args.num_layers, args.tokens, args.micro_batches, flags=tuple(flags))
    worlds = Worlds(backend)
    chief = worlds.rank == 0
    progress = Progress(args.out, measure.SublayerResult if args.sublayer else measure.Result)
    matmul = measure.matmul_tflops()
    if chief:
        print(f"bf16 matrix product: {matmul:.0f} TFLOP/s", flush=True)
    gates: dict[tuple, float] = {}
    deadline = time.monotonic() + args.seconds
    for case in cases:
        wanted = str(case) not in progress.begun and time.monotonic() < deadline
        if not worlds.agree(wanted):
            continue
        if chief:
            progress.begin(case)
        row = None
        try:
            if worlds.enter(case.layout):
                row = _measure(case, load, args, gates, matmul)
        except (ValueError, RuntimeError, AssertionError, TypeError, ImportError) as error:
            if chief:
                progress.fail(case, error)
        if chief and row is not None:
            progress.measured(case, row)
            _write(args, flags, matmul, progress)  # a later case may end the process
            print(report.line(row), flush=True)
        if not worlds.agree(row is not None):
            worlds.leave()
            measure.free_memory()
    worlds.leave()
    return _report(args, flags, matmul, progress, load) if chief else 0


def _measure(case, load, args: Namespace, gates: dict[tuple, float], matmul: float):
    """The row of one case. On one GPU its gate is run, once for each variant, recipe and form."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_mlra.benchmarks.training import gate, measure

    model_parallel_cuda_manual_seed(1)
    if args.sublayer:
        return measure.measure_sublayer(case, load, args.steps)
    key = (case.variant, case.recipe, case.form)
    if key not in gates and case.layout.world == 1:
        gates[key] = gate.check(case, load)
    name = "_".join(str(case).split("/")[-4:]) + ".json.gz"
    trace = args.out / name if args.profile else None
    gated = gates.get(key, 0.0)
    return measure.measure(case, load, gated, matmul, args.steps, args.warmup, trace)


def _write(args: Namespace, flags: list[str], matmul: float, progress) -> dict:
    """Write what is measured; returns the content."""
    from megatron_mlra.benchmarks.training import report

    settings = {name: getattr(args, name) for name in ("num_layers", "tokens", "micro_batches")}
    settings |= {"steps": args.steps, "flags": flags, "failed": [*progress.failed.values()]}
    return report.write([*progress.rows.values()], matmul, settings, args.out)


def _report(args: Namespace, flags: list[str], matmul: float, progress, load) -> int:
    """Write and print the results; returns the exit code."""
    from megatron_mlra.benchmarks.training import kernels, report
    from megatron_mlra.benchmarks.training.plot import plot

    rows = [*progress.rows.values()]
    result = _write(args, flags, matmul, progress)
    cut = not args.sublayer and any(row.layout != "one" for row in rows)
    if len(rows) > 1 and not args.sublayer and not cut:
        if importlib.util.find_spec("matplotlib"):
            source = f"{result['device']}, commit {result['commit']}"
            plot(result["rows"], args.out / "training.png", source)
        else:
            print("no plot: matplotlib is not installed")
    print(json.dumps(result))
    for row in rows if args.profile and not args.sublayer else []:
        if row.kernels:
            print(f"\n{row.case}: {kernels.text(row.kernels)}", end="")
    if cut:
        print(report.layout_table(rows))
        return 1 if progress.failed else 0
    print(report.table(rows))
    if rows and not args.sublayer:
        print(f"\n{result['device']}, {load.tokens:,} tokens of a micro-batch, JSON in {args.out}")
        print(report.memory_table(rows))
    return 1 if progress.failed else 0
