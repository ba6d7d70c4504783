"""Command line of `mlra benchmark-decoding`; flags.py says what it measures."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from megatron_mlra.benchmarks.commit import commit
from megatron_mlra.benchmarks.decoding.flags import check, parser
from megatron_mlra.benchmarks.decoding.guesses import (
    Guesser,
    guess_table,
    measure_guesses,
    of_checkpoint,
    of_preset,
)
from megatron_mlra.benchmarks.decoding.kernels import profile_table
from megatron_mlra.benchmarks.decoding.measure import (
    ONE_GPU,
    Case,
    gate,
    measure,
    measure_prefill,
)
from megatron_mlra.benchmarks.decoding.place import Place, joined, tiny
from megatron_mlra.benchmarks.decoding.plot import plot
from megatron_mlra.command_line.figures import tokens
from megatron_mlra.command_line.parser import fail, write_json
from megatron_mlra.command_line.results import check_figure, check_json
from megatron_mlra.description.presets import preset_description, preset_values
from megatron_mlra.fault_tolerance import fingerprint
from megatron_mlra.fault_tolerance.handshake import Fingerprint
from megatron_mlra.inference import world
from megatron_mlra.inference.parallel import HeadShard, check_parallel, tensor_parallel_size
from mlra_kernels.benchmarks.timing import read_roof

K = 1024


def cases(
    tps: list[int],
    presets: list[str],
    contexts: Sequence[int] = (1,),
    place: Place = ONE_GPU,
    all_reduces: Sequence[str] = ("auto",),
) -> list[Case]:
    """The cases to measure: every preset in every cut that it fits, and variations.

    Args:
        tps: tensor-parallel sizes whose share of one rank is measured on one GPU; not used in a
            world of several ranks.
        contexts: numbers of ranks over which tokens are cut, in addition to the tensor-parallel
            ranks on one GPU, as a part of the ranks in a world.
        all_reduces: ways to sum over ranks, each measured; not used on one GPU.
    """
    if place.ranks > 1:
        layouts = [(tensor_parallel_size(place.ranks, n), n) for n in contexts]
    else:
        layouts = [(tp, n) for tp in tps for n in contexts]
    return [
        case
        for tp, context in layouts
        for preset in presets
        for found in _of_preset(preset, tp, context, place)
        for case in _summing(found, all_reduces if place.ranks > 1 else ("auto",))
    ]


def _summing(case: Case, all_reduces: Sequence[str]) -> list[Case]:
    """The case once for each way to sum over ranks; the label names all but 'auto'."""
    what, _, where = case.label.rpartition(" ")
    labels = {
        name: case.label if name == "auto" else f"{what} {name} {where}" for name in all_reduces
    }
    return [replace(case, label=label, all_reduce=name) for name, label in labels.items()]


def _of_preset(preset: str, tp: int, context: int, place: Place) -> list[Case]:
    model = preset_description(preset)
    label = model.variant
    if model.attention == "gqa":
        if model.num_query_groups % (tp * context):
            # Six key/value heads cannot be cut into four; eight is the usual number.
            model = model.replace(num_query_groups=8)
        label = f"GQA-{model.num_query_groups}"
    try:
        check_parallel(model, tp, context)
    except ValueError as misfit:
        place.say(f"left out: {label}: {misfit}")
        return []
    if place.rehearsal:
        model = tiny(model)
    latents = model.attention == "mlra"
    cut = f" tokens cut in {context}" if context > 1 else ""
    where = "whole" if tp * context == 1 else f"1/{tp * context}"
    if place.ranks > 1:
        where = f"x{place.ranks}"
    found = [Case(f"{label}{cut} {where}", model, tp, context)]
    if latents and model.num_branches > 1:
        fp8 = f"{label}{cut} FP8 {where}"
        found.append(Case(fp8, model, tp, context, cache_dtype="fp8"))
    if latents and (context > 1 or (tp > 1 and model.num_branches > 1)):
        sharded = Case(f"{label}{cut} sharded {where}", model, tp, context, "sharded")
        with contextlib.suppress(ValueError):
            HeadShard.plan(model, tp, 0, "sharded", context)
            found.append(sharded)
    return found


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: microseconds, share of the roof, and bytes, by case, batch and context."""
    lines = [
        "| case | batch | context | us per step | roof us | share | weights GB | cache GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        sizes = f"{r['weight_bytes'] / 1e9:.2f} | {r['cache_bytes'] / 1e9:.2f}"
        timed = "does not fit | |" if not r.get("fits", False) else "rehearsed | |"
        if "us" in r:
            timed = f"{r['us']:.0f} | {r['roof_us']:.0f} | {100 * r['share']:.0f} %"
        lines.append(
            f"| {r['label']} | {r['batch']} | {tokens(r['context'])} | {timed} | {sizes} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Check correctness, measure and report every case; returns the exit code (1: a case failed; 2:
    refused)."""
    args = parser().parse_args(argv)
    on_cpu = args.rehearse or (args.speculate and not torch.cuda.is_available())
    if not on_cpu and not torch.cuda.is_available():
        return fail("this benchmark needs a CUDA GPU, and torch sees none", 2)

    def told() -> Fingerprint:
        data = [f"{args.data}{end}" for end in (".bin", ".idx")] if args.data else []
        return {
            "device": {"the device": "cpu" if on_cpu else "cuda"},
            "arguments": fingerprint.of_arguments(args),
            "presets": {f"the preset {name}": repr(preset_values(name)) for name in args.configs},
            **world.of_inputs(args.speculate, None, *filter(None, [args.text]), *data),
        }

    try:
        check(args)
        if args.json:
            check_json(args.json, "--json")
        if args.png:
            check_figure(args.png, "--png")
        with joined(on_cpu, args.products, told) as place:
            if args.speculate is not None:
                _run_guesses(args, place)
                return 0
            todo = cases(args.tp, args.configs, args.context_parallel, place, args.all_reduce)
            if not todo:
                raise ValueError("nothing is measured: no model of --configs can be cut so")
            failed = _run(args, todo, place)
    except (ValueError, OSError) as error:
        return world.refuse(error)
    return fail(f"not reported: {', '.join(failed)}", 1) if failed else 0


def _run(args: argparse.Namespace, todo: list[Case], place: Place) -> list[str]:
    """Measure every case; returns the labels of those that failed."""
    roof = 1.0 if place.rehearsal else -place.most(-read_roof())
    about = _about(args, place) | {"read_gb_s": round(roof / 1e9)}
    seed, contexts = about["seed"], args.contexts or [4 * K, 32 * K, 128 * K, 512 * K]
    place.say(", ".join(f"{k} {v}" for k, v in about.items()))
    records, prefills, failed = [], [], []
    for case in todo:
        start = time.monotonic()
        problem, found = None, []
        try:
            error = gate(case, seed, place)
            _free(place)
            found = measure(case, contexts, args.batches, roof, seed, place, args.profile)
            took = time.monotonic() - start
            sums = f", all-reduce {found[0]['all_reduce']}" if place.ranks > 1 else ""
            place.say(f"{case.label}: error {error:.1e}, {took:.0f} s{sums}\n{table(found)}")
            records += [record | {"gate_error": error} for record in found]
            if case.weight_mode == "replicated" and case.cache_dtype == "auto":
                for length in args.prefill if not place.rehearsal else ():
                    prefills.append(measure_prefill(case, length, args.prefill_chunk, seed, place))
                    place.say(json.dumps(prefills[-1]))
        except (RuntimeError, ValueError) as raised:
            problem = raised
            print(f"error: {case.label}: {problem}", file=sys.stderr, flush=True)
        if place.most(float(problem is not None)):
            failed.append(case.label)
        # Agreed on like the problem, so that all ranks end with the same exit code.
        unseen = any("error" in record.get("profile", {}) for record in found)
        if args.profile and place.most(float(unseen)):
            failed.append(f"the profile of {case.label}")
        _free(place)
        if args.json and place.rank == 0:
            report = {**about, "records": records, "prefills": prefills, "failed": failed}
            write_json(args.json, report, indent=1)
    for record in records:
        if "profile" in record:
            place.say(f"\n{profile_table(record)}")
    if args.png and place.rank == 0 and any("us" in record for record in records):
        plot(records, f"{about['gpu']}, {about['commit']}", Path(args.png))
    return failed


def _about(args: argparse.Namespace, place: Place) -> dict[str, Any]:
    """On what it is measured, and by which seed."""
    # The same seed on all ranks.
    seed = args.seed if args.seed is not None else int(place.most(time.time_ns() % 2**20))
    cpu = "none: a rehearsal" if args.rehearse else "none: a CPU"
    return {
        "gpu": cpu if place.rehearsal else torch.cuda.get_device_name(),
        "gpus": 0 if place.rehearsal else place.ranks, "torch": torch.__version__,
        "triton": triton.__version__, "commit": args.commit or commit(),
        "seed": seed, "products": place.products,
    }  # fmt: skip


def _run_guesses(args: argparse.Namespace, place: Place) -> None:
    """Every model, batch and context without and with guesses."""
    about = _about(args, place)
    if args.speculate:
        guessers = [of_checkpoint(args.speculate, args.text, args.data)]
    else:
        guessers = [of_preset(preset, place, about["seed"]) for preset in args.configs]
    place.say(", ".join(f"{k} {v}" for k, v in about.items()))
    records = []
    for guesser in guessers:
        found = _guesses_of(args, guesser, place)
        place.say(guess_table(found, not args.rehearse))
        records += found
    if args.json and place.rank == 0:
        write_json(args.json, {**about, "records": records}, indent=1)


def _guesses_of(args: argparse.Namespace, guesser: Guesser, place: Place) -> list[dict[str, Any]]:
    """A record for each context, batch and temperature."""
    records = []
    longest = guesser.model.max_position_embeddings - args.new_tokens
    for context in args.contexts or [max(min(K, longest), 1)]:
        if args.speculate and context > longest:
            raise ValueError(
                f"--contexts {context} and --new-tokens {args.new_tokens} exceed the model's"
                f" {guesser.model.max_position_embeddings} positions; use fewer"
            )
        for batch, temperature in itertools.product(args.batches, args.temperature):
            ways = batch, context, args.new_tokens, temperature
            try:
                records.append(measure_guesses(guesser, *ways, place))
            except RuntimeError as error:
                raise ValueError(
                    f"{guesser.label}, batch {batch}, context {context}: {error}"
                ) from None
            _free(place)
    return records


def _free(place: Place) -> None:
    if not place.rehearsal:
        torch.cuda.empty_cache()
