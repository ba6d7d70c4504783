"""Kill ranks of a small run at random, and compare its losses with those of an undisturbed run.

    mlra soak --config debug --data-path data/text --work runs/soak

Both runs are started by `mlra launch`. Each kill is a SIGKILL to a random rank at a random moment.
The launcher then restarts the job, which continues from its last checkpoint. The exit code is 0 if
the losses of all steps are equal in both runs. `restart_seconds` are the times from each kill to
the first new step, `lost_steps` the numbers of steps that were repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_mlra.command_line.early import reads, writes
from megatron_mlra.command_line.log_line import STEP
from megatron_mlra.command_line.numbers import whole
from megatron_mlra.command_line.parser import OneLineParser, fail, make_folder, write_json
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.command_line.ranks import REFUSED
from megatron_mlra.description.presets import a_preset

LINGER = 10.0
"""Seconds in which processes that a job leaves behind may still write errors."""
START = re.compile(r"^training [^|]*: [\d,]+ parameters")


def parser() -> OneLineParser:
    """The parser of the command's own flags."""
    flags = OneLineParser(
        description="Kill ranks of a small run at random, and compare its losses with those of an"
        " undisturbed run.",
        epilog="Other flags go to the training entry.",
        passes_on=True,
    )
    add = flags.add_argument
    reads(add("--config", required=True, help="a preset by name or path"), a_preset)
    work = add(
        "--work",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="for logs and checkpoints, empty or new",
    )
    writes(work, lambda folder, flag: make_folder(folder, f"{flag} {folder}"))
    add("--kills", type=whole(0), default=40, help="number of kills (default: 40)")
    add("--steps", type=whole(1), default=300, help="steps of the run (default: 300)")
    add("--ranks", type=whole(1), default=2, help="processes of the run (default: 2)")
    add("--save-interval", type=whole(1), default=2, help="steps between checkpoints (default: 2)")
    add("--seed", type=int, default=0, help="which kills are drawn (default: 0)")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Run both jobs, print the result and write it to `soak.json` in --work.

    Returns:
        The exit code: 0 if all losses are equal, 1 for a difference or a failure, 2 for bad input.
        A run left alone that fails: its own exit code.
    """
    args, rest = parser().parse_known_args(argv)
    try:
        return soak(args, rest)
    except ValueError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(str(error), 1)


def soak(args: argparse.Namespace, rest: list[str]) -> int:
    """The work of `main`, with parsed flags and the words behind them.

    Raises:
        ValueError: the jobs cannot begin; one line that names the flag and the fix.
        OSError: a file of --work cannot be written.
    """
    # A kill that is due later may come after the run has ended.
    last = args.steps - args.save_interval
    if args.kills >= last:
        least = args.kills + args.save_interval + 1
        raise ValueError(f"--kills {args.kills} needs at least --steps {least}")
    make_folder(args.work, f"--work {args.work}")
    if any(args.work.iterdir()):
        raise ValueError(f"--work {args.work} is not empty; use another folder")
    alone = Job(args, "alone", rest)
    if code := alone.run([]):
        why = alone.errors.last
        return fail(why if code == REFUSED and why else alone.failed(), code)
    chosen = random.Random(args.seed)
    moments = sorted(chosen.sample(range(1, last), args.kills))
    killed = Job(args, "killed", rest)
    code = killed.run([(step, chosen.randrange(args.ranks), chosen.random()) for step in moments])
    if code:
        fail(killed.failed(), code)
    different = [n for n in range(1, args.steps + 1) if alone.losses.get(n) != killed.losses.get(n)]
    result = {
        "steps": args.steps,
        "kills": len(killed.restarts),
        "exit_code": code,
        "final_loss_alone": alone.losses.get(args.steps),
        "final_loss_killed": killed.losses.get(args.steps),
        "steps_that_differ": len(different),
        "seconds_alone": round(alone.seconds, 1),
        "seconds_killed": round(killed.seconds, 1),
        "restart_seconds": [round(seconds, 2) for seconds in killed.restarts],
        "lost_steps": killed.lost,
    }
    write_json(args.work / "soak.json", result, indent=1)
    report(result)
    return int(bool(code or different or len(killed.restarts) < args.kills))


class Errors:
    """Copies what a job says on standard error into a file.

    Attributes:
        last: the last line that begins with `error:`, without that.
        lost: why the file is not whole; empty if it is.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.last, self.lost = file, "", ""
        # Unbuffered, so that nothing is left that closing could not write.
        self._out = open(file, "wb", buffering=0)  # noqa: SIM115
        self._reader = threading.Thread(target=self._copy, daemon=True)

    def begin(self, stream: IO[str]) -> None:
        """Read `stream` to its end, also where the file cannot be written."""
        self._stream = stream
        self._reader.start()

    def end(self) -> None:
        """Wait for the stream's end, which processes that the job left behind may put off."""
        self._reader.join(LINGER)

    def _copy(self) -> None:
        for line in self._stream:
            if line.startswith("error: "):
                self.last = line.removeprefix("error: ").strip()
            try:
                self._out.write(line.encode())
            except OSError as error:
                self.lost = str(error.strerror)


class Job:
    """A launched job; its printed steps are read while it runs."""

    def __init__(self, args: argparse.Namespace, name: str, rest: list[str]) -> None:
        self.steps, self.folder = args.steps, args.work / name
        self.folder.mkdir()
        self.errors = Errors(self.folder / "errors.txt")
        self.losses: dict[int, str] = {}
        self.restarts: list[float] = []
        self.lost: list[int] = []
        self.seconds = 0.0
        save = self.folder / "save"
        self.command = [
            *(sys.executable, "-m", "megatron_mlra.launch", "--standalone"),
            *("--nproc-per-node", str(args.ranks), "--max-restarts", str(args.kills + 5)),
            *("--monitor-interval", "0.1", "-m", "megatron_mlra.training"),
            *("--config", args.config, "--save", str(save), "--load", str(save)),
            *("--train-iters", str(args.steps), "--lr-decay-iters", str(args.steps)),
            *("--save-interval", str(args.save_interval), "--log-interval", "1"),
            *("--eval-iters", "0", "--split", "1,0,0", *rest),
        ]

    def run(self, kills: list[tuple[int, int, float]]) -> int:
        """Run the job to its end.

        Args:
            kills: of each kill the step after which it comes, the rank, and the fraction of a
                step's time by which it comes later.

        Returns:
            The launcher's exit code.
        """
        begin, kills = time.perf_counter(), list(kills)
        killed_at, back, reached, last = None, False, 0, begin
        pipe = subprocess.PIPE
        job = subprocess.Popen(self.command, stdout=pipe, stderr=pipe, text=True, errors="replace")
        self.errors.begin(job.stderr)
        with _ended(job), bar(total=self.steps, desc=self.folder.name, unit="steps") as shown:
            for line in job.stdout:
                back = back or bool(START.match(line))
                if not (found := STEP.match(line)):
                    continue
                now, step = time.perf_counter(), int(found[1].replace(",", ""))
                if self.losses.setdefault(step, found[3]) != found[3]:
                    before = self.losses[step]
                    shown.write(f"step {step}: loss {found[3]}, before the kill {before}")
                    self.losses[step] = found[3]
                # After a kill, lines of earlier steps may still be in the pipe.
                if killed_at is not None and back:
                    self.lost[-1] += step <= reached
                    if step <= reached:
                        continue
                    self.restarts.append(now - killed_at)
                    killed_at = None
                shown.update(max(0, step - reached))
                pause, last, reached = now - last, now, max(step, reached)
                if kills and killed_at is None and step >= kills[0][0]:
                    _, rank, part = kills.pop(0)
                    time.sleep(part * min(pause, 1.0))
                    killed_at, back = time.perf_counter(), False
                    self.lost.append(0)
                    kill_rank(job.pid, rank)
                    self._drop_old_checkpoints()
        self.seconds = time.perf_counter() - begin
        code = job.wait()
        self.errors.end()
        return code

    def failed(self) -> str:
        """The line on a job that failed: why, and where to read more."""
        name = self.folder.name
        why = self.errors.last or "it gave no reason"
        if self.errors.lost:
            return f"the run {name} failed: {why}; {self.errors.file}: {self.errors.lost}"
        return f"the run {name} failed: {why}; see {self.errors.file}"

    def _drop_old_checkpoints(self) -> None:
        for folder in sorted((self.folder / "save").glob("iter_*"))[:-4]:
            shutil.rmtree(folder)


@contextlib.contextmanager
def _ended(job: subprocess.Popen) -> Iterator[None]:
    """An error inside the block ends the job, which would train on without this process."""
    try:
        yield
    except BaseException:
        job.terminate()
        job.stdout.close()
        job.wait()
        raise


def kill_rank(launcher: int, rank: int) -> None:
    """SIGKILL the process of one rank of a launched job."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            os.kill(int(child), signal.SIGKILL)
            return
    raise RuntimeError(f"the job has no process of rank {rank}")


def report(result: dict) -> None:
    """Print the result for a person."""
    print(
        f"{result['kills']} kills in {result['steps']} steps: final loss"
        f" {result['final_loss_killed']}, left alone {result['final_loss_alone']};"
        f" {result['steps_that_differ']} steps differ"
    )
    if result["restart_seconds"]:
        times = sorted(result["restart_seconds"])
        print(
            f"from a kill to the next new step: median {statistics.median(times):.1f} s, longest"
            f" {times[-1]:.1f} s; steps repeated: {sum(result['lost_steps'])}"
        )
    print(
        f"{result['seconds_killed']:.0f} s in all, left alone {result['seconds_alone']:.0f} s;"
        " every figure is in soak.json"
    )
