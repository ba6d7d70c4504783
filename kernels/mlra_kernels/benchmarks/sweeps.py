"""Measure one shape of latent decoding under several configurations, beside each other.

`python -m mlra_kernels.benchmarks.latent_decode --sweep queries --json out.json` compiles all cases
in parallel processes first, then prints one line per shape and configuration, and a table last. A
case that fails or is wrong says so in its row and does not end the run.
"""

import itertools
import multiprocessing
import os
import time
from dataclasses import replace

import torch

from mlra_kernels.benchmarks.timing import graph_microseconds
from mlra_kernels.benchmarks.workload import Shape, Workload, make_workload
from mlra_kernels.latent_decode import DecodeConfig, decode_metadata, latent_decode

K, M = 1 << 10, 1 << 20
ERROR_LIMIT = {False: 5e-3, True: 3e-2}
Case = tuple[Shape, str, DecodeConfig | None]
"""A shape, the name of a configuration, and the configuration; None is the default."""


def shared(consumers: int, slots: int, overlap: bool, registers: bool) -> DecodeConfig:
    """A configuration whose consumers share tiles."""
    return DecodeConfig(
        64, 64, 4, slots, 1, hopper=True, consumers=consumers, shared_tiles=True, overlap=overlap,
        query_registers=registers,
    )  # fmt: skip


IN_TURN = DecodeConfig(64, 64, 4, 4, 1, hopper=True, consumers=2, registers=136)
IN_TURN_FP8 = DecodeConfig(64, 64, 4, 6, 1, hopper=True, consumers=2)
PAIR = {
    "2 share": shared(2, 6, False, False),
    "2 share, registers": shared(2, 6, False, True),
    "2 share, overlap": shared(2, 6, True, False),
    "2 share, overlap, registers": shared(2, 6, True, True),
    "2 share, overlap, registers, 4 slots": shared(2, 4, True, True),
}
TRIPLE = {"3 share": shared(3, 4, False, False), "3 share, 6 slots": shared(3, 6, False, False)}
PAIR_FP8 = {
    "2 share": shared(2, 6, False, False),
    "2 share, overlap": shared(2, 6, True, False),
    "2 share, overlap, registers": shared(2, 6, True, True),
}


def query_cases(fp8: bool) -> list[Case]:
    """One to eight query tokens of the 2.9B model's 24 heads a rank and of 64 heads."""
    cases: list[Case] = []
    for length, heads, q_len in itertools.product((128 * K, M), (24, 64), (1, 2, 4, 8)):
        shape = Shape(f"{heads} heads q={q_len}", 1, length, heads=heads, q_len=q_len, fp8=fp8)
        cases.append((shape, "in turn", IN_TURN_FP8 if fp8 else IN_TURN))
        rows = heads * q_len
        if rows <= 64:
            continue
        found = PAIR_FP8 if fp8 else PAIR
        if rows > 128:  # fewer, as every case is compiled: the likely best, and the plain one
            found = {name: found[name] for name in ("2 share", "2 share, overlap, registers")}
        if rows in range(129, 193) and not fp8:
            found = found | TRIPLE
        cases += [(shape, name, config) for name, config in found.items()]
    return cases


MLA = {
    "64 tokens, 2 slots": DecodeConfig(64, 64, 8, 2, 1, hopper=True),
    "32 tokens, 3 slots": DecodeConfig(64, 32, 8, 3, 1, hopper=True),
    "32 tokens, 4 slots": DecodeConfig(64, 32, 8, 4, 1, hopper=True),
    "64 tokens, 160 registers": DecodeConfig(64, 64, 8, 2, 1, hopper=True, registers=160),
    "64 tokens, ranges of 16": DecodeConfig(64, 64, 8, 2, 1, hopper=True, min_tiles=16),
}


def mla_cases() -> list[Case]:
    """MLA's shape in the batches where it is slower than its bar, and one where it is not."""
    batches = ((128, K), (32, 8 * K), (128, 4 * K), (128, 16 * K))
    return [
        (Shape("MLA", batch, length, latent_dim=512), name, config)
        for batch, length in batches for name, config in MLA.items()
    ]  # fmt: skip


SWEEPS = {
    "queries": lambda: query_cases(False),
    "queries-fp8": lambda: query_cases(True),
    "mla": mla_cases,
}


def calls_of(w: Workload, config: DecodeConfig | None) -> list:
    """One decoding call for each block table of a workload, all by one schedule."""
    s = w.shape
    metadata = decode_metadata(
        w.cache_seqlens, q_len=s.q_len, num_latents=s.num_latents, heads_per_latent=s.heads,
        latent_dim=s.latent_dim, cache_dtype=w.cache.dtype, page_size=s.page_size, config=config,
    )  # fmt: skip

    def call(table):
        return latent_decode(
            w.q_absorbed, w.q_rope, w.cache, table, w.cache_seqlens, w.softmax_scale,
            num_branches=s.num_branches, cache_scale=w.cache_scale, metadata=metadata,
        )  # fmt: skip

    return [lambda table=table: call(table) for table in w.tables]


def compile_case(case: Case) -> str | None:
    """Fill Triton's cache with the kernels of a case, by a small call of the same kinds of sizes.

    Returns what went wrong, or None.
    """
    shape, _, config = case
    try:
        small = replace(shape, length=min(shape.length, 4 * K), batch=min(shape.batch, 2))
        w = make_workload(small, torch.bfloat16, "cuda", 1, rotation=0)
        calls_of(w, config)[0]()
        torch.cuda.synchronize()
    except Exception as problem:  # any failure becomes the case's row
        return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    return None


def kind_of(case: Case) -> tuple[Shape, DecodeConfig | None]:
    """What the kernels of a case depend on."""
    return replace(case[0], length=4 * K, batch=1), case[2]


def compile_all(cases: list[Case], seconds: int = 120) -> dict[tuple, str]:
    """Compile the kernels of all cases in parallel processes; the kinds that failed, and why.

    A kind that fails or hangs does so in a process of its own, and is not measured.
    """
    deadline = time.monotonic() + seconds
    kinds = list(dict.fromkeys(kind_of(case) for case in cases))
    workers = min(10, os.cpu_count() or 1, len(kinds))
    failed = {}
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        pending = [pool.apply_async(compile_case, ((kind[0], "", kind[1]),)) for kind in kinds]
        for kind, result in zip(kinds, pending, strict=True):
            try:
                said = result.get(max(0.1, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                said = f"did not compile and run a small call within {seconds} s"
            if said:
                failed[kind] = said
    return failed


def queries_of(w: Workload, shape: Shape) -> Workload:
    """The workload of `shape` on the cache of `w`, whose queries are at least as many."""
    q = w.q_absorbed[:, : shape.q_len, :, : shape.heads].contiguous()
    rope = w.q_rope[:, : shape.q_len, : shape.heads].contiguous()
    return replace(w, shape=shape, q_absorbed=q, q_rope=rope)


def expected(w: Workload) -> torch.Tensor:
    """The reference's output for the first block table."""
    return latent_decode(
        w.q_absorbed, w.q_rope, w.cache, w.tables[0], w.cache_seqlens, w.softmax_scale,
        num_branches=w.shape.num_branches, cache_scale=w.cache_scale, backend="torch",
    )[0]  # fmt: skip


def measure(case: Case, w: Workload, want: torch.Tensor, failed: dict[tuple, str]) -> dict:
    """The record of one case: microseconds and relative error, or what went wrong."""
    shape, name, config = case
    record = {"shape": shape.label, "config": name, "length": shape.length, "us": None}
    record |= {"q_len": shape.q_len, "heads": shape.heads, "batch": shape.batch}
    if said := failed.get(kind_of(case)):
        return record | {"said": said}
    try:
        calls = calls_of(w, config)
        error = ((calls[0]()[0].float() - want.float()).norm() / want.float().norm()).item()
        record["error"] = error
        if error <= ERROR_LIMIT[shape.fp8]:
            us = graph_microseconds(calls, replays=9)
            record |= {"us": round(us, 2), "tflop_s": round(shape.flops / us / 1e6, 1)}
            record["gb_s"] = round(shape.cache_bytes / us / 1e3, 1)
        else:
            record["said"] = f"wrong: relative error {error:.2e}"
    except Exception as problem:  # one case must not lose the others
        record["said"] = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    return record


def run(name: str, seed: int) -> list[dict]:
    """Compile and measure a sweep; prints a line per case and the table."""
    cases = SWEEPS[name]()
    began = time.monotonic()
    failed = compile_all(cases)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    records = []
    for _, alike in itertools.groupby(cases, lambda case: (case[0].batch, case[0].length)):
        group = list(alike)
        largest = replace(
            group[0][0], q_len=max(c[0].q_len for c in group), heads=max(c[0].heads for c in group)
        )
        base = make_workload(largest, torch.bfloat16, "cuda", seed)
        for shape, some in itertools.groupby(group, lambda case: case[0]):
            w = queries_of(base, shape)
            want = expected(w)
            for case in some:
                records.append(measure(case, w, want, failed))
                print(line(records[-1]), flush=True)
        del base, w, want
        torch.cuda.empty_cache()
    print(*table(records), sep="\n")
    return records


def line(record: dict) -> str:
    """A record as a line."""
    said = record.get("said") or f"{record['us']:8.1f} us {record['tflop_s']:7.0f} TFLOP/s"
    return f"{record['shape']:24} {record['config']:38} {said}"


def table(records: list[dict]) -> list[str]:
    """Rows of times, as ratios to the shape's first configuration and to one query token."""
    rows = [
        f"{'shape':24} {'configuration':38} {'us':>8} {'x first':>8} {'x q=1':>8} {'TFLOP/s':>8}"
    ]
    first: dict[str, float] = {}
    single: dict[tuple, float] = {}
    for r in records:
        if r["us"] is None:
            rows.append(f"{r['shape']:24} {r['config']:38} {r['said']}")
            continue
        before = first.setdefault(r["shape"], r["us"])
        kind = (r["heads"], r["batch"], r["length"])
        if r["q_len"] == 1:
            single.setdefault(kind, r["us"])
        alone = f"{r['us'] / single[kind]:8.2f}" if kind in single else " " * 8
        rows.append(
            f"{r['shape']:24} {r['config']:38} {r['us']:8.1f} {r['us'] / before:8.3f} {alone} "
            f"{r['tflop_s']:8.0f}"
        )
    return rows
