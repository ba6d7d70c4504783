"""Compare requests served with context parallelism with the same requests served by one rank.

Usage: python -m support.drivers.context_decoding FOLDER. Each case leaves `NAME-RANK.json`.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.request import Request
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams
from support.decoded_models import MODELS, PAGE, VOCAB

BOTH = ("replicated", "sharded")
LAYOUTS: dict[tuple[int, int], dict[str, tuple[str, ...]]] = {
    (1, 4): {
        "MLA": BOTH, "GLA-2": BOTH[:1], "GLA-4": BOTH[1:], "MLRA-2": BOTH[:1], "MLRA-4": BOTH[1:],
        "MHA": BOTH[:1], "GQA-gated": BOTH[:1], "MQA": BOTH[:1],
    },
    (2, 2): {
        "MLA": BOTH[1:], "GLA-2": BOTH[1:], "MLRA-2-gated": BOTH[1:], "MLRA-4": BOTH,
        "MLRA-4-experts": BOTH[:1], "GQA": BOTH[:1],
    },
    (4, 2): {"MLA": BOTH[:1], "MLRA-2": BOTH[1:], "MLRA-4-gated": BOTH[:1]},
}  # fmt: skip
"""(tensor parallel, context parallel) -> models and their weight modes."""
FP8 = {(1, 4): "MLA", (2, 2): "MLRA-4"}


def cases() -> list[tuple[int, int, str, str, str]]:
    """(tensor parallel, context parallel, model, weight mode, cache dtype)."""
    found = [
        (*layout, name, mode, "auto")
        for layout, models in LAYOUTS.items()
        for name, modes in models.items()
        for mode in modes
    ]
    return found + [(*layout, name, "replicated", "fp8") for layout, name in FP8.items()]


def case_name(case: tuple[int, int, str, str, str]) -> str:
    """Name of a case's files, without the rank."""
    return "-".join(map(str, case))


def random_tensors(name: str) -> dict[str, torch.Tensor]:
    """Global tensors whose logits are of order 1."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    tensors = {}
    for key, shape in expected_tensors(MODELS[name]).items():
        norm = "norm" in key
        scale = 0.2 if norm or "expert_bias" in key else shape[-1] ** -0.5
        tensors[key] = torch.randn(shape, generator=generator) * scale + norm
    return tensors


def serve(name: str, cache_dtype: str, parallel: TensorParallel | None, mode: str):
    """Serve six requests, more than run together: shorter and longer than a page, with prompts
    cached in chunks while others decode, one cancelled, one sampled; all but one begin a page as
    they decode.

    Returns:
        the engine, the requests, and the most pages held at once on each rank.
    """
    options = LoadOptions(
        cache_tokens=20 * PAGE, page_size=PAGE, backend="torch", weight_mode=mode,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    model = load_model(MODELS[name], random_tensors(name).__getitem__, options, parallel=parallel)
    # Memory that was never written must not influence results.
    model.cache.data.fill_(float("nan"))
    engine = Engine(Runner(model, max_batch=4, max_pages=12), chunk_size=40)
    rng = random.Random(11)
    requests: list[Request] = []
    for length, new, temperature in (
        (3, 15, 0.0), (90, 7, 0.0), (16, 18, 0.0), (130, 3, 0.0), (1, 17, 1.0), (47, 4, 0.0),
    ):  # fmt: skip
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        params = SamplingParams(max_new_tokens=new, temperature=temperature, logprobs=True)
        requests.append(engine.submit(prompt, params))
    most, steps = [0] * engine.pool.ranks, 0
    while engine.busy:
        engine.step()
        steps += 1
        if steps == 6:
            engine.cancel(requests[2])
        held = [page for r in (*engine.running, *engine.prefilling) for page in r.pages]
        for rank in range(engine.pool.ranks):
            most[rank] = max(most[rank], sum(page % engine.pool.ranks == rank for page in held))
    assert engine.pool.free == engine.pool.num_pages
    return engine, requests, most


def run_case(case: tuple[int, int, str, str, str], folder: Path) -> dict[str, Any]:
    """This rank's differences to a single rank's results."""
    tp, context, name, mode, cache_dtype = case
    parallel = TensorParallel.over_world(MODELS[name], context)
    assert (parallel.size, parallel.context) == (tp, context)
    engine, requests, most = serve(name, cache_dtype, parallel, mode)
    alone = json.loads((folder / f"alone-{name}-{cache_dtype}.json").read_text())
    worst, same = 0.0, True
    for request, (tokens, logprobs) in zip(requests, alone["requests"], strict=True):
        same &= request.output == tokens
        for ours, theirs in zip(request.logprobs, logprobs, strict=True):
            worst = max(worst, abs(ours - theirs))
    return {
        "same": same, "logprobs": worst, "most": most, "most_alone": alone["most"],
        "rank_bytes": engine.runner.model.cache.allocated_bytes, "alone_bytes": alone["bytes"],
    }  # fmt: skip


def main(folder: Path) -> None:
    """One rank's answers first, then every layout's."""
    from support.world import run_world

    def alone(rank: int) -> None:
        for name, cache_dtype in sorted({(case[2], case[4]) for case in cases()}):
            engine, requests, most = serve(name, cache_dtype, None, "replicated")
            answers = [(request.output, request.logprobs) for request in requests]
            found = {"requests": answers, "most": most}
            found["bytes"] = engine.runner.model.cache.allocated_bytes
            (folder / f"alone-{name}-{cache_dtype}.json").write_text(json.dumps(found))

    def together(rank: int) -> None:
        for case in cases():
            if case[0] * case[1] != torch.distributed.get_world_size():
                continue
            try:
                result = run_case(case, folder)
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"}
            (folder / f"{case_name(case)}-{rank}.json").write_text(json.dumps(result))

    run_world(1, alone, folder / "world1")
    for size in (4, 8):
        run_world(size, together, folder / f"world{size}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
