"""Measure the absorbed core of training: forward and backward, whole sequences, documents, chunks.

`python -m mlra_kernels.benchmarks.latent_attention` prints one line per workload of MLRA-4's 2.9B
shape and ends with one JSON line. The output and the queries' gradient of two heads are compared
with float32 attention first; a wrong result ends the run without a report.
"""

import math
import random
import sys
from itertools import accumulate, pairwise

import torch

from mlra_kernels.benchmarks import report
from mlra_kernels.benchmarks.timing import graph_microseconds
from mlra_kernels.latent_attention import (
    key_ranges,
    latent_attention,
    misfit,
    query_tiles,
    reads_of,
)
from mlra_kernels.latent_attention.reference import latent_attention_reference

PAIRS, GROUPS, LATENT, ROPE = 96, 4, 128, 64
SCALE = (LATENT + ROPE) ** -0.5
ERROR_LIMIT = 1e-2
"""Relative difference of norms, bf16 against float32."""

Span = tuple[int, int, int, int]
"""See `key_ranges`."""


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


def error(query, key, grad, spans, out, grad_query) -> float:
    """The largest relative difference of norms, of the first and the last head."""
    worst = 0.0
    ranges = key_ranges(spans).to(query.device)
    for head in (0, PAIRS - 1):
        group = head * GROUPS // PAIRS
        q = query[:, :1, head : head + 1].float().requires_grad_()
        k = key[:, :1, group : group + 1].float()
        expected, _ = latent_attention_reference(q, k, LATENT, SCALE, ranges)
        (wanted,) = torch.autograd.grad(expected, q, grad[:, :1, head : head + 1].float())
        for ours, theirs in ((out, expected.detach()), (grad_query, wanted)):
            difference = ours[:, :1, head : head + 1].float() - theirs
            worst = max(worst, (difference.norm() / theirs.norm()).item())
    return worst


def chosen_reads(spans: list[Span], keys: int, way: str) -> dict[str, torch.Tensor]:
    """The keyword of `latent_attention` that says what queries read: of `auto`, training's."""
    if way == "tiles":
        return {"tiles": query_tiles(spans)}
    if way == "ranges":
        return {"ranges": key_ranges(spans)}
    return {} if spans == [(0, keys, 0, keys)] else reads_of(spans)


def measure(name: str, sequences: int, keys: int, spans: list[Span], way: str) -> dict:
    """Check and time one workload."""
    queries = spans[-1][1]
    reads = {kind: x.cuda() for kind, x in chosen_reads(spans, keys, way).items()}

    def draw(tokens: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(tokens, sequences, heads, width, device="cuda", dtype=torch.bfloat16)

    query, key = draw(queries, PAIRS, LATENT + ROPE), draw(keys, GROUPS, LATENT + ROPE)
    grad, leaves = draw(queries, PAIRS, LATENT), (query.requires_grad_(), key.requires_grad_())

    def forward() -> torch.Tensor:
        return latent_attention(query, key, LATENT, SCALE, **reads)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, grad)

    off = error(query.detach(), key.detach(), grad, spans, forward().detach(), both()[0])
    if not off <= ERROR_LIMIT:
        report.red(f"{name}: relative error {off:.2e}")
    ahead = graph_microseconds([forward], min_calls=3) / 1e3
    back = graph_microseconds([both], min_calls=3) / 1e3 - ahead
    work = flops(spans, sequences)
    record = {
        "workload": name, "reads": next(iter(reads), "causal"), "spans": len(spans),
        "forward_ms": round(ahead, 3), "forward_tflop_s": round(work[0] / ahead / 1e9),
        "backward_ms": round(back, 3), "backward_tflop_s": round(work[1] / back / 1e9),
        "error": off,
    }  # fmt: skip
    print(
        f"{name:32} {len(spans):4} spans  {record['reads']:6}"
        f"  forward {ahead:7.2f} ms {record['forward_tflop_s']:4} TFLOP/s"
        f"  backward {back:7.2f} ms {record['backward_tflop_s']:4} TFLOP/s  error {off:.1e}",
        flush=True,
    )
    return record


def main() -> None:
    """Parse the command line, measure, report."""
    flags = report.parser(__doc__, seed=1)
    flags.add_argument("--tokens", type=int, default=16384, help="queries, in all sequences")
    flags.add_argument("--mean-document", type=int, default=1000, help="tokens")
    flags.add_argument(
        "--reads", choices=("auto", "ranges", "tiles"), default="auto",
        help="the form in which queries' keys are given; auto: as in training",
    )  # fmt: skip
    args = report.parse(flags)
    if said := misfit(LATENT, ROPE):
        sys.exit(f"this benchmark {said}")
    torch.manual_seed(args.seed)
    found = report.header(args, tokens=args.tokens)
    planned = workloads(args.tokens, args.mean_document, args.seed)
    found["records"] = [measure(name, *work, args.reads) for name, work in planned.items()]
    report.finish(args, found)


if __name__ == "__main__":
    main()
