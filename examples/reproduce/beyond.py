"""What the loss does not say of a model: one run of stages, each left out where it was done.

    python examples/reproduce/beyond.py LOCK PLAN.json

run_ladder.py starts it. Stages: train the base, unless its checkpoint is kept; analyze it; score
the cloze set and the long contexts that it takes; train it on at a longer context; score all of
them again. A stage that trains is a process of its own; the others share this one's imports.
"""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Stage = dict[str, Any]
"""{does: 'train', 'analyze' or 'evaluate', words: of its command line, done: the file it leaves}"""


def stages(
    plan: dict[str, Any], folder: Path, base: Path, train: list[str] | None, extend: list[str]
) -> list[Stage]:
    """What a run does, in order.

    Args:
        plan: {analyze: flags or None, tasks: folder, lengths: of its files, context: tokens
            that the base takes, tokenizer: folder}.
        base: checkpoint of the base.
        train: flags of its training, None where it is trained.
        extend: flags of the training at a longer context, whose `--save` is `folder`/extended.
    """
    made: list[Stage] = []

    def add(does: str, words: list[Any], done: Path) -> None:
        made.append({"does": does, "words": [*map(str, words)], "done": str(done)})

    def score(checkpoint: Path, longest: int, name: str) -> None:
        files = ["cloze", *(f"long_{n}" for n in plan["lengths"] if n <= longest)]
        words = [checkpoint, "--task", *(plan["tasks"] / f"{file}.jsonl" for file in files)]
        # In the precision that tells near ties apart; the data may name a tokenizer's old place.
        words += ["--dtype", "float32", "--tokenizer", plan["tokenizer"]]
        add("evaluate", [*words, "--json", folder / name], folder / name)

    if train is not None:
        add("train", train, base / "held_out.json")
    if plan["analyze"] is not None:
        out = folder / "analysis.json"
        add("analyze", [base, *plan["analyze"], "--json", out], out)
    score(base, plan["context"], "base.json")
    add("train", extend, folder / "extended" / "held_out.json")
    score(folder / "extended", max(plan["lengths"]), "extended.json")
    return made


def told(folder: Path, analyzed: bool) -> dict[str, Any]:
    """What the stages left, for the run's result."""
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
    """Works through stages; a signal to stop is handed on to the training in progress."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        if self.child is None:
            sys.exit(0)  # the stage is begun anew next time
        self.child.send_signal(signal.SIGTERM)

    def work(self, todo: list[Stage]) -> int:
        """Do what is not done; the exit code of the stage that failed, else 0."""
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
            self.child = subprocess.Popen(command)
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
    # In place of this script's folder, whose modules have everyday names.
    sys.path.remove(str(Path(__file__).parent))
    sys.path.insert(0, str(ROOT))
    runner = Run()
    lock = open(sys.argv[1], "w")  # noqa: SIM115  held until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("has the device", flush=True)
    return runner.work(json.loads(Path(sys.argv[2]).read_text()))


if __name__ == "__main__":
    sys.exit(main())
