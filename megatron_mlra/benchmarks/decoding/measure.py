"""Time of a decoding step, compared with the time to read its bytes at the measured bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mlra.benchmarks.decoding.kernels import profile_step
from megatron_mlra.benchmarks.decoding.place import Place
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.model import InferenceModel
from megatron_mlra.inference.runner import Runner
from mlra_kernels.benchmarks.timing import milliseconds

PAGE = 64
ONE_GPU = Place()
SPARE_BYTES = 4 << 30
"""GPU memory reserved for activations and graphs in the decision which cases fit."""


@dataclass(frozen=True)
class Case:
    """A model and its cut over ranks. In a world each rank holds its part, and collectives run. On
    one GPU with a cut, the share of one rank is measured, without collectives."""

    label: str
    model: ModelDescription
    tp: int = 1
    """Ranks over which latents or heads are cut."""
    context: int = 1
    """Ranks over which tokens are cut, in addition."""
    weight_mode: str = "replicated"
    cache_dtype: str = "auto"
    all_reduce: str = "auto"
    """See `description.backends.ALL_REDUCES`."""


def random_reader(model: ModelDescription, device: str, seed: int = 1) -> Callable[[str], Tensor]:
    """A function name -> random global tensor: N(0, 0.02^2), norms 1 + N(0, 0.1^2). The tensors
    depend only on the seed."""
    shapes = expected_tensors(model)
    order = {name: i for i, name in enumerate(shapes)}

    def read(name: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + order[name])
        out = torch.randn(shapes[name], generator=generator, device=device, dtype=torch.bfloat16)
        out.mul_(0.1 if "norm" in name else 0.02)
        return out.add_(1.0 if "norm" in name else 0.0)

    return read


def gate(case: Case, seed: int, place: Place = ONE_GPU) -> float:
    """The relative error of the fast path's logits on two layers.

    Chunked prefill and three steps of the captured decode graph in bfloat16 are compared with the
    reference backend in float32 on the same weights. In a world each rank computes the whole model
    by the reference, else the same share. Eager and captured steps must agree bitwise.

    Raises:
        RuntimeError: the error is too large; the case must not be reported.
    """
    small = case.model.replace(num_layers=2, no_rope_pattern=case.model.no_rope_pattern[:2])
    prompt = torch.randint(small.vocab_size, (333,), generator=torch.Generator().manual_seed(seed))
    parallel = place.parallel(small, case.tp, case.context)
    reference = None if place.ranks > 1 else parallel
    ways = [("float32", "torch", False, reference), (place.dtype, place.backend, False, parallel)]
    if not place.rehearsal:
        ways.append((place.dtype, place.backend, True, parallel))
    results = []
    for i, (dtype, backend, graphs, cut) in enumerate(ways):
        ranks = 1 if cut is None else cut.context
        options = LoadOptions(
            dtype=dtype, backend=backend, products=place.products,
            cache_tokens=1024 * ranks, page_size=PAGE,
            max_positions=1024, weight_mode=case.weight_mode,
            cache_dtype=case.cache_dtype if i else "auto",
            all_reduce=case.all_reduce if cut is not None else "auto",
        )  # fmt: skip
        read = random_reader(small, place.device, seed=seed)
        model = load_model(small, read, options, place.device, cut)
        runner = Runner(model, max_batch=2, max_pages=16, graphs=graphs)
        (pages,) = _spread([[11, 3, 7, 5, 0, 15, 2]], ranks, 7)
        runner.tables.set(0, pages)
        tokens = prompt.tolist()
        logits = [runner.prefill([Chunk(tokens[:200], 0, pages)])]
        logits.append(runner.prefill([Chunk(tokens[200:330], 200, pages)]))
        logits += [
            runner.decode([tokens[n]], [n], [pages]).clone() for n in range(330, len(tokens))
        ]
        results.append(torch.cat(logits))
    expected, eager, captured = results[0], results[1], results[-1]
    error = place.most(float((eager - expected).norm() / expected.norm()))
    limit = 0.1 if case.cache_dtype == "fp8" else 0.03
    if not error < limit:
        raise RuntimeError(f"{case.label}: logits are off by {error:.1e} (limit {limit})")
    worst = place.most(float((eager - captured).abs().max()))
    if worst:
        raise RuntimeError(f"{case.label}: captured steps differ from eager ones by {worst:.1e}")
    return error


def _spread(rows: list[list[int]], ranks: int, count: int) -> list[list[int]]:
    """Page ids of each sequence, `count` per sequence, in turn over ranks (inference/context.py).

    Args:
        rows: page numbers within each rank, one row per sequence.
    """
    return [[row[i // ranks] * ranks + i % ranks for i in range(count)] for row in rows]


def measure(
    case: Case,
    contexts: list[int],
    batches: list[int],
    roof: float,
    seed: int,
    place: Place = ONE_GPU,
    profile: bool = False,
) -> list[dict[str, Any]]:
    """A record for each (batch, context). Records that do not fit the GPU have sizes and no times.

    Args:
        roof: bytes per second of the memory.
        profile: also profile every step that is timed, after its timing (kernels.py).
    """
    probe = _load(case, 1, seed, place)
    token_bytes, weight_bytes = probe.cache.bytes_per_token, probe.weights.bytes_per_step
    free = float("inf")
    if not place.rehearsal:
        torch.cuda.empty_cache()
        free = -place.most(SPARE_BYTES - torch.cuda.mem_get_info()[0])
    all_reduce = probe.reduction.path
    del probe
    records, fitting = [], []
    for batch in batches:
        for context in contexts:
            tokens = batch * (context + PAGE * case.context)
            record = {
                "label": case.label, "variant": case.model.variant, "tp": case.tp,
                "context_parallel": case.context, "gpus": place.ranks,
                "weight_mode": case.weight_mode, "cache_dtype": case.cache_dtype,
                "all_reduce": all_reduce,
                "batch": batch, "context": context, "weight_bytes": weight_bytes,
                "cache_bytes_per_token": token_bytes / case.context,
                "cache_bytes": batch * context * token_bytes // case.context,
            }  # fmt: skip
            record["fits"] = tokens * token_bytes / case.context < free
            records.append(record)
            if record["fits"]:
                fitting.append((record, tokens))
    if not fitting:
        return records
    most = max(tokens for _, tokens in fitting)
    model = _load(case, most, seed, place, max(contexts) + PAGE * case.context)
    _fill(model, seed)
    for record, _ in fitting:
        found = time_step(model, record["batch"], record["context"], seed, place, profile)
        if found:
            roof_us = (weight_bytes + record["cache_bytes"]) / roof * 1e6
            record |= {"roof_us": roof_us, "share": roof_us / found["us"]} | found
    return records


def _load(
    case: Case, tokens: int, seed: int, place: Place = ONE_GPU, max_positions: int = 64
) -> InferenceModel:
    options = LoadOptions(
        dtype=place.dtype, backend=place.backend, products=place.products,
        cache_tokens=tokens, page_size=PAGE,
        max_positions=max_positions, weight_mode=case.weight_mode, cache_dtype=case.cache_dtype,
        all_reduce=case.all_reduce,
    )  # fmt: skip
    read = random_reader(case.model, place.device, seed=seed)
    parallel = place.parallel(case.model, case.tp, case.context)
    return load_model(case.model, read, options, place.device, parallel)


def _fill(model: InferenceModel, seed: int) -> None:
    """Fill the whole cache with random numbers, instead of a prefill."""
    torch.manual_seed(seed)
    for layer in model.cache.data:
        if layer.dtype == torch.float8_e4m3fn:
            rope = 2 * model.model.qk_rope_head_dim
            # Bytes below 0x78 are finite in e4m3. The RoPE key is stored in bfloat16.
            layer.view(torch.uint8).random_(0, 0x78)
            key = layer.view(torch.uint8)[..., -rope:].view(torch.bfloat16)
            key.copy_(torch.randn(key.shape, device=key.device, dtype=torch.bfloat16))
        else:
            layer.normal_()
    if model.cache.scale is not None:
        model.cache.scale.fill_(1 / 64)


def time_step(
    model: InferenceModel,
    batch: int,
    context: int,
    seed: int,
    place: Place,
    profile: bool,
) -> dict[str, Any]:
    """`us`: median microseconds of one captured decoding step with its argmax, on the slowest rank;
    with `profile` also the `profile` of such steps on this rank (kernels.py). Nothing in a
    rehearsal, which only runs the step.

    Raises:
        RuntimeError: the logits are not finite.
    """
    ranks = model.parallel.context
    count = -(-(context + 1) // PAGE)
    own = -(-count // ranks)
    runner = Runner(model, batch, count, graphs=not place.rehearsal)
    order = torch.randperm(batch * own, generator=torch.Generator().manual_seed(seed))
    pages = _spread(order.view(batch, own).tolist(), ranks, count)
    for row in range(batch):
        runner.tables.set(row, pages[row])
    # The step caches the last of `context` tokens, and attends to all of them.
    logits = runner.decode([1] * batch, [context - 1] * batch, pages)
    if place.most(float(not bool(logits.isfinite().all()))):
        raise RuntimeError(f"logits at batch {batch}, context {context} are not finite")
    if place.rehearsal:
        return {}
    replay = runner.captured(batch)

    def step() -> Tensor:
        return replay()[1].argmax(-1)

    times = [milliseconds(step) for _ in range(18)][3:]
    found = {"us": place.most(statistics.median(times) * 1e3)}
    return found | {"profile": profile_step(step)} if profile else found


def measure_prefill(
    case: Case, context: int, chunk: int, seed: int, place: Place
) -> dict[str, Any]:
    """Seconds and peak bytes on this rank of a prefill of `context` tokens, `chunk` at a time."""
    spare = PAGE * case.context
    model = _load(case, context + spare, seed, place, context + spare)
    draw, count = torch.Generator().manual_seed(seed), -(-context // PAGE)
    order = torch.randperm(-(-count // case.context), generator=draw).tolist()
    (pages,) = _spread([order], case.context, count)
    runner = Runner(model, 1, len(pages))
    tokens = torch.randint(case.model.vocab_size, (context,), generator=draw).tolist()
    runner.prefill([Chunk(tokens[:chunk], 0, pages)])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for at in range(0, context, chunk):
        logits = runner.prefill([Chunk(tokens[at : at + chunk], at, pages)])
    end.record()
    end.synchronize()
    return {
        "label": case.label, "tp": case.tp, "context_parallel": case.context, "context": context,
        "chunk": chunk,
        "seconds": start.elapsed_time(end) / 1e3, "finite": bool(logits.isfinite().all()),
        "resident_bytes": before, "peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip
