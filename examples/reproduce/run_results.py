"""Makes the result of a finished run, one small JSON, from its log and its held-out losses."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import beyond
from ladder import Ladder, RunSpec
from megatron_mlra.checkpoint.files.tracker import candidates, step_of
from megatron_mlra.command_line.log_line import logged_steps
from megatron_mlra.command_line.parser import write_text
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.cost.cache import kv_cache_bytes_per_token
from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import preset_values
from megatron_mlra.version import installed

BEGUN = "has the device"
"""The line that one_run.py and beyond.py print once they have the GPU."""

BEGUN_WITH = "data_sha256.json"
"""File in a run's folder: dataset -> SHA-256 of its tokens, as the run began."""

_NOT_FINITE = re.compile(
    r"^error: .*\b(?:loss is|grad norm)\b.*\b(?:nan|inf|infinite)\b.*", re.M | re.I
)


@dataclass
class Corpus:
    """The folder of datasets that tokenized.py wrote."""

    folder: Path

    @cached_property
    def told(self) -> dict[str, Any]:
        """Content of tokens.json.

        Raises:
            ValueError: the file does not exist.
        """
        file = self.folder / "tokens.json"
        try:
            return json.loads(file.read_text())
        except OSError:
            raise ValueError(
                f"{file} does not exist; run tokenized.py --out {self.folder}"
            ) from None

    @cached_property
    def tasks(self) -> dict[str, Any] | None:
        """Content of tasks/tasks.json; None before make_tasks.py has run."""
        file = self.folder / "tasks" / "tasks.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def prefix(self, name: str) -> Path:
        """The path of a dataset without `.bin`, as `--data-path` takes it."""
        return (self.folder / name).resolve()

    @property
    def digests(self) -> dict[str, str]:
        """Dataset -> SHA-256 of its tokens."""
        return {name: found["sha256"] for name, found in self.told["sets"].items()}

    @property
    def task_digests(self) -> dict[str, str]:
        """Task -> SHA-256 of its file; none before make_tasks.py has run."""
        return {name: each["sha256"] for name, each in (self.tasks or {}).get("files", {}).items()}

    def check(self, names: list[str], results: Iterable[dict[str, Any]] = ()) -> None:
        """Refuse a folder without these datasets, or with other tokens or tasks than those of
        `results`.

        Raises:
            ValueError: a dataset or task is missing or differs; names it.
        """
        results = list(results)
        for name in names:
            if name not in self.told["sets"] or not self.prefix(name).with_suffix(".idx").is_file():
                raise ValueError(f"{self.folder} has no dataset {name}; run tokenized.py")
            if sha256(self.prefix(name).with_suffix(".bin")) != self.digests[name]:
                raise ValueError(
                    f"{self.folder}/{name}.bin is not the one of tokens.json; run tokenized.py to"
                    " its end, or make the tokens again"
                )
        for result in results:
            for name, digest in result["data_sha256"].items():
                if self.digests.get(name) != digest:
                    raise ValueError(
                        f"the tokens of {name} in {self.folder} are not those of {result['id']};"
                        " make both of the same packages (get_packages.sh names those that differ)"
                        " or give another --results"
                    )
        if self.tasks is None:
            return
        for name, digest in self.task_digests.items():
            file = self.folder / "tasks" / f"{name}.jsonl"
            if not file.is_file() or sha256(file) != digest:
                raise ValueError(
                    f"{file} is not the one of tasks.json; run make_tasks.py to its end"
                )
        for result in results:
            if result.get("tasks_sha256", self.task_digests) != self.task_digests:
                raise ValueError(
                    f"the tasks in {self.folder} are not those of {result['id']}; make both by the"
                    " same make_tasks.py and tokens, or give another --results"
                )

    def check_tasks(self, ladder: Ladder) -> None:
        """Refuse tasks without a file that runs beyond the loss are scored on.

        Raises:
            ValueError: names the file.
        """
        lengths = sorted({n for phase in ladder.told["phases"] for n in phase.get("lengths", ())})
        needed = ["cloze", *(f"long_{n}" for n in lengths)] if lengths else []
        lacks = [name for name in needed if name not in self.task_digests]
        if self.tasks and lacks:
            raise ValueError(
                f"{self.folder}/tasks has no {lacks[0]}; run make_tasks.py --lengths"
                f" {' '.join(map(str, lengths))}"
            )

    def note(self, folder: Path) -> None:
        """Write into a run's folder with which tokens the run begins."""
        write_text(folder / BEGUN_WITH, json.dumps(self.digests) + "\n")

    def check_begun(self, folders: Iterable[Path]) -> None:
        """Refuse interrupted runs that began with other tokens.

        Raises:
            ValueError: names the run and the dataset.
        """
        for folder in folders:
            file = folder / BEGUN_WITH
            if not file.is_file() or not latest_step(folder / "checkpoint"):
                continue
            for name, digest in json.loads(file.read_text()).items():
                if self.digests.get(name) != digest:
                    raise ValueError(
                        f"{folder.name} began with other tokens of {name} than those in"
                        f" {self.folder}; make the same again, or remove {folder}"
                    )

    def steps(self, run: RunSpec, ladder: Ladder) -> int:
        """Steps of a run: its share of one pass over the text, so that no token is seen twice.

        Raises:
            ValueError: the warm-up is longer.
        """
        values = preset_values(ladder.preset(run.size, run.mechanism))
        tokens = self.told["sets"]["train"]["tokens"]
        tokens = min(tokens, ladder.told.get("pass_tokens", tokens))
        samples = (tokens - 1) // values["seq_length"]
        steps = int(samples // values["global_batch_size"] * run.share)
        if steps <= values.get("lr_warmup_iters", 0):
            raise ValueError(f"{self.folder}: the text is {steps} steps, fewer than the warm-up")
        return steps


def latest_step(checkpoint: Path) -> int:
    """The step at which an interrupted run resumes; 0 without a checkpoint."""
    found = candidates(checkpoint)
    return step_of(found[0]) if found else 0


def _latest(log: str) -> str:
    """The part of a log that the latest attempt wrote: it begins with the line of its command."""
    return log[log.rfind("\n$ ") + 1 :]


def last_error(log: str) -> str:
    """The latest attempt's last line that begins with `error:`, or else its last line."""
    lines = [line for line in _latest(log).splitlines() if line.strip()] or ["no output"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


def divergence(log: str) -> str | None:
    """The latest attempt's error line on a loss or gradient that is not finite; None for other
    failures."""
    found = _NOT_FINITE.search(_latest(log))
    return found and found[0]


def versions() -> dict[str, str]:
    """Package -> version, for Python and the packages that influence results."""
    names = ("torch", "megatron-core", "transformer-engine", "triton", "megatron-mlra")
    return {"python": platform.python_version(), **installed(*names)}


def collect(
    run: RunSpec, ladder: Ladder, corpus: Corpus, folder: Path, log: str, diverged: str | None
) -> dict[str, Any]:
    """The result of a run of the ladder that has ended.

    Args:
        diverged: the line of `divergence`, or None.
    """
    # A resumed run logs the steps after its checkpoint again: the later line counts.
    steps = {told.step: told for told in logged_steps(log) if isfinite(told.loss)}
    rates = [told.tokens_per_second for told in steps.values() if told.tokens_per_second]
    held_out = read_held_out(folder / "checkpoint") if diverged is None else {}
    return {
        **header(run, ladder, corpus),
        "held_out": held_out,
        **({"diverged": diverged} if diverged else {}),
        "tokens_per_second": int(median(rates)) if rates else None,
        "losses": [[step, told.loss] for step, told in sorted(steps.items())],
        "attempts": log.count(BEGUN),
        "data_sha256": corpus.digests,
        "versions": versions(),
    }


def collect_beyond(
    run: RunSpec, ladder: Ladder, corpus: Corpus, base: Path, folder: Path, diverged: str | None
) -> dict[str, Any]:
    """The result of a run beyond the loss that has ended.

    Args:
        base: checkpoint with which the run began.
        folder: where the run wrote.
        diverged: the line of `divergence`, or None.
    """
    found = header(run, ladder, corpus)
    if diverged is None:
        analyzed = shape_of(run, ladder).attention == "mlra"
        found |= {"held_out": read_held_out(base), "beyond": beyond.told(folder, analyzed)}
    else:
        found |= {"held_out": {}, "diverged": diverged}
    return {
        **found,
        "tokens_per_second": None,
        "extension": ladder.phase(run)["extension"],
        "data_sha256": corpus.digests,
        "tasks_sha256": corpus.task_digests,
        "versions": versions(),
    }


def read_held_out(checkpoint: Path) -> dict[str, Any]:
    """Held-out set -> {loss: nats per token, tokens}, from the checkpoint's held_out.json."""
    told = json.loads((checkpoint / "held_out.json").read_text())
    return {
        name: {"loss": found["loss"], "tokens": found["tokens"]}
        for name, found in told["sets"].items()
    }


def shape_of(run: RunSpec, ladder: Ladder) -> ModelDescription:
    """The description of a run's model."""
    values = preset_values(ladder.preset(run.size, run.mechanism))
    return from_megatron_args({"swiglu": True} | values)


def header(run: RunSpec, ladder: Ladder, corpus: Corpus) -> dict[str, Any]:
    """The part of a run's result that is known before the run begins."""
    shape = shape_of(run, ladder)
    counted = parameters(shape)
    count = corpus.steps(run, ladder)
    return {
        "id": run.id,
        "phase": run.phase,
        "size": run.size,
        "mechanism": run.mechanism,
        "variant": shape.variant,
        "seed": run.seed,
        "data_seed": ladder.told["data_seed"],
        "peak_lr": run.peak_lr,
        "share": run.share,
        "steps": count,
        "train_tokens": count * ladder.told["tokens_per_step"],
        "parameters": counted.total,
        "without_embedding": counted.total - counted.embedding - counted.output_layer,
        "kv_bytes_per_token": {str(tp): kv_cache_bytes_per_token(shape, tp) for tp in (1, 4, 8)},
    }
