"""Runs the training entry from tests, and reads its losses."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support import ROOT, warm

TINY = """
base: debug
num_layers: 2
hidden_size: 64
ffn_hidden_size: 128
num_attention_heads: 4
q_lora_rank: 32
kv_lora_rank: 64
qk_head_dim: 16
qk_pos_emb_head_dim: 8
v_head_dim: 16
seq_length: 32
max_position_embeddings: 32
data_path: {corpus}
split: 80,10,10
train_iters: 8
lr_warmup_iters: 2
min_lr: 2.0e-4
global_batch_size: 4
micro_batch_size: 2
log_interval: 1
eval_interval: 4
eval_iters: 2
save_interval: 4
"""

GET_BATCH = "megatron_mlra.training.steps:get_batch"
"""The function, by module and name, in which a rank of tests of hangs falls asleep."""

WHOLE = ("--eval-at-start", "--log-interval", "1")
"""Flags of the uninterrupted run."""


def write_corpus(folder: Path) -> Path:
    """Write a dataset of about 60 KB of byte tokens; returns its prefix."""
    source = ROOT / "tests" / "support" / "corpus.txt"  # losses are compared with numbers
    return tokenize(source.read_text().split("\n\n") * 4, folder / "text")


def tokenize(documents: list[str], prefix: Path) -> Path:
    """Write documents as a dataset of byte tokens; returns its prefix."""
    text = prefix.with_suffix(".jsonl")
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    # Runs in this process, which has imported Megatron; the tool has tests of its own.
    from megatron_mlra.data.cli import main

    argv = ["--tokenizer", "byte", "--input", str(text), "--output-prefix", str(prefix)]
    assert main(argv) == 0
    return prefix


@dataclass
class Run:
    """A run of the entry that has ended."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def losses(self) -> dict[int, float]:
        """Step -> training loss, from TensorBoard's event files under the run's folder."""
        return scalars(self.folder, "lm loss")


def check_refused(run: Run, error: str) -> None:
    """Check for one line with `error`, exit code 2, and nothing left behind."""
    assert run.code == 2, run.err
    assert run.out == ""
    assert run.err.count("\n") == 1, run.err
    assert run.err.startswith("error: ")
    assert error in run.err
    left = {path.name for path in run.folder.iterdir()}
    assert left <= {"preset.yaml", "stdout-0.txt", "stderr-0.txt", "data", "save"}


def scalars(folder: Path, name: str) -> dict[int, float]:
    """Step -> value of one curve in the event files under `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[int, float] = {}
    for events in sorted({path.parent for path in folder.rglob("events.out.*")}):
        curves = EventAccumulator(str(events), size_guidance={"scalars": 0})
        curves.Reload()
        if name in curves.Tags()["scalars"]:
            values |= {event.step: event.value for event in curves.Scalars(name)}
    return values


class Entry:
    """Starts runs in processes forked from a process that has imported Megatron."""

    def __init__(self, session: Path) -> None:
        """Connect to the process behind this session's folder."""
        self.connection = warm.connect(session)
        self.connection.sendall(b"j")
        self.lines = self.connection.makefile("rw")

    def close(self) -> None:
        """Leave the process to others, or to its end."""
        self.lines.close()
        self.connection.close()

    def _ask(self, question: dict) -> dict:
        print(json.dumps(question), file=self.lines, flush=True)
        return json.loads(self.lines.readline())

    def start(self, folder: Path, *argv: object, **job: object) -> list[int]:
        """Start a run in `folder`; `job` as in entry_worker.py. Returns the ranks' process ids."""
        folder.mkdir(parents=True, exist_ok=True)
        return self._ask({"argv": [*map(str, argv)], "folder": str(folder), **job})["pids"]

    def wait(self, folder: Path, pids: list[int]) -> Run:
        """Wait for a started run; its code is the exit code of the first rank that failed."""
        codes = [self._ask({"wait": pid})["code"] for pid in pids]

        def said(name: str) -> str:
            return "".join((folder / f"{name}-{i}.txt").read_text() for i in range(len(pids)))

        return Run(next(filter(None, codes), 0), said("stdout"), said("stderr"), folder)

    def run(self, folder: Path, *argv: object, **job: object) -> Run:
        """Run to the end."""
        return self.wait(folder, self.start(folder, *argv, **job))


def wait_for(file: Path, text: str, seconds: float = 300) -> None:
    """Wait until `file` holds `text`."""
    deadline = time.monotonic() + seconds
    while not (file.exists() and text in file.read_text(errors="replace")):
        assert time.monotonic() < deadline, f"{file} never said {text!r}"
        time.sleep(0.02)


def wait_for_end(pids: list[str], seconds: float = 60) -> None:
    """Wait until none of these processes runs."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if runs_still(pid)]:
        assert time.monotonic() < deadline, f"processes {left} still run"
        time.sleep(0.02)


def runs_still(pid: str | int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def run_to_end(command: list[object], seconds: float, **named: Any) -> subprocess.CompletedProcess:
    """Run a program, and end it with its descendants if it takes longer: ranks that hang would keep
    their GPUs busy.

    Args:
        seconds: most seconds.
        named: of `subprocess.Popen`.

    Raises:
        AssertionError: it took longer; with what it printed, if that is captured.
    """
    run = subprocess.Popen([*map(str, command)], text=True, **named)
    try:
        said = run.communicate(timeout=seconds)
    except BaseException as error:
        for process in (*psutil.Process(run.pid).children(recursive=True), run):
            process.kill()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise AssertionError(f"not done in {seconds:.0f} s: {run.communicate()}") from None
    return subprocess.CompletedProcess(command, run.returncode, *said)


CAPTURED: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
"""Arguments of `run_to_end` with which the result has what was printed."""
