"""Measure the absorbed core of training: forward and backward, whole sequences, documents, chunks.

`python -m mlra_kernels.benchmarks.latent_attention` prints one line per workload of MLRA-4's 2.9B
shape and provider (core_peers.py), a table of all, and one JSON line. The output and the queries'
gradient of two heads are compared with float32 attention first. A wrong result of this project's
kernels ends the run without a report; a peer that fails or is wrong is left out, with the reason.
"""

import math
import random
import sys
from itertools import accumulate, pairwise

import torch

from mlra_kernels.benchmarks import providers, report
from mlra_kernels.benchmarks.core_peers import PROVIDERS, Core, Span
from mlra_kernels.benchmarks.providers import Provider, left_out
from mlra_kernels.benchmarks.timing import graph_microseconds, stream_microseconds
from mlra_kernels.latent_attention import key_ranges, misfit, query_tiles, reads_of
from mlra_kernels.latent_attention.reference import latent_attention_reference

PAIRS, GROUPS, LATENT, ROPE = 96, 4, 128, 64
SCALE = (LATENT + ROPE) ** -0.5
ERROR_LIMIT = 1e-2
"""Relative difference of norms, bf16 against float32."""


def document_spans(tokens: int, mean: int, seed: int) -> list[Span]:
    """Spans of packed documents with log-normal lengths (sigma 1.2)."""
    draw, sigma = random.Random(seed), 1.2
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(max(1, round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))
    lengths[-1] -= sum(lengths) - tokens
    return [(a, b, a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


def workloads(tokens: int, mean: int, seed: int) -> dict[str, tuple[int, int, list[Span]]]:
    """Name -> (sequences, keys per sequence, spans), each of `tokens` queries in total."""
    found: dict[str, tuple[int, int, list[Span]]] = {}
    for length in (2048, 4096, 8192, 16384):
        if tokens % length == 0:
            found[f"sequences of {length}"] = tokens // length, length, [(0, length, 0, length)]
    found[f"documents, {mean} on average"] = 1, tokens, document_spans(tokens, mean, seed)
    half, whole = tokens // 2, 2 * tokens
    for rank, (first, second) in enumerate(((half, whole), (tokens, whole - half))):
        spans = [(0, half, 0, first), (half, tokens, 0, second)]
        found[f"rank {rank} of 2, sequence of {whole}"] = 1, whole, spans
    return found


def scored_pairs(spans: list[Span]) -> int:
    """Number of (query, key) pairs of a head."""
    return sum((b - a) * (stop - start) - (b - a) * (b - a - 1) // 2 for a, b, start, stop in spans)


def flops(spans: list[Span], sequences: int) -> tuple[int, int]:
    """FLOPs of forward and of backward: 2 and 5 products over the scored pairs."""
    width = LATENT + ROPE
    work = 2 * PAIRS * sequences * scored_pairs(spans)
    return work * (width + LATENT), work * (3 * width + 2 * LATENT)


def error(core: Core, out: torch.Tensor, grad_query: torch.Tensor) -> float:
    """The largest relative difference of norms, of the first and the last head."""
    worst = 0.0
    ranges = key_ranges(core.spans).to(core.query.device)
    heads, groups = core.query.shape[2], core.key.shape[2]
    for head in (0, heads - 1):
        group = head * groups // heads
        q = core.query.detach()[:, :1, head : head + 1].float().requires_grad_()
        k = core.key.detach()[:, :1, group : group + 1].float()
        expected, _ = latent_attention_reference(q, k, core.latent, core.scale, ranges)
        (wanted,) = torch.autograd.grad(expected, q, core.grad[:, :1, head : head + 1].float())
        for found, true in ((out, expected.detach()), (grad_query, wanted)):
            difference = found.detach()[:, :1, head : head + 1].float() - true
            worst = max(worst, (difference.norm() / true.norm()).item())
    return worst


def chosen_reads(spans: list[Span], keys: int, way: str) -> dict[str, torch.Tensor]:
    """The keyword of `latent_attention` that says what queries read: of `auto`, training's."""
    if way == "tiles":
        return {"tiles": query_tiles(spans)}
    if way == "ranges":
        return {"ranges": key_ranges(spans)}
    return {} if spans == [(0, keys, 0, keys)] else reads_of(spans)


def make_core(sequences: int, keys: int, spans: list[Span], way: str, device: str = "cuda") -> Core:
    """Random inputs of a workload in bfloat16."""
    queries = spans[-1][1]

    def draw(tokens: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(tokens, sequences, heads, width, device=device, dtype=torch.bfloat16)

    return Core(
        draw(queries, PAIRS, LATENT + ROPE).requires_grad_(),
        draw(keys, GROUPS, LATENT + ROPE).requires_grad_(),
        draw(queries, PAIRS, LATENT), spans,
        {kind: x.to(device) for kind, x in chosen_reads(spans, keys, way).items()}, SCALE,
    )  # fmt: skip


def measure(name: str, core: Core, able: list[Provider]) -> list[dict]:
    """Check and time one workload by every provider that takes it; one record each."""
    records = []
    for provider in able:
        if not provider.fits(core):
            continue
        try:
            found = timed(core, provider)
        except Exception as problem:  # of a peer, whatever it is
            if provider.name == "mlra_kernels":
                raise
            left_out(name, provider, problem)
            continue
        records.append({"workload": name, "provider": provider.name, **found})
        print(line(records[-1]), flush=True)
        torch.cuda.empty_cache()
    return records


def timed(core: Core, provider: Provider) -> dict:
    """The times of a provider's passes, and its error.

    Raises:
        ArithmeticError: a peer's result is wrong.
    """
    passes, own = provider.build(core), provider.name == "mlra_kernels"
    off = error(core, passes.forward(), passes.both()[0])
    if not off <= ERROR_LIMIT:
        if own:
            report.red(f"{core.spans[:2]}: relative error {off:.2e}")
        raise ArithmeticError(f"wrong: relative error {off:.2e}")

    def milliseconds(call) -> float:
        # A peer's launches need not be fit for capture, and these passes outlast their launches.
        us = graph_microseconds([call], min_calls=3) if own else stream_microseconds(call)
        return us / 1e3

    ahead = milliseconds(passes.forward)
    back = milliseconds(passes.both) - (milliseconds(passes.ahead) if passes.ahead else ahead)
    work = flops(core.spans, core.query.shape[1])
    return {
        "reads": next(iter(core.reads), "causal"), "spans": len(core.spans),
        "forward_ms": round(ahead, 3), "forward_tflop_s": round(work[0] / ahead / 1e9),
        "backward_ms": round(back, 3), "backward_tflop_s": round(work[1] / back / 1e9),
        "error": off,
    }  # fmt: skip


def line(r: dict) -> str:
    """One record for the eye."""
    return (
        f"{r['workload']:32} {r['provider']:26} {r['spans']:4} spans  {r['reads']:6}"
        f"  forward {r['forward_ms']:7.2f} ms {r['forward_tflop_s']:4} TFLOP/s"
        f"  backward {r['backward_ms']:7.2f} ms {r['backward_tflop_s']:4} TFLOP/s"
        f"  error {r['error']:.1e}"
    )


def table(records: list[dict]) -> str:
    """Markdown: forward and backward of every workload, a column per provider."""
    cells = [
        r
        | {
            "row": r["workload"],
            "cell": f"{r['forward_ms']:.2f} / {r['backward_ms']:.2f}"
            f" ({r['forward_tflop_s']} / {r['backward_tflop_s']})",
        }
        for r in records
    ]
    return report.table("forward / backward, ms (TFLOP/s)", cells)


def main() -> None:
    """Parse the command line, measure, report."""
    flags = report.parser(__doc__, seed=1)
    flags.add_argument(
        "--tokens", type=report.whole(1), default=16384, help="queries, in all sequences"
    )
    flags.add_argument("--mean-document", type=report.whole(1), default=1000, help="tokens")
    flags.add_argument(
        "--reads", choices=("auto", "ranges", "tiles"), default="auto",
        help="the form in which queries' keys are given; auto: as in training",
    )  # fmt: skip
    args, able = providers.parse(flags, PROVIDERS)
    if said := misfit(LATENT, ROPE):
        sys.exit(f"this benchmark {said}")
    torch.manual_seed(args.seed)
    found = report.header(args, tokens=args.tokens)
    planned = workloads(args.tokens, args.mean_document, args.seed)
    found |= report.gathered(
        planned, lambda name: measure(name, make_core(*planned[name], args.reads), able)
    )
    print(table(found["records"]))
    report.finish(args, found)


if __name__ == "__main__":
    main()
