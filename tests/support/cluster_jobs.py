"""The SLURM cluster that tests/cluster/slurm.sh starts on this machine, and its jobs."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from support import ENV, ROOT
from support.runs import TINY

LIVES = ("--train-iters", 100000, "--eval-iters", 0, "--log-interval", 1, "--save-interval", 100000)
"""Flags of a run that trains until it is stopped, and prints every step."""
PAIR = ("--nodes", 2, "--gpus-per-node", 1)
ONE = ("--nodes", 1, "--gpus-per-node", 1)


class Cluster:
    """Hosts head (the controller) and node1 to node6."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder = folder
        self.preset, self.data = folder / "work" / "tiny.yaml", folder / "work" / "text"
        self.env = ENV | {"CLUSTER": str(folder), "PYTHON": str(python)}
        self._mine = threading.local()
        self._asking, self._asked = threading.Lock(), 0.0
        self._jobs: dict[int, dict[str, str]] = {}
        # The tests may run in a SLURM job: its variables must not reach the cluster's jobs.
        self.env = {k: v for k, v in self.env.items() if not k.startswith(("SLURM_", "SBATCH_"))}

    def prepare(self, write_corpus: Callable[[Path], Path]) -> None:
        """Make the folder of the jobs: corpus and preset."""
        work = self.folder / "work"
        work.mkdir()
        self.data = write_corpus(work)
        self.preset.write_text(TINY.format(corpus=self.data))

    def script(self, *words: object, check: bool = False) -> str:
        """Run slurm.sh; returns its stdout."""
        command = ["bash", ROOT / "tests/cluster/slurm.sh", *words]
        done = subprocess.run(
            [*map(str, command)], env=self.env, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def on(self, host: str, *command: object) -> str:
        """Run a command on a host; returns its stdout."""
        return self.script("in", host, *command)

    def start(self, host: str, out: Path, *command: object, **env: object) -> subprocess.Popen:
        """Start a command on a host, with its output in `out`."""
        words = ["bash", ROOT / "tests/cluster/slurm.sh", "in", host, *command]
        env = self.env | {name: str(value) for name, value in env.items()}
        with open(out, "w") as file:
            return subprocess.Popen([*map(str, words)], env=env, stdout=file, stderr=file)

    def launch(self, host: str, out: Path, save: Path, *flags: object, **env: object):
        """Start examples/launch.sh on a host."""
        command = ("bash", ROOT / "examples/launch.sh", self.preset, save, *flags)
        return self.start(host, out, *command, **env)

    def submit(
        self,
        name: str,
        *flags: object,
        options: tuple = (),
        preset: object = None,
        save: Path | None = None,
    ) -> Job:
        """Submit examples/slurm.sh from the jobs' folder, which is not the repository's.

        Args:
            name: of the run's folder and its output.
            flags: of the entry.
            options: of sbatch.
            preset: the cluster's tiny one if None.
            save: another folder of the run.
        """
        out = self.folder / "work" / f"{name}.out"
        command = ["cd", self.folder / "work", "&&", "exec", "sbatch", "--parsable"]
        command += ["--output", out, *options, ROOT / "examples/slurm.sh"]
        command += [preset or self.preset, self.data.name, save or name, *flags]
        said = self.on("head", "bash", "-c", " ".join(map(str, command)))
        job = Job(self, int(said.split(";")[0]), out, self.folder / "work" / name)
        self._mine.jobs = [*getattr(self._mine, "jobs", []), job]
        return job

    def fields(self, job: int) -> dict[str, str]:
        """SLURM's fields of a job. One question to SLURM asks for all jobs, and serves all waiting
        threads."""
        with self._asking:
            if job not in self._jobs or time.monotonic() > self._asked + 0.5:
                said = self.on("head", "scontrol", "show", "job", "-o").splitlines()
                fields = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in said]
                self._jobs = {int(found["JobId"]): found for found in fields if "JobId" in found}
                self._asked = time.monotonic()
            return self._jobs[job]

    def run(self, case: Callable[[Cluster], None]) -> None:
        """Run a case and cancel the jobs that it leaves: they would hold nodes that others need."""
        try:
            case(self)
        finally:
            for job in getattr(self._mine, "jobs", []):
                job.cancel()
            self._mine.jobs = []


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: int, out: Path, save: Path) -> None:
        self.cluster, self.number, self.out, self.save = cluster, number, out, save

    @property
    def said(self) -> str:
        """The job's output so far, over all its starts."""
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def fields(self) -> dict[str, str]:
        """SLURM's fields of the job."""
        return self.cluster.fields(self.number)

    def scontrol(self, *words: object) -> None:
        """Run scontrol; `JOB` stands for the job's number."""
        self.cluster.on("head", "scontrol", *(self.number if w == "JOB" else w for w in words))

    def cancel(self) -> None:
        """Cancel the job."""
        self.cluster.on("head", "scancel", self.number)

    def wait(self, what: str, seen: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until `seen` returns true; time in which the job waits for nodes is not counted."""
        now = asked = time.monotonic()
        deadline = now + seconds
        while not seen():
            if now > asked + 2:
                asked = now
                if self.fields()["JobState"] == "PENDING":
                    deadline = now + seconds
            assert now < deadline, f"never {what}:\n{self.said[-4000:]}"
            time.sleep(0.2)
            now = time.monotonic()

    def wait_for(self, pattern: str, times: int = 1, seconds: float = 240) -> None:
        """Wait until the output matches a pattern `times` times."""
        found = re.compile(pattern, re.M)
        self.wait(f"said {pattern!r}", lambda: len(found.findall(self.said)) >= times, seconds)

    def wait_running(self) -> None:
        """Wait until SLURM has started the job."""
        self.wait("running", lambda: self.fields()["JobState"] == "RUNNING")

    def end(self, seconds: float = 240) -> str:
        """Wait until the job has ended; returns its last state."""
        over = ("CANCELLED", "FAILED", "COMPLETED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait("at its end", lambda: self.fields()["JobState"] in over, seconds)
        return self.fields()["JobState"]

    def saved_step(self) -> int:
        """The step that the tracker file names."""
        return int((self.save / "latest_checkpointed_iteration.txt").read_text())

    def processes(self, host: str, word: str) -> list[int]:
        """Ids of the job's processes on a host whose command lines contain a word."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().split(b"\0")
                environment = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = f"SLURM_JOB_ID={self.number}".encode() in environment
            there = f"SLURMD_NODENAME={host}".encode() in environment
            mine = f"SLURM_CONF={self.cluster.folder}/etc/slurm.conf".encode() in environment
            if ours and there and mine and any(word.encode() in part for part in command):
                found.append(int(path.name))
        return found

    def hosts(self) -> list[str]:
        """Names of the job's hosts."""
        nodes = self.fields()["NodeList"]
        return self.cluster.on("head", "scontrol", "show", "hostnames", nodes).split()
