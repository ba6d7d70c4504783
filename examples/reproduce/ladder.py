"""The runs of a ladder file: their learning rates, which are done, and which are left."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from megatron_mlra.command_line.parser import write_json
from megatron_mlra.description.presets import preset_values

_NEEDED = ("data_seed", "tokens_per_step", "presets", "held_out", "gpu_flags", "cpu_flags")
_NEEDED += ("expected", "phases")
"""Keys of a ladder file."""


@dataclass(frozen=True)
class RunSpec:
    """One training run."""

    phase: str
    size: str
    mechanism: str
    seed: int
    """Seed of the initial weights."""
    peak_lr: float
    share: float
    """Trained part of one pass over the text, 0 to 1."""

    @property
    def id(self) -> str:
        """A unique name of the run, usable as a file name."""
        return f"{self.phase}_{self.size}_{self.mechanism}_lr{self.peak_lr:.2e}_seed{self.seed}"


@dataclass
class Ladder:
    """A ladder file and the folder of its results.

    Raises:
        ValueError: the file is unreadable or incomplete; one line that names it.
    """

    file: Path
    results: Path
    """Folder of one JSON per finished run."""
    told: dict[str, Any] = field(default_factory=dict)
    """Content of the ladder file."""

    def __post_init__(self) -> None:
        try:
            self.told = yaml.safe_load(self.file.read_text())
            if lacks := [name for name in _NEEDED if name not in self.told]:
                raise ValueError(f"it lacks {', '.join(lacks)}")
            swept = {
                (phase.get("name"), mechanism)
                for phase in self.told["phases"]
                if "rates" in phase
                for mechanism in phase.get("mechanisms", ())
            }
            for phase in self.told["phases"]:
                if not {"name", "size", "share", "seeds", "mechanisms"} <= set(phase):
                    raise ValueError(f"phase {phase} lacks name, size, share, seeds or mechanisms")
                if ("rates" in phase) == ("rate_of" in phase):
                    raise ValueError(f"phase {phase['name']} needs rates or rate_of")
                for name in ("extension", "lengths", "analyze") if "base" in phase else ():
                    if name not in phase:
                        raise ValueError(f"phase {phase['name']} has a base and no {name}")
                longest = max(phase["lengths"]) if "base" in phase else 0
                if longest > (taken := phase.get("extension", {}).get("seq_length", longest)):
                    raise ValueError(
                        f"contexts of {longest} tokens are more than seq_length {taken} of phase"
                        f" {phase['name']}, and would be cut"
                    )
                told = ("start_seconds", phase["size"], *["beyond_seconds"] * ("base" in phase))
                for name in told:
                    if name not in self.told["expected"]:
                        raise ValueError(f"expected lacks {name}")
                for name in phase["mechanisms"]:
                    if "rate_of" in phase and (phase["rate_of"], name) not in swept:
                        raise ValueError(f"no phase {phase['rate_of']} sweeps rates of {name}")
                    if not self.preset(phase["size"], name).is_file():
                        raise ValueError(f"{self.preset(phase['size'], name)} does not exist")
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{self.file}: {' '.join(str(error).split())}") from None

    def preset(self, size: str, mechanism: str) -> Path:
        """Path of the preset of a mechanism at a size."""
        return self.file.parent / self.told["presets"] / f"{size}_{mechanism}.yaml"

    def check_presets(self) -> None:
        """Refuse presets whose tokens per step are not the ladder's.

        Raises:
            ValueError: names the preset.
        """
        wanted = self.told["tokens_per_step"]
        for phase in self.told["phases"]:
            for mechanism in phase["mechanisms"]:
                preset = self.preset(phase["size"], mechanism)
                values = preset_values(preset)
                tokens = values["global_batch_size"] * values["seq_length"]
                if tokens != wanted:
                    raise ValueError(
                        f"{preset} takes {tokens} tokens per step, the ladder {wanted}"
                    )

    def done(self) -> dict[str, dict[str, Any]]:
        """Run id -> its result.

        Raises:
            ValueError: two results are of other text or tasks; names both.
        """
        files = sorted(self.results.glob("*_seed*.json"))
        found = [json.loads(file.read_text()) for file in files]
        for result in found:
            _check_alike(found[0], result, "data_sha256", f"in {self.results} are of other text")
        for result in (scored := [each for each in found if "tasks_sha256" in each]):
            _check_alike(scored[0], result, "tasks_sha256", f"in {self.results} are of other tasks")
        return {result["id"]: result for result in found}

    def write(self, result: dict[str, Any]) -> str:
        """Write the result of a run; returns one line about the result."""
        write_json(self.results / f"{result['id']}.json", result)
        if result.get("diverged"):
            return f"diverged: {result['diverged']}"
        losses = ", ".join(f"{k} {v['loss']:.4f}" for k, v in result["held_out"].items())
        # A run beyond the loss, and one too short for a rate, has none.
        rate = result["tokens_per_second"]
        return f"{losses}; {rate:,} tokens/s" if rate else losses

    def phase(self, run: RunSpec) -> dict[str, Any]:
        """The ladder file's entry of the phase to which a run belongs."""
        return next(
            phase
            for phase in self.told["phases"]
            if (phase["name"], phase["size"]) == (run.phase, run.size)
            and run.mechanism in phase["mechanisms"]
        )

    def base(self, run: RunSpec) -> RunSpec | None:
        """The run that trained the model of a run beyond the loss; None for a run of the ladder."""
        name = self.phase(run).get("base")
        return name and replace(run, phase=name)

    def runs(self, done: dict[str, dict[str, Any]]) -> Iterator[RunSpec]:
        """All runs whose learning rate follows from the finished runs `done`, in order. Seeds are
        outermost, so that every mechanism has a first seed before one has a second."""
        for phase in self.told["phases"]:
            first = phase.get("first_seed", 1)
            for seed in range(first, first + phase["seeds"]):
                for mechanism in phase["mechanisms"]:
                    for rate in self._rates(phase, mechanism, done):
                        yield RunSpec(
                            phase["name"], phase["size"], mechanism, seed, rate, phase["share"]
                        )

    def left(self, done: dict[str, dict[str, Any]]) -> list[RunSpec]:
        """The runs of `runs` that are not done."""
        return [run for run in self.runs(done) if run.id not in done]

    def waiting(self, done: dict[str, dict[str, Any]]) -> int:
        """How many runs wait for the end of other runs to know their learning rate."""
        return sum(
            phase["seeds"]
            for phase in self.told["phases"]
            for mechanism in phase["mechanisms"]
            if "rate_of" in phase and self.best_rate(mechanism, done, phase["rate_of"]) is None
        )

    def best_rate(
        self, mechanism: str, done: dict[str, dict[str, Any]], phase_name: str = "sweep"
    ) -> float | None:
        """The learning rate with the lowest mean held-out loss in a phase that sweeps rates; None
        before the phase is complete."""
        for phase in self.told["phases"]:
            if phase["name"] == phase_name and mechanism in phase["mechanisms"]:
                losses = self._swept(phase, mechanism, done)
                rates = self._rates(phase, mechanism, done)
                if all(rate in losses for rate in rates) and min(losses.values()) < math.inf:
                    return min(losses, key=losses.__getitem__)
        return None

    def _rates(self, phase: dict, mechanism: str, done: dict[str, dict[str, Any]]) -> list[float]:
        if "rate_of" in phase:
            best = self.best_rate(mechanism, done, phase["rate_of"])
            return [] if best is None else [float(f"{best * phase.get('rate_factor', 1):.2e}")]
        rates = sorted(map(float, phase["rates"]))
        losses = self._swept(phase, mechanism, done)
        for _ in range(phase.get("extend", 0)):
            if len(rates) < 2 or not all(rate in losses for rate in rates):
                break
            best = min(rates, key=losses.__getitem__)
            if best == rates[0]:
                rates.insert(0, float(f"{best * best / rates[1]:.2e}"))
            elif best == rates[-1]:
                rates.append(float(f"{best * best / rates[-2]:.2e}"))
        return rates

    def _swept(
        self, phase: dict, mechanism: str, done: dict[str, dict[str, Any]]
    ) -> dict[float, float]:
        """Learning rate -> mean loss over seeds, for rates all of whose seeds are done. A run that
        diverged counts as infinite."""
        by_rate: dict[float, list[float]] = {}
        for result in done.values():
            if (result["phase"], result["mechanism"]) == (phase["name"], mechanism):
                by_rate.setdefault(result["peak_lr"], []).append(mean_loss(result))
        return {
            rate: fmean(losses) for rate, losses in by_rate.items() if len(losses) >= phase["seeds"]
        }

    def seconds(
        self, run: RunSpec, tokens: int, done: dict[str, dict[str, Any]], at_once: int = 1
    ) -> float:
        """Expected seconds of a run on `tokens` tokens, from the start of its process to its end.

        The speed is the median of finished runs of the same size and mechanism, or else of the
        same size; before there are any, the ladder file's. Runs that shared their GPU with as many
        others are asked first.

        Args:
            at_once: how many runs share the GPU.
        """
        alike = [r for r in done.values() if r["size"] == run.size and r.get("tokens_per_second")]
        alike = [r for r in alike if r.get("runs_at_once", 1) == at_once] or alike
        same = [r for r in alike if r["mechanism"] == run.mechanism] or alike
        expected = self.told["expected"]
        speed = expected[run.size]["tokens_per_second"]
        more = expected["beyond_seconds"] if self.base(run) else 0.0
        if same:
            speed = median(r["tokens_per_second"] for r in same)
        return expected["start_seconds"] + tokens / speed + more


def mean_loss(result: dict[str, Any]) -> float:
    """Mean of the losses on the held-out sets, each set with the same weight; infinite for a run
    that diverged."""
    if result.get("diverged"):
        return math.inf
    return fmean(found["loss"] for found in result["held_out"].values())


def _check_alike(one: dict[str, Any], other: dict[str, Any], key: str, problem: str) -> None:
    """Raise ValueError, with `problem` behind the names of both results, if `key` differs."""
    if other.get(key) != one.get(key):
        raise ValueError(
            f"{one['id']} and {other['id']} {problem}, so they cannot be compared; keep a folder of"
            " results for each"
        )
