"""Time every cut of the products of few rows, beside cuBLAS and the memory roof.

`python -m mlra_kernels.benchmarks.products --json out.json` compiles the cuts in parallel, compares
each result with the float32 reference, and prints a line for each product of MLRA-4's 2.9B model,
whole and as a rank's share: cuBLAS, without the operations fused to the product; the best cut, each
launch after the one in front (`serial`) and started before that one has ended (`early`); and the
default cut, which the operators take. Calls run in CUDA graphs over copies of the weights that
exceed the L2. The last line is one JSON.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from mlra_kernels import absorption, products
from mlra_kernels.benchmarks import report
from mlra_kernels.benchmarks.timing import graph_microseconds, read_roof
from mlra_kernels.latent_decode import rope_tables
from mlra_kernels.products import ProductConfig, reference
from mlra_kernels.products.configs import candidates, default_config

ERROR_LIMIT = 1e-2
"""Relative difference of norms, 16 bits against float32."""
ROTATED_BYTES = 256 << 20
"""Weights of the copies that calls take in turn: more than the L2."""
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """One product of a step."""

    name: str
    outputs: int
    inputs: int
    kind: str
    """plain, residual, swiglu or rotated."""
    normed: bool = True
    cuts: tuple[int, ...] = field(default=(1,))
    """Tensor-parallel sizes with this share."""

    @property
    def pairs(self) -> bool:
        return self.kind in ("swiglu", "rotated")


TPS = [1, 2, 4]
"""Tensor-parallel sizes of which a rank's products are known."""
SHAPES = (
    Shape("down", 1600, 3072, "plain", cuts=(1,)),
    Shape("down", 1344, 3072, "plain", cuts=(2,)),
    Shape("down", 1216, 3072, "plain", cuts=(4,)),
    Shape("q up", 4608, 1024, "rotated", cuts=(1, 2, 4)),
    Shape("proj", 3072, 3072, "residual", normed=False, cuts=(1, 2, 4)),
    Shape("fc1", 19760, 3072, "swiglu", cuts=(1,)),
    Shape("fc1", 9888, 3072, "swiglu", cuts=(2,)),
    Shape("fc1", 4960, 3072, "swiglu", cuts=(4,)),
    Shape("fc2", 3072, 9880, "residual", normed=False, cuts=(1,)),
    Shape("fc2", 3072, 4944, "residual", normed=False, cuts=(2,)),
    Shape("fc2", 3072, 2480, "residual", normed=False, cuts=(4,)),
    Shape("output", 50304, 3072, "plain", normed=False, cuts=(1,)),
    Shape("output", 25152, 3072, "plain", normed=False, cuts=(2,)),
)


class Inputs:
    """Random inputs of a shape, and calls of it."""

    def __init__(self, shape: Shape, tokens: int, copies: int, seed: int) -> None:
        draw = torch.Generator("cuda").manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draw, device="cuda", dtype=torch.bfloat16)

        self.shape = shape
        self.x = normal(tokens, shape.inputs)
        self.weights = [
            normal(shape.outputs, shape.inputs) * shape.inputs**-0.5 for _ in range(copies)
        ]
        self.options: dict = {}
        if shape.normed:
            self.options |= {"norm": normal(shape.inputs), "eps": EPS}
        if shape.kind == "residual":
            self.options["residual"] = normal(tokens, shape.outputs)
        if shape.kind == "rotated":
            cos, sin = rope_tables(64, 64, device="cuda")
            positions = torch.arange(tokens, device="cuda")
            self.options |= {"head": 192, "start": 128, "cos": cos, "sin": sin}
            self.options["positions"] = positions
        self.run = {
            "swiglu": products.swiglu_product, "rotated": products.rotated_product,
        }.get(shape.kind, products.product)  # fmt: skip

    def calls(self, config: ProductConfig | None, early: bool) -> list[Callable[[], Tensor]]:
        """A call for each copy of the weights."""
        return [
            lambda w=w: self.run(self.x, w, **self.options, early=early, config=config)
            for w in self.weights
        ]

    def cublas(self) -> list[Callable[[], Tensor]]:
        return [lambda w=w: linear(self.x, w) for w in self.weights]

    def error(self, call: Callable[[], Tensor]) -> float:
        """Relative difference of norms of a call on the first copy."""
        by = getattr(reference, self.run.__name__ + "_reference")
        wide = {
            k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in self.options.items()
        }
        expected = by(self.x.float(), self.weights[0].float(), **wide)
        return report.relative_error(call(), expected)


def cuts_of(shape: Shape) -> list[ProductConfig]:
    """The cuts to try, the default one first."""
    default = default_config(shape.outputs, shape.inputs, shape.pairs)
    return [default, *(c for c in candidates(shape.inputs, shape.pairs) if c != default)]


def compile_all(job: tuple[Shape, int, tuple[ProductConfig, ...]]) -> str | None:
    """Fill Triton's cache with the cuts of a shape; returns what went wrong."""
    shape, tokens, configs = job
    try:
        inputs = Inputs(shape, tokens, 1, 1)
        for config in configs:
            inputs.calls(config, True)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # the run itself meets it again, and says where
        return f"{shape.name}: {error}"
    return None


def measure(shape: Shape, tokens: int, roof: float, seed: int, until: float) -> dict:
    """Time the cuts of a shape; those that are not begun at the time `until` are left out."""
    size = 2 * shape.outputs * shape.inputs
    inputs = Inputs(shape, tokens, max(2, -(-ROTATED_BYTES // size)), seed)
    tried = []
    for config in cuts_of(shape):
        if tried and time.monotonic() > until:
            break
        tried.append(timed(inputs, config, early=True))
    best = min(tried, key=lambda record: record.get("us", math.inf))
    if "us" not in best:
        raise RuntimeError(f"no cut works: {best['failed']}")
    found = {
        "product": shape.name, "pairs": shape.pairs, "outputs": shape.outputs,
        "inputs": shape.inputs, "tokens": tokens, "tp": list(shape.cuts), "bytes": size,
        "cublas_us": round(graph_microseconds(inputs.cublas()), 2), "error": best["error"],
        "roof_us": round(size / roof * 1e6, 2), "default": tried[0], "tried": tried,
    }  # fmt: skip
    found["early"] = best
    found["serial"] = timed(inputs, ProductConfig(**best["config"]), early=False)
    return found


def timed(inputs: Inputs, config: ProductConfig, early: bool) -> dict:
    """The time of one cut, or why it has none."""
    record: dict = {"config": asdict(config)}
    try:
        calls = inputs.calls(config, early)
        record["error"] = inputs.error(calls[0])
        if not record["error"] <= ERROR_LIMIT:
            raise RuntimeError(f"wrong: error {record['error']:.1e}")
        record["us"] = round(graph_microseconds(calls), 2)
    except RuntimeError as error:
        record["failed"] = " ".join(str(error).split())[:200]
        print(f"{inputs.shape.name} {config} failed: {record['failed']}", flush=True)
    return record


def measure_heads(name: str, tokens: int, roof: float, seed: int) -> dict:
    """Time a product per head of the whole model, and torch's."""
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device="cuda", dtype=torch.bfloat16)

    heads, branches, dim, part = 24, 4, 128, 128
    up = name == "absorb"
    size = (heads, dim, branches * part) if up else (heads, branches * part, dim)
    weights = [normal(*size) * size[1] ** -0.5 for _ in range(80)]
    if up:
        x = normal(tokens, heads, dim + 64)[..., :dim]
        ours = lambda w, early: products.absorb_queries(x, w, branches, early=early)  # noqa: E731
        torchs = lambda w: absorption.absorb_queries(x, w, branches).contiguous()  # noqa: E731
    else:
        x = normal(tokens, branches, heads, part)
        ours = lambda w, early: products.sum_branches(x, w, early=early)  # noqa: E731
        torchs = lambda w: absorption.sum_branches(x, w).contiguous()  # noqa: E731
    off = report.relative_error(ours(weights[0], True), torchs(weights[0]))
    if not off <= ERROR_LIMIT:
        report.red(f"{name}: error {off:.1e}")
    found: dict = {"product": name, "tokens": tokens, "tp": [1], "error": off}
    found["roof_us"] = round(weights[0].nbytes / roof * 1e6, 2)
    for key, early in (("serial", False), ("early", True)):
        us = graph_microseconds([lambda w=w, e=early: ours(w, e) for w in weights])
        found[key] = {"us": round(us, 2), "config": {}}
    found["cublas_us"] = round(graph_microseconds([lambda w=w: torchs(w) for w in weights]), 2)
    return found


def line(r: dict) -> str:
    """A row of the table."""
    cut = ",".join(str(v) for v in r["early"]["config"].values())
    where = "/".join(map(str, r["tp"]))
    size = f"{r['outputs']} x {r['inputs']}" if "outputs" in r else "24 heads"
    times = [r["cublas_us"], r["serial"].get("us", math.nan), r["early"]["us"]]
    if r.get("tried"):
        times.append(r["tried"][0].get("us", math.nan))
    columns = " | ".join(f"{us:7.1f} {100 * r['roof_us'] / us:4.0f} %" for us in times)
    return f"{r['product']:7} TP{where:6} {size:13} T {r['tokens']} | {columns} | {cut}"


def main() -> None:
    """Parse the command line, compile, measure, report."""
    flags = report.parser(__doc__, seed=1)
    flags.add_argument(
        "--tokens", type=int, nargs="+", choices=range(1, products.MOST_TOKENS + 1), default=[1],
        help="rows of x; default: 1",
    )  # fmt: skip
    flags.add_argument(
        "--tp", type=int, nargs="+", choices=TPS, default=TPS, help="shares; default: all"
    )
    flags.add_argument(
        "--seconds",
        type=report.seconds,
        default=60,
        help="no more cuts are begun after; default: 60",
    )
    args = report.parse(flags)
    _run(args)


def _run(args: argparse.Namespace) -> None:
    start = time.monotonic()
    shapes = [s for s in SHAPES if set(s.cuts) & set(args.tp)]
    jobs = [
        (shape, tokens, tuple(part))
        for tokens in args.tokens
        for shape in shapes
        for cuts in [cuts_of(shape)]
        for part in (cuts[0::2], cuts[1::2])
    ]
    workers = max(1, min(24, len(jobs), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        problems = [said for said in pool.map(compile_all, jobs) if said]
    for said in problems:
        print(f"not compiled: {said}", flush=True)
    roof = read_roof()
    found = report.header(args, read_gb_s=round(roof / 1e9, 1))
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    print("product, us and share of the roof | cuBLAS | best, serial | best, early | default | cut")
    found |= {"records": [], "failed": []}
    until, count = time.monotonic() + args.seconds, len(shapes) * len(args.tokens)
    for i, (tokens, shape) in enumerate((t, s) for t in args.tokens for s in shapes):
        share = (until - time.monotonic()) / (count - i)
        try:
            record = measure(shape, tokens, roof, args.seed, time.monotonic() + max(share, 0))
            found["records"].append(record)
            print(line(record), flush=True)
        except (RuntimeError, ValueError) as error:
            found["failed"].append(f"{shape.name}: {error}")
            print(f"failed: {found['failed'][-1]}", flush=True)
    for name in ("absorb", "sum"):
        try:
            found["records"].append(measure_heads(name, args.tokens[0], roof, args.seed))
            print(line(found["records"][-1]), flush=True)
        except (RuntimeError, ValueError) as error:
            found["failed"].append(f"{name}: {error}")
            print(f"failed: {found['failed'][-1]}", flush=True)
    seconds = round(time.monotonic() - start)
    report.finish(args, found, {"seconds": seconds, "failed": found["failed"]})


if __name__ == "__main__":
    main()
