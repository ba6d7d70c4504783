"""Serve a checkpoint by worlds of 1, 2 and 4 ranks, and rehearse examples/one_host.

Usage: python -m support.drivers.one_host FOLDER. `FOLDER/job.json` names the checkpoint and has the
benchmark's arguments; each world leaves `served-RANKS-CONTEXT.json`, the benchmark its own file.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import torch

from megatron_mlra.benchmarks.decoding.cli import main as benchmark
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams
from support.world import run_world

PROMPTS = [[1, 2, 3], [40, 41, 42, 43, 44, 45, 46], [100]]
WORLDS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2))
"""Ranks, and over how many of them tokens are cut."""


def serve(checkpoint: str, context: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of every prompt, by all ranks of this world."""
    folder = open_checkpoint(checkpoint)
    parallel = None
    if torch.distributed.get_world_size() > 1:
        parallel = TensorParallel.over_world(folder.description, context)
    options = LoadOptions(cache_tokens=512, page_size=16)
    model = load_model(folder.description, folder.tensor, options, parallel=parallel)
    engine = Engine(Runner(model, max_batch=4, max_pages=8))
    params = SamplingParams(max_new_tokens=16, logprobs=True)
    requests = [engine.submit(prompt, params) for prompt in PROMPTS]
    for _ in engine.run():
        pass
    return [(request.output, request.logprobs) for request in requests]


def main(folder: Path) -> None:
    """Every world, then the rehearsal."""
    job = json.loads((folder / "job.json").read_text())
    for ranks, context in WORLDS:

        def work(rank: int, context: int = context, ranks: int = ranks) -> None:
            served = serve(job["checkpoint"], context)
            if rank == 0:
                (folder / f"served-{ranks}-{context}.json").write_text(json.dumps(served))

        run_world(ranks, work, folder / f"world-{ranks}-{context}")

    def rehearse(rank: int) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            benchmark(job["benchmark"])
        (folder / f"printed-{rank}.txt").write_text(printed.getvalue())

    run_world(4, rehearse, folder / "rehearsal")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
