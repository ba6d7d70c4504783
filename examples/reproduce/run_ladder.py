"""Train the models of a ladder that are not trained yet, one per GPU, within a time budget.

    python examples/reproduce/run_ladder.py --tokens TOKENS --results RESULTS --minutes 9
    python examples/reproduce/run_ladder.py --tokens TOKENS --results RESULTS --status

TOKENS is the folder that tokenized.py wrote. RESULTS gets one small JSON per finished run. A run
that does not fit into the budget is not begun. With --partial the run is begun, stopped in time,
and resumed by the next call that finds the same --work.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import beyond
from ladder import Ladder, RunSpec
from megatron_mlra.benchmarks.commit import commit
from megatron_mlra.benchmarks.gpus import listed_gpus
from megatron_mlra.command_line.parser import OneLineParser, run, write_json
from run_results import (
    BEGUN,
    Corpus,
    collect,
    collect_beyond,
    divergence,
    last_error,
    latest_step,
    shape_of,
)

HERE = Path(__file__).parent
SAVING = 20.0
"""Seconds before the end of the budget at which runs in progress are told to save and stop."""


@dataclass
class Job:
    """A run in progress.

    Attributes:
        folder: of the run, below the runner's `work`.
        seconds: expected time from the moment when the run has its GPU to its end.
        attempts: how many times the run had begun before this process.
        begun: time (`time.monotonic`) at which the run got its GPU; None while it waits.
    """

    spec: RunSpec
    process: subprocess.Popen
    folder: Path
    seconds: float
    attempts: int
    begun: float | None = None

    def left(self) -> float:
        """Expected seconds until the run ends."""
        if self.begun is None:
            return self.seconds
        return max(5.0, self.seconds - (time.monotonic() - self.begun))


@dataclass
class Runner:
    """Runs the jobs of a ladder in lanes, one lane per GPU, or one on the CPU.

    Attributes:
        work: folder of logs and checkpoints.
        gpus: (index for CUDA_VISIBLE_DEVICES, name) per GPU; empty: use the CPU.
        deadline: end of the budget (`time.monotonic`).
        partial: begin runs that do not fit into the budget.
        keep: keep checkpoints that no run needs any more.
        commit: noted in every result.
        lanes: the jobs of each lane: the one that trains, and the one that waits for its GPU.
        failed: run id -> the error line of the run.
    """

    ladder: Ladder
    corpus: Corpus
    work: Path
    gpus: list[tuple[str, str]]
    deadline: float
    partial: bool
    keep: bool
    commit: str
    lanes: list[list[Job]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def run(self) -> int:
        """Run jobs until none is left that fits; returns the number of finished runs."""
        self.lanes = [[] for _ in self.gpus or ("cpu",)]
        finished = 0
        # SIGTERM ends the budget: runs in progress save and stop.
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "deadline", 0.0))
        while True:
            for number, lane in enumerate(self.lanes):
                finished += self._reap(number, lane)
                self._fill(number, lane)
            if not any(self.lanes):
                return finished
            if time.monotonic() > self.deadline - SAVING:
                return finished + self._stop()
            time.sleep(0.3)

    def _fill(self, number: int, lane: list[Job]) -> None:
        """Start the next run of a lane. While one run trains, the next may already import its
        modules and wait for the GPU."""
        if len(lane) > 1 or (lane and lane[0].begun is None):
            return
        busy = {job.spec.id for each in self.lanes for job in each} | set(self.failed)
        done = self.ladder.done()
        left = self.deadline - SAVING - time.monotonic() - sum(job.left() for job in lane)
        for spec in self._in_order(done):
            base = self.ladder.base(spec)
            if spec.id in busy or (base and (self.corpus.tasks is None or base.id in busy)):
                continue
            steps = self.corpus.steps(spec, self.ladder)
            at = steps if base and self._kept(base) else latest_step(self._checkpoint(spec))
            batch = self.ladder.told["tokens_per_step"]
            seconds = self.ladder.seconds(spec, (steps - at) * batch, done, self.at_once(number))
            if seconds > left and not (self.partial and not lane and left > 60):
                continue
            lane.append(self._start(number, spec, steps, at, seconds))
            return

    def at_once(self, number: int) -> int:
        """How many lanes share the GPU of a lane."""
        return self.gpus.count(self.gpus[number]) if self.gpus else 1

    def _in_order(self, done: dict[str, dict]) -> list[RunSpec]:
        """The runs left. First come those that continue a checkpoint of a finished run, because the
        checkpoint may be gone at the next call."""

        def waits(spec: RunSpec) -> bool:
            base = self.ladder.base(spec)
            return base is None or not self._kept(base)

        return sorted(self.ladder.left(done), key=waits)

    def _checkpoint(self, spec: RunSpec) -> Path:
        return self.work / spec.id / "checkpoint"

    def _kept(self, spec: RunSpec) -> bool:
        """Whether the run is finished and its checkpoint still exists."""
        return (self._checkpoint(spec) / "held_out.json").is_file()

    def _base_checkpoint(self, spec: RunSpec) -> Path:
        """The checkpoint with which a run beyond the loss begins: its base run's, if kept, or one
        that the run trains itself."""
        base = self.ladder.base(spec)
        return self._checkpoint(base if self._kept(base) else spec)

    def _start(self, number: int, spec: RunSpec, steps: int, at: int, seconds: float) -> Job:
        folder = self.work / spec.id
        folder.mkdir(parents=True, exist_ok=True)
        if not at:
            self.corpus.note(folder)
        if self.ladder.base(spec):
            command = self.beyond_command(number, spec, steps)
        else:
            flags = self.flags(number, spec, steps, at)
            command = [sys.executable, str(HERE / "one_run.py"), str(self._lock(number)), *flags]
        env = dict(os.environ, PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
        if self.gpus:
            # nvidia-smi counts by bus; CUDA, unless told, by speed.
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpus[number][0]}
        (folder / "log.txt").touch()
        attempts = (folder / "log.txt").read_text(errors="replace").count(BEGUN)
        with open(folder / "log.txt", "a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        where = f"GPU {self.gpus[number][0]}" if self.gpus else "CPU"
        from_step = f" from step {at:,}" if at else ""
        print(f"{where}: {spec.id}, {steps:,} steps{from_step}, about {seconds:.0f} s", flush=True)
        return Job(spec, process, folder, seconds, attempts)

    def _lock(self, number: int) -> Path:
        return self.work / f"device{number}.lock"

    def flags(self, number: int, spec: RunSpec, steps: int, at: int) -> list[str]:
        """The flags of a run's training, which resumes from its checkpoint if `at` is not 0."""
        checkpoint, seed = self._checkpoint(spec), self.ladder.told["data_seed"]
        flags = self._training(number, spec, steps, spec.peak_lr, seed, checkpoint)
        return [*flags, "--load", str(checkpoint)] if at else flags

    def _training(
        self, number: int, spec: RunSpec, steps: int, rate: float, data_seed: int, save: Path
    ) -> list[str]:
        told = self.ladder.told
        flags = [
            *("--config", self.ladder.preset(spec.size, spec.mechanism)),
            *("--data-path", self.corpus.prefix("train"), "--train-iters", steps),
            *("--held-out", *(f"{n}={self.corpus.prefix(n)}" for n in told["held_out"])),
            *("--lr", f"{rate:.6g}", "--min-lr", f"{rate / 10:.6g}"),
            *("--seed", spec.seed, "--data-seed", data_seed),
            *("--data-cache-path", self.work / f"cache{number}", "--save", save),
        ]
        flags += told["gpu_flags"] if self.gpus else told["cpu_flags"]
        return [*map(str, flags)]

    def beyond_command(self, number: int, spec: RunSpec, steps: int) -> list[str]:
        """Write the plan of a run beyond the loss; returns the run's command."""
        folder, base = self.work / spec.id, self._base_checkpoint(spec)
        phase, shape = self.ladder.phase(spec), shape_of(spec, self.ladder)
        more, extended = phase["extension"], folder / "extended"
        train = self.flags(number, spec, steps, latest_step(base))
        rate, length = spec.peak_lr * more["rate_factor"], more["seq_length"]
        load = ("--load", extended) if latest_step(extended) else ("--load", base, "--finetune")
        extend = [
            *self._training(number, spec, more["steps"], rate, more["data_seed"], extended),
            *("--seq-length", length, "--max-position-embeddings", length),
            *(*more["flags"], *load),
        ]
        sets = [f"{name}={self.corpus.prefix(name)}" for name in self.ladder.told["held_out"]]
        plan = {
            "analyze": ["--data", *sets, *phase["analyze"]] if shape.attention == "mlra" else None,
            "tasks": self.corpus.prefix("tasks"),
            "tokenizer": self.corpus.prefix("tokenizer"),
            "lengths": phase["lengths"],
            "context": shape.max_position_embeddings,
        }
        todo = beyond.stages(plan, folder, base, train, [*map(str, extend)])
        write_json(folder / "plan.json", todo, indent=1)
        command = (sys.executable, HERE / "beyond.py", self._lock(number), folder / "plan.json")
        return [*map(str, command)]

    def _reap(self, number: int, lane: list[Job]) -> int:
        """Remove the ended jobs from a lane; returns the number of finished runs."""
        finished = 0
        for job in list(lane):
            # Asked first: a job that ends while its log is read writes more.
            ended = job.process.poll() is not None
            log = (job.folder / "log.txt").read_text(errors="replace")
            if job.begun is None and log.count(BEGUN) > job.attempts:
                job.begun = time.monotonic()
            if not ended:
                continue
            lane.remove(job)
            finished += self._ended(job, number, log)
        return finished

    def _ended(self, job: Job, number: int, log: str) -> bool:
        """Write the result of an ended job; returns whether the run is finished."""
        base = self.ladder.base(job.spec)
        last = job.folder / ("extended.json" if base else "checkpoint/held_out.json")
        scored = last.is_file()
        diverged = divergence(log) if job.process.returncode else None
        if job.process.returncode == 0 and not scored:
            print(f"{job.spec.id}: stopped at step {latest_step(job.folder / 'checkpoint'):,}")
            return False
        if job.process.returncode and diverged is None:
            self.failed[job.spec.id] = last_error(log)
            print(f"{job.spec.id}: failed: {last_error(log)}", flush=True)
            return False
        gpu = self.gpus[number][1] if self.gpus else "CPU"
        if base:
            began = self._base_checkpoint(job.spec)
            result = collect_beyond(job.spec, self.ladder, self.corpus, began, job.folder, diverged)
        else:
            result = collect(job.spec, self.ladder, self.corpus, job.folder, log, diverged)
        result |= {"device": gpu, "runs_at_once": self.at_once(number), "commit": self.commit}
        said = self.ladder.write(result)
        print(f"{job.spec.id}: {said}", flush=True)
        if not self.keep:
            self._clear(job, base)
        return True

    def _clear(self, job: Job, base: RunSpec | None) -> None:
        """Remove the checkpoints that no run needs any more."""
        left = self.ladder.left(self.ladder.done())
        needed = {each.id for spec in left if (each := self.ladder.base(spec))}
        done = [job.folder / "extended"] if base else []
        done += [self._checkpoint(spec) for spec in (job.spec, base) if spec]
        for folder in done:
            if folder.parent.name not in needed:
                subprocess.run(["rm", "-rf", str(folder)], check=True)

    def _stop(self) -> int:
        """Let training jobs save and stop, and end the jobs that wait for a GPU; returns the number
        of finished runs."""
        jobs = [(number, job) for number, lane in enumerate(self.lanes) for job in lane]
        for _, job in jobs:
            job.process.send_signal(signal.SIGTERM if job.begun else signal.SIGKILL)
        for _, job in jobs:
            try:
                job.process.wait(60)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        for lane in self.lanes:
            lane[:] = [job for job in lane if job.begun]
        return sum(self._reap(number, lane) for number, lane in enumerate(self.lanes))


def visible_gpus() -> list[tuple[str, str]]:
    """(index for CUDA_VISIBLE_DEVICES, name) of each GPU, see `listed_gpus`."""
    return [(index, name) for index, name in listed_gpus("index", "name")]


def status(ladder: Ladder, corpus: Corpus, work: Path) -> str:
    """Lines on the runs done, interrupted and left, and on the next runs."""
    done = ladder.done()
    left = ladder.left(done)
    batch = ladder.told["tokens_per_step"]
    seconds = sum(ladder.seconds(r, corpus.steps(r, ladder) * batch, done) for r in left)
    lines = [
        f"{len(done)} runs are done, {len(left)} are left (about {seconds / 3600:.1f} hours of one"
        f" GPU), {ladder.waiting(done)} wait for a learning rate"
    ]
    for spec in left:
        if at := latest_step(work / spec.id / "checkpoint"):
            lines.append(f"interrupted: {spec.id} at step {at:,}")
    lines += [f"next: {spec.id}" for spec in left[:5]]
    behind = [spec for spec in left if ladder.base(spec)]
    if behind and corpus.tasks is None:
        lines.append(
            f"{len(behind)} runs beyond the loss wait for {corpus.folder}/tasks; run"
            " make_tasks.py --out there"
        )
    elif behind and behind[0] not in left[:5]:
        lines.append(f"later: {len(behind)} runs beyond the loss: {behind[0].id}, ...")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code: 1 where a run failed."""
    parser = OneLineParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ladder", type=Path, default=HERE / "ladder.yaml", help="what to train")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenized.py")
    parser.add_argument("--results", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--work", type=Path, default=Path("runs/ladder"), help="logs, checkpoints")
    parser.add_argument("--minutes", type=float, default=1e6, help="time budget of this call")
    parser.add_argument("--partial", action="store_true", help="also begin runs that do not fit")
    parser.add_argument("--keep-checkpoints", action="store_true", help="also of finished runs")
    parser.add_argument("--commit", default=commit(), help="to note in results (this checkout's)")
    parser.add_argument("--status", action="store_true", help="say what is left, train nothing")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    try:
        args.results.mkdir(parents=True, exist_ok=True)
        ladder, corpus = Ladder(args.ladder, args.results), Corpus(args.tokens)
        ladder.check_presets()
        done = ladder.done()
        corpus.check(["train", *ladder.told["held_out"]], done.values())
        corpus.check_tasks(ladder)
        corpus.check_begun(args.work / spec.id for spec in ladder.left(done))
        if args.status:
            print(status(ladder, corpus, args.work))
            return 0
        args.work.mkdir(parents=True, exist_ok=True)
        runner = Runner(
            ladder,
            corpus,
            args.work.resolve(),
            visible_gpus(),
            deadline,
            args.partial,
            args.keep_checkpoints,
            args.commit,
        )
        finished = runner.run()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{finished} runs finished\n{status(ladder, corpus, args.work)}")
    for name, why in runner.failed.items():
        print(f"failed: {name}: {why}")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    run(main)
