"""Time of a decoding step on one GPU, against the time its bytes take at the measured bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.model import InferenceModel
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.runner import Chunk, Runner

PAGE = 64
SPARE_BYTES = 4 << 30
"""GPU memory left to activations and graphs when deciding what fits."""


@dataclass(frozen=True)
class Case:
    """One model and what of it the GPU holds."""

    label: str
    model: ModelDescription
    tp: int = 1
    """1: the whole model; else one rank's share, without its collectives."""
    weight_mode: str = "replicated"
    cache_dtype: str = "auto"


def random_reader(
    model: ModelDescription, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 1
) -> Callable[[str], Tensor]:
    """Random global tensors by name, N(0, 0.02), norms near 1; the same for the same seed."""
    shapes = expected_tensors(model)
    order = {name: i for i, name in enumerate(shapes)}

    def read(name: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + order[name])
        out = torch.randn(shapes[name], generator=generator, device=device, dtype=torch.bfloat16)
        out.mul_(0.1 if "norm" in name else 0.02)
        return out.add_(1.0 if "norm" in name else 0.0).to(dtype)

    return read


def gate(case: Case, seed: int) -> float:
    """Relative error of the fast path's logits on two layers, or an error if it is too large.

    Chunked prefill and three steps of the captured decode graph in bfloat16, against the reference
    backend in float32 on the same weights; eager steps must equal captured ones bitwise.

    Raises:
        RuntimeError: the results differ; nothing should be reported.
    """
    small = case.model.replace(num_layers=2)
    prompt = torch.randint(small.vocab_size, (333,), generator=torch.Generator().manual_seed(seed))
    results = []
    for dtype, backend, graphs in (
        ("float32", "torch", False),
        ("bfloat16", "mlra_kernels", False),
        ("bfloat16", "mlra_kernels", True),
    ):
        options = LoadOptions(
            dtype=dtype, backend=backend, cache_tokens=1024, page_size=PAGE, max_positions=1024,
            weight_mode=case.weight_mode,
            cache_dtype=case.cache_dtype if backend == "mlra_kernels" else "auto",
        )  # fmt: skip
        read = random_reader(small, "cuda", seed=seed)
        model = load_model(small, read, options, "cuda", _share(case))
        runner = Runner(model, max_batch=2, max_pages=16, graphs=graphs)
        pages = [11, 3, 7, 5, 0, 15, 2]
        runner.tables.set(0, pages)
        tokens = prompt.tolist()
        logits = [runner.prefill([Chunk(tokens[:200], 0, pages)])]
        logits.append(runner.prefill([Chunk(tokens[200:330], 200, pages)]))
        logits += [
            runner.decode([tokens[n]], [n], [pages]).clone() for n in range(330, len(tokens))
        ]
        results.append(torch.cat(logits))
    expected, eager, captured = results
    error = float((eager - expected).norm() / expected.norm())
    limit = 0.1 if case.cache_dtype == "fp8" else 0.03
    if not error < limit:
        raise RuntimeError(f"{case.label}: logits are off by {error:.1e} (limit {limit})")
    if not torch.equal(eager, captured):
        worst = float((eager - captured).abs().max())
        raise RuntimeError(f"{case.label}: captured steps differ from eager ones by {worst:.1e}")
    return error


def _share(case: Case) -> TensorParallel | None:
    return None if case.tp == 1 else TensorParallel.share(case.tp)


def measure(
    case: Case, contexts: list[int], batches: list[int], roof: float, seed: int
) -> list[dict[str, Any]]:
    """Records of every (batch, context); those that do not fit say what they would need."""
    torch.cuda.empty_cache()
    probe = _load(case, 1, seed)
    token_bytes, weight_bytes = probe.cache.bytes_per_token, probe.weights.bytes_per_step
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - SPARE_BYTES
    del probe
    records, fitting = [], []
    for batch in batches:
        for context in contexts:
            tokens = batch * (context + PAGE)
            record = {
                "label": case.label, "variant": case.model.variant, "tp": case.tp,
                "weight_mode": case.weight_mode, "cache_dtype": case.cache_dtype,
                "batch": batch, "context": context, "weight_bytes": weight_bytes,
                "cache_bytes_per_token": token_bytes, "cache_bytes": batch * context * token_bytes,
            }  # fmt: skip
            record["fits"] = tokens * token_bytes < free
            records.append(record)
            if record["fits"]:
                fitting.append((record, tokens))
    if not fitting:
        return records
    model = _load(case, max(tokens for _, tokens in fitting), seed, max(contexts) + PAGE)
    _fill(model, seed)
    for record, _ in fitting:
        us = step_microseconds(model, record["batch"], record["context"], seed)
        roof_us = (weight_bytes + record["cache_bytes"]) / roof * 1e6
        record |= {"us": us, "roof_us": roof_us, "share": roof_us / us}
    return records


def _load(case: Case, tokens: int, seed: int, max_positions: int = 64) -> InferenceModel:
    options = LoadOptions(
        dtype="bfloat16", backend="mlra_kernels", cache_tokens=tokens, page_size=PAGE,
        max_positions=max_positions, weight_mode=case.weight_mode, cache_dtype=case.cache_dtype,
    )  # fmt: skip
    return load_model(
        case.model, random_reader(case.model, "cuda", seed=seed), options, "cuda", _share(case)
    )


def _fill(model: InferenceModel, seed: int) -> None:
    """Random numbers in the whole cache, in place of prefilling it."""
    torch.manual_seed(seed)
    for layer in model.cache.data:
        if layer.dtype == torch.float8_e4m3fn:
            rope = 2 * model.model.qk_rope_head_dim
            # Any finite e4m3 below 0x78; the RoPE key is bfloat16.
            layer.view(torch.uint8).random_(0, 0x78)
            key = layer.view(torch.uint8)[..., -rope:].view(torch.bfloat16)
            key.copy_(torch.randn(key.shape, device="cuda", dtype=torch.bfloat16))
        else:
            layer.normal_()
    if model.cache.scale is not None:
        model.cache.scale.fill_(1 / 64)


def step_microseconds(model: InferenceModel, batch: int, context: int, seed: int) -> float:
    """Median time of one captured decoding step and the choice of its likeliest tokens."""
    own = -(-(context + 1) // PAGE)
    runner = Runner(model, batch, own, graphs=True)
    order = torch.randperm(batch * own, generator=torch.Generator().manual_seed(seed))
    pages = order.view(batch, own).tolist()
    for row in range(batch):
        runner.tables.set(row, pages[row])
    # The step caches one token more: it attends to `context` tokens.
    logits = runner.decode([1] * batch, [context - 1] * batch, pages)
    if not bool(logits.isfinite().all()):
        raise RuntimeError(f"logits at batch {batch}, context {context} are not finite")
    replay = runner.captured(batch)
    times = []
    for i in range(18):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay().argmax(-1)
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure_prefill(case: Case, context: int, chunk: int, seed: int) -> dict[str, Any]:
    """Time and peak memory of a prompt of `context` tokens, `chunk` at a time."""
    model = _load(case, context + PAGE, seed, context + PAGE)
    pages = torch.randperm(-(-context // PAGE)).tolist()
    runner = Runner(model, 1, len(pages))
    tokens = torch.randint(case.model.vocab_size, (context,)).tolist()
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
        "label": case.label, "tp": case.tp, "context": context, "chunk": chunk,
        "seconds": start.elapsed_time(end) / 1e3, "finite": bool(logits.isfinite().all()),
        "resident_bytes": before, "peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip
