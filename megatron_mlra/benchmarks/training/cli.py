"""Training speed of MLRA, its relatives and Megatron's own MLA on one GPU.

    mlra benchmark-training --case mlra4 --case stock-mla --out runs/benchmark

Each case is VARIANT[/RECIPE[/FORM[/SEQ_LENGTH]]], e.g. mlra4/tensorwise/absorbed/4096: a preset of
2.9B by its variant, or any by its name, cut to --num-layers (experts on this GPU alone), or
stock-mla, stock-mla_moe_16b (stock-mla-fused with its RoPE fusion). It is checked against the torch
layers, then timed through Megatron's DDP, schedule and optimizer. Flags this tool does not know go
to Megatron.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_mlra.command_line.early import writes
from megatron_mlra.command_line.parser import OneLineParser, make_folder

warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

DEFAULT_CASES = [
    f"{variant}/bf16/auto/{s}" for s in (2048, 4096, 8192) for variant in ("stock-mla", "mlra4")
]


def parser() -> OneLineParser:
    """The parser of the command's own flags."""
    flags = OneLineParser(
        description=__doc__.splitlines()[0], epilog="Other flags go to Megatron.", passes_on=True
    )
    add = flags.add_argument
    add(
        "--case",
        action="append",
        metavar="VARIANT[/RECIPE[/FORM[/SEQ_LENGTH]]]",
        help="a preset of 2.9B by its variant (mlra4), any by its name (mlra4_moe_16b), or"
        " stock-mla and stock-mla_moe_16b, Megatron's own; may be repeated (default:"
        " mlra4 and stock-mla at 2, 4 and 8 K tokens)",
    )
    add("--num-layers", type=int, default=6, help="layers of every case (default: 6)")
    add("--tokens", type=int, default=16384, help="tokens of a micro-batch (default: 16384)")
    add("--micro-batches", type=int, default=1, help="micro-batches of a step (default: 1)")
    add("--steps", type=int, default=10, help="steps that are timed (default: 10)")
    add("--warmup", type=int, default=3, help="steps before those (default: 3)")
    add("--profile", action="store_true", help="write a trace of two more steps")
    add("--sublayer", action="store_true", help="time the attention sublayer alone, ungated")
    out = add(
        "--out",
        type=Path,
        default=Path("runs/benchmark_training"),
        metavar="FOLDER",
        help="folder for results (default: runs/benchmark_training)",
    )
    writes(out, lambda folder, flag: make_folder(folder, f"{flag} {folder}"))
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case; returns the exit code: 1 if a case failed."""
    own = parser()
    args, flags = own.parse_known_args(argv)

    import torch

    if not torch.cuda.is_available():
        own.error(
            "this benchmark needs a CUDA GPU, and torch sees none; mlra benchmark-cpu measures a"
            " CPU"
        )
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_mlra.benchmarks.training import gate, measure, report
    from megatron_mlra.benchmarks.training.case import Case, Load
    from megatron_mlra.benchmarks.training.plot import plot
    from megatron_mlra.training import arguments

    try:
        cases = [Case.parse(text) for text in args.case or DEFAULT_CASES]
        make_folder(args.out, f"--out {args.out}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    load = Load(args.num_layers, args.tokens, args.micro_batches, flags=tuple(flags))
    arguments.join_world()
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    matmul = measure.matmul_tflops()
    print(f"bf16 matrix product: {matmul:.0f} TFLOP/s", flush=True)
    rows, failed, gates = [], [], {}
    for case in cases:
        key = (case.variant, case.recipe, case.form)
        try:
            if args.sublayer:
                row = measure.measure_sublayer(case, load, args.steps)
            else:
                if key not in gates:
                    gates[key] = gate.check(case, load)
                name = "_".join(str(case).split("/")[-4:]) + ".json"
                trace = args.out / name if args.profile else None
                row = measure.measure(
                    case, load, gates[key], matmul, args.steps, args.warmup, trace
                )
        except (ValueError, RuntimeError, AssertionError) as error:
            failed.append(f"{case}: {' '.join(str(error).split())[:400]}")
            print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
            measure.free_memory()
            continue
        rows.append(row)
        print(report.line(row), flush=True)
    settings = {name: getattr(args, name) for name in ("num_layers", "tokens", "micro_batches")}
    settings |= {"steps": args.steps, "flags": flags, "failed": failed}
    result = report.write(rows, matmul, settings, args.out)
    print(report.table(rows))
    if len(rows) > 1 and not args.sublayer:
        if importlib.util.find_spec("matplotlib"):
            source = f"{result['device']}, commit {result['commit']}"
            plot(result["rows"], args.out / "training.png", source)
        else:
            print("no plot: matplotlib is not installed")
    print(json.dumps(result))
    if rows and not args.sublayer:
        print(f"\n{result['device']}, {load.tokens:,} tokens of a micro-batch, JSON in {args.out}")
        print(report.memory_table(rows))
    torch.distributed.destroy_process_group()
    return 1 if failed else 0
