"""Evaluates a model beyond the loss, in stages; a stage whose output file exists is skipped.
A file that was made by other flags is refused (made_by.py).

    python examples/reproduce/beyond.py LOCK PLAN.json

run_ladder.py starts this script. The stages: train the base model, unless its checkpoint is kept;
analyze its attention; score the cloze set and the long contexts that fit the base model; continue
training at a longer context; score the cloze set and all long contexts. Each training is a process
of its own; the other stages run in this process and share its imports.
"""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import made_by
from megatron_mlra.command_line.parser import fail
from megatron_mlra.command_line.signals import get_when_parent_ends

ROOT = Path(__file__).parents[2]

Stage = dict[str, Any]
"""{does: 'train', 'analyze' or 'evaluate'; words: the stage's command line; done: the file that the
stage writes at its end; made_by: the commands that this file comes of, flags alone}"""

PLACES = ("--save", "--load", "--finetune", "--data-cache-path")
"""Flags of a training that say where, and whether it goes on, not what it makes."""


def stages(
    plan: dict[str, Any], folder: Path, base: Path, train: list[str], extend: list[str]
) -> list[Stage]:
    """The stages of a run, in order.

    Args:
        plan: {analyze: flags of `mlra analyze`, or None; tasks: folder of the tasks; lengths:
            tokens of each long-context file; context: most tokens of the base model; tokenizer:
            folder beside that of the tasks}.
        folder: where the run writes.
        base: checkpoint of the base model.
        train: flags of the base model's training, a stage where its checkpoint is not kept.
        extend: flags of the training at a longer context, whose `--save` is `folder`/extended.
    """
    made: list[Stage] = []
    places = {folder: "WORK", plan["tasks"].parent: "TOKENS", ROOT: "ROOT"}

    def flags(words: list[Any]) -> list[str]:
        words = [*map(str, words)]
        return made_by.flags_of(words, {str(each): name for each, name in places.items()}, PLACES)

    def add(does: str, words: list[Any], done: Path, after: list[list[str]]) -> None:
        told = {"words": [*map(str, words)], "done": str(done), "made_by": [*after, flags(words)]}
        made.append({"does": does, **told})

    def score(checkpoint: Path, longest: int, name: str, after: list[list[str]]) -> None:
        files = ["cloze", *(f"long_{n}" for n in plan["lengths"] if n <= longest)]
        words = [checkpoint, "--task", *(plan["tasks"] / f"{file}.jsonl" for file in files)]
        # float32 tells near ties apart. --tokenizer, because the path in the checkpoint may be
        # that of another machine.
        words += ["--dtype", "float32", "--tokenizer", plan["tokenizer"]]
        add("evaluate", [*words, "--json", folder / name], folder / name, after)

    if not (base / "held_out.json").is_file():
        add("train", train, base / "held_out.json", [])
    trained = [flags(train)]
    if plan["analyze"] is not None:
        out = folder / "analysis.json"
        add("analyze", [base, *plan["analyze"], "--json", out], out, trained)
    score(base, plan["context"], "base.json", trained)
    add("train", extend, folder / "extended" / "held_out.json", trained)
    extended = [*trained, flags(extend)]
    score(folder / "extended", max(plan["lengths"]), "extended.json", extended)
    return made


def check(folder: Path, todo: list[Stage]) -> None:
    """Refuse a run's folder with files of other flags, see `made_by.begin`.

    Raises:
        ValueError: names the file, one difference, and what to remove.
    """
    wanted = {}
    for stage in todo:
        if folder in (done := Path(stage["done"])).parents:
            wanted[done.relative_to(folder).parts[0]] = stage["made_by"]
    made_by.begin(folder, wanted, f"remove {folder}, and the run begins anew")


def told(folder: Path, analyzed: bool) -> dict[str, Any]:
    """The part `beyond` of the run's result, read from the files that the stages wrote.

    Args:
        folder: where the run wrote.
        analyzed: whether the attention was analyzed.
    """
    found: dict[str, Any] = {}
    if analyzed:
        found["analysis"] = json.loads((folder / "analysis.json").read_text())
        del found["analysis"]["checkpoint"]
    for name in ("base", "extended"):
        scores = json.loads((folder / f"{name}.json").read_text())["task"]
        found[name] = {Path(file).stem: score for file, score in scores.items()}
    extended = json.loads((folder / "extended" / "held_out.json").read_text())
    found["extension"] = {
        "steps": extended["step"],
        "seq_length": extended["seq_length"],
        "held_out": {name: each["loss"] for name, each in extended["sets"].items()},
    }
    return found


class Run:
    """Works through stages, and hands SIGTERM on to the training in progress."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        if self.child is None:
            sys.exit(0)  # the next call begins the stage anew
        self.child.send_signal(signal.SIGTERM)

    def work(self, todo: list[Stage]) -> int:
        """Run the stages that are not done; returns the exit code of a stage that failed, or 0."""
        for stage in todo:
            if Path(stage["done"]).is_file():
                continue
            print(f"stage: {stage['does']} -> {stage['done']}", flush=True)
            code = self._do(stage)
            if code or self.stopping or not Path(stage["done"]).is_file():
                return code
        return 0

    def _do(self, stage: Stage) -> int:
        if stage["does"] == "train":
            command = [sys.executable, str(ROOT / "pretrain_mlra.py"), *stage["words"]]
            # A training that outlives this process would keep the GPU.
            dies = partial(get_when_parent_ends, signal.SIGKILL)
            self.child = subprocess.Popen(command, preexec_fn=dies)
            code = self.child.wait()
            self.child = None
            return code
        main: Callable[[list[str]], int]
        if stage["does"] == "analyze":
            from megatron_mlra.evaluation.analysis.cli import main
        else:
            from megatron_mlra.evaluation.cli import main
        return main(stage["words"])


def main() -> int:
    """Take the device, work through the plan; returns the exit code."""
    # This script's folder would shadow others' modules: its modules have everyday names.
    sys.path.remove(str(Path(__file__).parent))
    sys.path.insert(0, str(ROOT))
    runner = Run()
    lock = open(sys.argv[1], "w")  # noqa: SIM115  held until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("has the device", flush=True)
    plan = Path(sys.argv[2])
    todo = json.loads(plan.read_text())
    try:
        check(plan.parent, todo)
    except (ValueError, OSError) as error:
        return fail(str(error), 2)
    return runner.work(todo)


if __name__ == "__main__":
    sys.exit(main())
