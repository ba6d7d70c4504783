"""Measure the fused sum over ranks against NCCL's all-reduce followed by add_rms_norm.

`torchrun --nproc-per-node 2 -m mlra_kernels.benchmarks.one_shot --json out.json` prints a row per
number of tokens, and ends with one JSON line. Both run in CUDA graphs: alone, and behind a product
as in a decoding step, where the product's own time is taken off. Results are compared first; a
wrong one ends the run without a report.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mlra_kernels.benchmarks import report
from mlra_kernels.benchmarks.timing import graph_microseconds
from mlra_kernels.decoder import add_rms_norm
from mlra_kernels.one_shot import Peers, join_peers
from mlra_kernels.one_shot.ops import launch
from mlra_kernels.one_shot.peers import MAX_ROWS

ERROR_LIMIT = 1e-2
"""Relative difference of norms between the two ways, in bfloat16."""
EPS = 1e-6
WAYS = {"": {}, " 16 warps": {"warps": 16}, " 8 warps": {"warps": 8}, " pdl": {"pdl": True}}
"""Launches of the kernel: as the operator does, and variations."""


class Inputs:
    """Tensors of one number of tokens: a hidden `[T, k]` and weight `[d, k]` whose product is the
    rank's summand, a residual and a norm weight."""

    def __init__(self, tokens: int, d: int, k: int, seed: int) -> None:
        own = torch.Generator("cuda").manual_seed(seed + dist.get_rank())
        same = torch.Generator("cuda").manual_seed(seed)

        def draw(*size: int, by: torch.Generator) -> Tensor:
            return torch.randn(size, generator=by, device="cuda", dtype=torch.bfloat16)

        self.hidden, self.product = draw(tokens, k, by=own), draw(d, k, by=own) * k**-0.5
        self.residual, self.norm = draw(tokens, d, by=same), draw(d, by=same)
        self.x = self.multiply()

    def multiply(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.product)

    def nccl(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dist.all_reduce(x)
        return add_rms_norm(x, self.residual, self.norm, EPS)

    def one_shot(self, x: Tensor, peers: Peers, **options) -> tuple[Tensor, Tensor]:
        return launch(x, self.residual, self.norm, EPS, peers, **options)


def most(value: float) -> float:
    """The largest value of all ranks."""
    shared = torch.tensor(value, dtype=torch.float64, device="cuda")
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)


def compare(inputs: Inputs, peers: Peers) -> dict[str, float]:
    """The largest relative difference to NCCL, the share of sums with other bits than NCCL's, and
    whether ranks differ."""
    expected = inputs.nccl(inputs.x.clone())
    off = unlike = apart = 0.0
    for options in WAYS.values():
        found = inputs.one_shot(inputs.x, peers, **options)
        unlike = max(unlike, float((found[0] != expected[0]).float().mean()))
        for ours, theirs in zip(found, expected, strict=True):
            off = max(off, report.relative_error(ours, theirs))
            first = ours.clone()
            dist.broadcast(first, 0)
            apart = max(apart, float(not torch.equal(first, ours)))
    return {"error": most(off), "unlike_nccl": most(unlike), "ranks_differ": most(apart)}


def timed(call: Callable[[], object]) -> float:
    """Microseconds of a call in a graph, on the slowest rank."""
    dist.barrier()
    return most(graph_microseconds([call], min_calls=48))


def measure(inputs: Inputs, peers: Peers) -> dict[str, float]:
    """Microseconds by way, alone and behind a product."""
    found = {}
    x, product = inputs.x.clone(), timed(inputs.multiply)
    ways: dict[str, Callable[[Tensor], object]] = {"nccl": inputs.nccl}
    for name, options in WAYS.items():
        ways["one-shot" + name] = lambda x, o=options: inputs.one_shot(x, peers, **o)
    for name, way in ways.items():
        found[name] = timed(lambda way=way: way(x))
        found[f"{name}, behind"] = timed(lambda way=way: way(inputs.multiply())) - product
    return {name: round(us, 2) for name, us in found.items()}


def main() -> None:
    """Parse the command line, measure, report."""
    flags = report.parser(__doc__, seed=1)
    flags.add_argument(
        "--tokens", type=report.whole(1), nargs="+", default=[1, 8, 32, 128], help="of a call"
    )
    flags.add_argument("--hidden", type=report.whole(1), default=3072, help="numbers of a row")
    flags.add_argument(
        "--inner", type=report.whole(1), default=1536, help="inner dim of the product in front"
    )
    args = report.parse(flags)
    if max(args.tokens) > MAX_ROWS:
        flags.error(f"--tokens {max(args.tokens)} is more than a call takes, {MAX_ROWS}")
    if "WORLD_SIZE" not in os.environ:
        sys.exit("error: there is one process; start this by torchrun --nproc-per-node 2 -m")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        check_same(vars(args))
        _run(args)
    finally:
        dist.destroy_process_group()


def check_same(told: dict[str, object]) -> None:
    """End all ranks with one line where one has other arguments than rank 0: it would wait, in a
    sum that the others do not make, for ever."""
    all_told: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_told, told)
    for rank, theirs in enumerate(all_told):
        for name, here in all_told[0].items():
            if theirs[name] != here:
                if dist.get_rank() == 0:
                    flag = f"--{name.replace('_', '-')}"
                    print(
                        f"error: rank {rank} has {flag} {theirs[name]} and rank 0 {here}; start all"
                        " with the same command",
                        file=sys.stderr,
                        flush=True,
                    )
                dist.barrier()  # torchrun ends rank 0 when another exits
                sys.exit(2)


def _run(args) -> None:
    first = dist.get_rank() == 0
    peers = join_peers(
        dist.group.WORLD, max(args.tokens), args.hidden, torch.bfloat16,
        torch.device("cuda", torch.cuda.current_device()),
    )  # fmt: skip
    found = {}
    if first:
        found = report.header(args, gpus=dist.get_world_size(), hidden=args.hidden)
        print(f"microseconds a call; behind: behind a product of inner dim {args.inner}")
    found["records"] = []
    for tokens in args.tokens:
        inputs = Inputs(tokens, args.hidden, args.inner, args.seed)
        checked = compare(inputs, peers)
        if checked["error"] > ERROR_LIMIT or checked["ranks_differ"]:
            report.red(f"{tokens} tokens: {checked}")
        record = {"tokens": tokens, **checked, "us": measure(inputs, peers)}
        found["records"].append(record)
        if first:
            print(f"{tokens} tokens: error {checked['error']:.1e}", end="", flush=True)
            print(
                "".join(f"\n  {way:24} {us:7.2f}" for way, us in record["us"].items()), flush=True
            )
    if first:
        report.finish(args, found)


if __name__ == "__main__":
    main()
