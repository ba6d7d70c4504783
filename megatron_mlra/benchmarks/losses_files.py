"""Reads the losses of runs from event files, logs and printed output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from megatron_mlra.command_line.foreign_text import read_json as read_json_file
from megatron_mlra.command_line.log_line import logged_steps
from megatron_mlra.command_line.parser import read_text

VALIDATION = re.compile(r"^validation at step [\d,]+: lm loss ([\d.]+)", re.MULTILINE)
_MEGATRON = re.compile(r"^ \[.*?\] iteration +(\d+)/ *\d+ \|.*? lm loss: (\S+) \|", re.MULTILINE)
_MEGATRON_INTERVAL = re.compile(r"^ *log_interval \.+ (\d+)$", re.MULTILINE)
_MEGATRON_VALIDATION = re.compile(r"validation loss at (?!.*test set).*?lm loss value: (\S+) \|")
_EVENTS = "events.out.tfevents.*"


@dataclass
class Run:
    """Losses of a run.

    Attributes:
        steps: of the logged lines, ascending.
        losses: mean loss since the previous line, in nats per token.
        validation: the last validation loss, or None.
    """

    steps: list[int]
    losses: list[float]
    validation: float | None = None

    def interval(self) -> int:
        """Steps between the last two lines."""
        return self.steps[-1] - self.steps[-2] if len(self.steps) > 1 else self.steps[-1]

    def tail(self, last: int) -> tuple[float, int, int]:
        """(Mean loss of the last steps, the first of them, the last of them). Only whole intervals
        between lines count, at least one."""
        begins = [max(0, self.steps[0] - self.interval()), *self.steps[:-1]]
        kept = [i for i, begin in enumerate(begins) if begin >= self.steps[-1] - last]
        first = min(kept, default=len(begins) - 1)
        lengths = [end - begin for begin, end in zip(begins, self.steps, strict=True)][first:]
        total = sum(n * loss for n, loss in zip(lengths, self.losses[first:], strict=True))
        return total / sum(lengths), begins[first] + 1, self.steps[-1]


def read(path: Path) -> Run:
    """The losses of a run, from its folder or one of its files.

    Raises:
        ValueError: there are no losses.
        OSError: the file cannot be read.
    """
    if path.is_dir():
        folders = sorted({file.parent for file in path.rglob(_EVENTS)})
        logs = [file for name in ("megatron.log",) if (file := path / name).is_file()]
        found = _of_events(folders) if folders else None
        if found is None and logs:
            found = _of_text(logs[0])
        if found is None:
            raise ValueError(f"{path} holds no event file with `lm loss`, and no megatron.log")
        return found
    if path.match(_EVENTS):
        if (found := _of_events([path])) is None:
            raise ValueError(f"{path} has no curve `lm loss`")
        return found
    return _of_text(path)


def _of_events(places: list[Path]) -> Run | None:
    """The losses in TensorBoard's files or folders; the latest event of a step counts. None without
    losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, tuple[float, float]] = {}
    validations: dict[int, tuple[float, float]] = {}
    for place in places:
        curves = EventAccumulator(str(place), size_guidance={"scalars": 0})
        curves.Reload()
        for name, points in (("lm loss", losses), ("lm loss validation", validations)):
            for event in curves.Scalars(name) if name in curves.Tags()["scalars"] else ():
                if event.wall_time >= points.get(event.step, (0.0,))[0]:
                    points[event.step] = (event.wall_time, event.value)
    if not losses:
        return None
    last = validations[max(validations)][1] if validations else None
    steps = sorted(losses)
    return Run(steps, [losses[step][1] for step in steps], last)


def _of_text(path: Path) -> Run:
    """The losses in printed output, or in megatron.log."""
    text = read_text(path, errors="replace")
    # A resumed run prints the steps after its checkpoint again: the later line counts.
    losses = {told.step: told.loss for told in logged_steps(text)}
    validation = VALIDATION.findall(text)
    if not losses:
        # Megatron also logs the first step of a run, which is no interval.
        interval = max(map(int, _MEGATRON_INTERVAL.findall(text)), default=1)
        losses = {
            int(step): float(loss)
            for step, loss in _MEGATRON.findall(text)
            if int(step) % interval == 0
        }
        validation = _MEGATRON_VALIDATION.findall(text)
    if not losses:
        raise ValueError(f"{path} has no line like 'step 10/300 | lm loss ...'")
    steps = sorted(losses)
    last = float(validation[-1]) if validation else None
    return Run(steps, [losses[step] for step in steps], last)


def read_json(path: Path) -> dict[str, Run]:
    """The runs of a file that --json wrote.

    Raises:
        ValueError: the file is another one.
    """
    try:
        return {
            # Files of earlier versions have no steps, and one loss per step.
            name: Run(
                told.get("steps") or list(range(1, len(told["losses"]) + 1)),
                told["losses"],
                told["validation"],
            )
            for name, told in read_json_file(path).items()
        }
    except (TypeError, KeyError, AttributeError, ValueError):
        raise ValueError(f"{path} is no file that --json wrote") from None


def smooth(run: Run, window: int) -> dict[int, float]:
    """Step -> mean loss over the `window` steps up to that step."""
    count = max(1, round(window / run.interval()))
    return {
        run.steps[i + count - 1]: mean(run.losses[i : i + count])
        for i in range(len(run.losses) - count + 1)
    }
