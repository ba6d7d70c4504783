"""Measure grouped-query decoding, compared with the memory roof and with other libraries.

`python -m mlra_kernels.benchmarks.grouped_decode` prints one line per shape and provider and ends
with one JSON line. Every result is compared with the fp32 reference first; a wrong result ends the
run without a report.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlra_kernels.benchmarks import providers, report
from mlra_kernels.benchmarks.latent_decode import ERROR_LIMIT, timed, wrong
from mlra_kernels.benchmarks.providers import Calls, Provider
from mlra_kernels.benchmarks.timing import read_roof
from mlra_kernels.benchmarks.workload import MIN_ROTATION_BYTES
from mlra_kernels.grouped_decode import grouped_decode

K, M = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Shape:
    """A rank's part of a model, and the batch that it decodes."""

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


# GQA with 8 key/value heads and 64 query heads, on one of 8, 4 and 2 ranks.
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
    """Random inputs: pages in random order, block tables over `rotation` bytes of cache in all."""
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
    """A provider's relative error on the first block table; see `latent_decode.wrong` if large."""
    error = report.relative_error(call()[0], _ours(w, "torch")[0]()[0])
    if not error <= ERROR_LIMIT[False]:
        wrong(name, w.shape.label, f"relative error {error:.2e}")
    return error


def measure(shape: Shape, roof: float, seed: int, able: list[Provider]) -> list[dict]:
    """Check and time every provider; returns one record per provider."""
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
    args, able = providers.parse(report.parser(__doc__), PROVIDERS)
    roof = read_roof()
    found = report.header(args, read_gb_s=round(roof / 1e9))
    found |= report.gathered(SHAPES, lambda s: measure(s, roof, args.seed, able))
    cells = [r | {"row": r["shape"], "cell": f"{r['us']:.1f}"} for r in found["records"]]
    print(report.table("microseconds", cells))
    report.finish(args, found)


if __name__ == "__main__":
    main()
