"""Measure the operators around attention, and grouped decoding, compared with the memory roof.

`python -m mlra_kernels.benchmarks.operators --json out.json` prints one line per operator at the
sizes of MLRA-4's 2.9B model and ends with one JSON line. Every result is compared with the fp32
reference first; a wrong result ends the run without a report.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mlra_kernels import decoder
from mlra_kernels import latent_projections as projections
from mlra_kernels.benchmarks import report
from mlra_kernels.benchmarks.timing import graph_microseconds, read_roof
from mlra_kernels.grouped_decode import grouped_decode
from mlra_kernels.latent_decode import latent_cache_append, rope_tables
from mlra_kernels.latent_projections import reference

ERROR_LIMIT = 1e-2
"""Relative difference of norms, 16 bits against float32."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the operators' inputs; the defaults are those of MLRA-4's 2.9B model at TP1."""

    tokens: int = 8192
    """Tokens of a training step."""
    batch: int = 64
    """Sequences of a decoding step."""
    length: int = 8192
    """Cached tokens per sequence in grouped-query decoding."""
    hidden: int = 3072
    mlp: int = 8192
    heads: int = 24
    kv_heads: int = 8
    branches: int = 4
    dim: int = 128
    """Size of a head and of a latent."""
    rope: int = 64


@dataclass(frozen=True)
class Case:
    """One operator with inputs."""

    name: str
    call: Callable[[], Tensor]
    """The operator, which may write in place."""
    expected: Callable[[], Tensor]
    """The reference."""
    moved: int
    """Bytes that must be read and written."""


def cases(sizes: Sizes, dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    """Every operator with random inputs."""
    yield from _training(sizes, dtype, device, seed)
    yield from _decoding(sizes, dtype, device, seed)


def _draw(dtype: torch.dtype, device: str, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator, device=device, dtype=dtype)


def _training(z: Sizes, dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    draw = _draw(dtype, device, seed)
    tables = rope_tables(z.tokens, z.rope, device=device)
    q, latents = draw(z.tokens, 1, z.heads, z.dim + z.rope), draw(z.tokens, 1, z.branches, 1, z.dim)
    up = draw(z.branches, z.heads, 2 * z.dim, z.dim) * z.dim**-0.5
    w_uk, w_uv = up[:, :, : z.dim], up[:, :, z.dim :]
    k_rope, values = draw(z.tokens, 1, z.rope), draw(z.tokens, 1, z.branches, z.heads, z.dim)
    weight = draw(z.branches, z.dim)
    for name, arguments in (
        ("rotate_absorb", (q, w_uk, *tables)),
        ("join_keys", (latents, k_rope, *tables)),
        ("sum_branches", (values, w_uv, z.branches**-0.5)),
        ("rms_norm", (latents[:, :, :, 0], weight, 1e-6, 1.7)),
    ):
        run = getattr(projections, name)
        yield _case(name, run, getattr(reference, name + "_reference"), arguments)


def _decoding(z: Sizes, dtype: torch.dtype, device: str, seed: int) -> Iterator[Case]:
    draw, b = _draw(dtype, device, seed), z.batch
    x, residual, weight = draw(b, z.hidden), draw(b, z.hidden), draw(z.hidden)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = (x + residual).float()
        return functional.rms_norm(wide, wide.shape[-1:], weight.float(), eps)

    arguments = (x, residual, weight, 1e-6)
    yield _case("add_rms_norm", lambda *a: decoder.add_rms_norm(*a)[1], norm, arguments)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, -1)
        return functional.silu(gate) * up

    yield _case("silu_mul", decoder.silu_mul, swiglu, (draw(b, 2 * z.mlp),))

    tables, places = rope_tables(z.length, z.rope, device=device), torch.arange(b, device=device)
    positions = places * 7 % z.length
    heads = draw(b, z.heads, z.dim + z.rope)
    before, (cos, sin) = heads.float(), (t[positions][:, None] for t in tables)

    def rotated() -> Tensor:
        first, second = before[..., z.dim :].chunk(2, -1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat((before[..., : z.dim], *turned), -1)

    def rotate() -> Tensor:
        return decoder.rotate_heads(heads, z.dim, *tables, positions)

    yield Case("rotate_heads", rotate, rotated, 2 * b * z.heads * z.rope * heads.element_size())
    yield _append(z, draw, tables, positions, places)
    yield _grouped(z, draw, places)


def _append(z: Sizes, draw, tables: tuple, positions: Tensor, places: Tensor) -> Case:
    width = z.branches * z.dim + z.rope
    kv, weight, cache = draw(z.batch, width), draw(z.branches, z.dim), draw(z.batch, 64, width)
    slots = places * 64 + 3

    def append(backend: str) -> Tensor:
        latent_cache_append(
            kv, weight, *tables, positions, slots, cache,
            latent_scale=1.0, norm_eps=1e-6, backend=backend,
        )  # fmt: skip
        return cache[:, 3].clone()

    moved = 2 * kv.nbytes
    return Case(
        "latent_cache_append", lambda: append("mlra_kernels"), lambda: append("torch"), moved
    )


def _grouped(z: Sizes, draw, places: Tensor) -> Case:
    pages = -(-z.length // 64)
    q, table = (
        draw(z.batch, z.heads, z.dim),
        places[:, None] * pages + places.new_tensor(range(pages)),
    )
    keys, values = (draw(z.batch * pages, 64, z.kv_heads, z.dim) for _ in range(2))
    lengths = torch.full((z.batch,), z.length, dtype=torch.int32, device=q.device)

    def decode(backend: str) -> Tensor:
        scale = z.dim**-0.5
        return grouped_decode(q, keys, values, table.int(), lengths, scale, backend=backend)[0]

    moved = 2 * z.batch * z.length * z.kv_heads * z.dim * keys.element_size()
    return Case("grouped_decode", lambda: decode("mlra_kernels"), lambda: decode("torch"), moved)


def _case(name: str, run: Callable, by_reference: Callable, arguments: tuple) -> Case:
    """A case that reads its tensors once and writes its result once."""
    moved = sum(x.nbytes for x in arguments if isinstance(x, Tensor))
    result = run(*arguments)
    wide = tuple(
        x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )
    return Case(name, lambda: run(*arguments), lambda: by_reference(*wide), moved + result.nbytes)


def error(case: Case) -> float:
    """Relative difference of norms between an operator's result and the reference."""
    expected = case.expected()
    return report.relative_error(case.call(), expected)


def measure(case: Case, roof: float) -> dict:
    """Check and time one operator."""
    off = error(case)
    if not off <= ERROR_LIMIT:
        report.red(f"{case.name}: relative error {off:.2e}")
    us = graph_microseconds([case.call])
    gbs = case.moved / us / 1e3
    record = {
        "operator": case.name, "us": round(us, 2), "gb_s": round(gbs, 1),
        "share": round(gbs * 1e9 / roof, 4), "error": off,
    }  # fmt: skip
    print(
        f"{case.name:22} {us:9.1f} us {gbs:8.0f} GB/s {100 * record['share']:6.1f} % of the roof"
        f"  error {off:.1e}",
        flush=True,
    )
    return record


def main() -> None:
    """Parse the command line, measure, report."""
    flags = report.parser(__doc__, seed=1)
    flags.add_argument("--tokens", type=report.whole(1), default=8192, help="of a training step")
    flags.add_argument(
        "--batch", type=report.whole(1), default=64, help="sequences of a decoding step"
    )
    flags.add_argument(
        "--length", type=report.whole(1), default=8192, help="cached tokens per sequence"
    )
    args = report.parse(flags)
    roof = read_roof()
    found = report.header(args, read_gb_s=round(roof / 1e9, 1))
    sizes = Sizes(args.tokens, args.batch, args.length)
    planned = cases(sizes, torch.bfloat16, "cuda", args.seed)
    found["records"] = [measure(case, roof) for case in planned]
    report.finish(args, found)


if __name__ == "__main__":
    main()
