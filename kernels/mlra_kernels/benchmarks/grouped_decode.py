"""Measure grouped-query decoding, the rival of latents, against the memory roof and its peers.

`python -m mlra_kernels.benchmarks.grouped_decode` prints one line per shape and provider and ends
with one JSON line. Every result is compared with the fp32 reference first; a red comparison ends
the run without a report.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from mlra_kernels.benchmarks import providers
from mlra_kernels.benchmarks.latent_decode import ERROR_LIMIT, commit, timed
from mlra_kernels.benchmarks.output import output_file
from mlra_kernels.benchmarks.providers import Calls, Provider, chosen
from mlra_kernels.benchmarks.results import write_json
from mlra_kernels.benchmarks.timing import read_roof
from mlra_kernels.benchmarks.workload import MIN_ROTATION_BYTES
from mlra_kernels.grouped_decode import grouped_decode

K, M = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Shape:
    """What a rank holds of a model, and the batch it decodes."""

    model: str
    batch: int
    length: int
    kv_heads: int
    heads: int
    dim: int = 128
    page_size: int = 64

    @property
    def label(self) -> str:
        """Short name."""
        return f"{self.model} {self.batch} x {self.length // K}K"

    @property
    def cache_bytes(self) -> int:
        """Bytes of 16-bit keys and values that one call must read."""
        return 4 * self.batch * self.length * self.kv_heads * self.dim


# GQA with eight key heads and 64 queries: one rank of eight, of four, of two.
SHAPES = [
    Shape(f"GQA-8/TP{tp}", batch, length, kv_heads=8 // tp, heads=64 // tp)
    for tp in (8, 4, 2)
    for batch, length in ((1, 128 * K), (1, 512 * K), (1, M), (32, 8 * K), (128, 4 * K))
]


@dataclass
class Workload:
    """Random inputs of a shape; `tables` holds several block tables over disjoint pages."""

    shape: Shape
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: list[torch.Tensor]
    seqlens: torch.Tensor
    softmax_scale: float


def make_workload(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    seed: int,
    rotation: int = MIN_ROTATION_BYTES,
) -> Workload:
    """Draw inputs: pages in random order, block tables over `rotation` bytes of cache in all."""
    gen = torch.Generator(device).manual_seed(seed)
    each = -(-shape.length // shape.page_size)
    copies = max(2, -(-rotation // shape.cache_bytes))
    pages = copies * shape.batch * each

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen, device=device, dtype=dtype)

    order = torch.randperm(pages, generator=gen, device=device).int()
    return Workload(
        shape=shape,
        query=draw(shape.batch, shape.heads, shape.dim),
        keys=draw(pages, shape.page_size, shape.kv_heads, shape.dim),
        values=draw(pages, shape.page_size, shape.kv_heads, shape.dim),
        tables=list(order.view(copies, shape.batch, each)),
        seqlens=torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device),
        softmax_scale=shape.dim**-0.5,
    )


def _ours(w: Workload, backend: str) -> Calls:
    return [
        lambda table=table: grouped_decode(
            w.query, w.keys, w.values, table, w.seqlens, w.softmax_scale, backend=backend
        )
        for table in w.tables
    ]


def _flash(run: Callable[..., torch.Tensor]) -> Callable[[Workload], Calls]:
    def build(w: Workload) -> Calls:
        def call(table: torch.Tensor):
            out = run(w.query[:, None], w.keys, w.values, table, w.seqlens, w.softmax_scale)
            return out[:, 0], None

        return [lambda table=table: call(table) for table in w.tables]

    return build


def _flashinfer(w: Workload) -> Calls:
    """FlashInfer's batch decoding wrapper, planned once per block table (not timed)."""
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

    s, device, calls = w.shape, w.keys.device, []
    last = (w.seqlens - 1) % s.page_size + 1
    for table in w.tables:
        starts, pages = providers.page_lists(table, s.batch)
        workspace = torch.zeros(providers.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(
            starts, pages, last, s.heads, s.kv_heads, s.dim, s.page_size,
            q_data_type=w.query.dtype, kv_data_type=w.keys.dtype, sm_scale=w.softmax_scale,
        )  # fmt: skip
        calls.append(lambda wrapper=wrapper: (wrapper.run(w.query, (w.keys, w.values)), None))
    return calls


PROVIDERS = [
    Provider("mlra_kernels", lambda w: True, lambda w: _ours(w, "mlra_kernels")),
    Provider("FlashInfer decode", lambda w: True, _flashinfer, providers.without_flashinfer),
    Provider(
        "FlashAttention-3", lambda w: True, _flash(providers.flash_attention_3),
        providers.without_flash_attention_3,
    ),
    Provider(
        "FlashAttention-4", lambda w: True, _flash(providers.flash_attention_4),
        providers.without_flash_attention_4,
    ),
]  # fmt: skip


def gate(w: Workload, call, name: str) -> float:
    """Return a provider's relative error on the first block table; exit if it is too large."""
    want, _ = _ours(w, "torch")[0]()
    error = ((call()[0].float() - want.float()).norm() / want.float().norm()).item()
    if not error <= ERROR_LIMIT[False]:
        sys.exit(
            f"RED: {name} on {w.shape.label}: relative error {error:.2e}: nothing is reported until"
            " it is right"
        )
    return error


def measure(shape: Shape, roof: float, seed: int, able: list[Provider]) -> list[dict]:
    """Check and time every provider; one record each."""
    w = make_workload(shape, torch.bfloat16, "cuda", seed)
    records = []
    for provider in able:
        found = timed(provider, w, gate)
        if found is None:
            continue
        us, error = found
        share = shape.cache_bytes / us / 1e-6 / roof
        records.append({
            "shape": shape.label, "provider": provider.name, "batch": shape.batch,
            "length": shape.length, "us": round(us, 2), "share": round(share, 4), "error": error,
        })  # fmt: skip
        print(
            f"{shape.label:26} {provider.name:22} {us:9.1f} us {100 * share:6.1f} % of the roof"
            f"  error {error:.1e}",
            flush=True,
        )
    return records


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    names = [provider.name for provider in PROVIDERS]
    parser.add_argument("--providers", nargs="+", choices=names, help="default: all there are")
    parser.add_argument("--json", type=output_file, help="where to write the records")
    parser.add_argument("--commit", default=None, help="commit to name in the report")
    parser.add_argument("--seed", type=int, default=None, help="default: the clock")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA GPU, and torch sees none")
    try:
        able = chosen(PROVIDERS, args.providers)
    except ValueError as error:
        sys.exit(f"error: {error}")
    seed = args.seed if args.seed is not None else time.time_ns() % 2**20
    roof = read_roof()
    report = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": args.commit or commit(), "seed": seed,
        "read_gb_s": round(roof / 1e9),
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in report.items()), flush=True)
    report["records"] = [r for shape in SHAPES for r in measure(shape, roof, seed, able)]
    if args.json:
        write_json(args.json, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
