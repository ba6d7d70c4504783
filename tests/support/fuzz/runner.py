"""Tries inputs, each in a process of its own, forked from a process that has imported all tools."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What tools import when they run, here once and not in every process.
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import PreTrainedTokenizerFast  # noqa: F401

import megatron_mlra.evaluation.models
import megatron_mlra.hf.modeling_mlra
import megatron_mlra.training.hooks  # noqa: F401
from megatron_mlra.training.cli import has_gpu
from support.fuzz import bases, edits, judge
from support.fuzz.tools import Call, calls

SECONDS = 30
"""Most CPU seconds of all tools together on one input, and longest time without progress. An honest
input takes 2 s."""
ADDRESSES = 6 << 30
"""Most bytes of address space that an input may take beyond an idle process."""
SHARE = 0.6
"""Share of the tools reading an input that are run on it."""
RESIDENT_KB = 700 << 10
"""Most KiB of resident memory that an input may take beyond an idle process."""
_BOUND_BY_NOTHING = 1 << 1 | 1 << 2
"""Capabilities by which root opens files whatever their mode: DAC_OVERRIDE, DAC_READ_SEARCH."""


@dataclass(frozen=True)
class Found:
    """A fault.

    Attributes:
        number: of the input; number and seed reproduce the input.
        changed: what was changed in the input, in words.
        tool: the tool that failed, and its arguments.
        what: the fault, in words.
        said: the end of the tool's output.
    """

    number: int
    changed: str
    tool: str
    what: str
    said: str


class Fuzz:
    """Makes and tries the inputs of one seed in a temporary folder.

    Attributes:
        keep: keep the inputs of faults.
        share: share of the tools reading an input that are run on it, drawn per input.
        runs: exit code -> number of runs so far.
        slowest: (seconds, number) of the slowest input so far.
    """

    def __init__(self, seed: int, keep: bool = False, share: float = SHARE) -> None:
        self.seed = seed
        self.share = share
        self.keep = keep
        self.runs: dict[int, int] = {}
        self.slowest = (0.0, -1)
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
        self.root.chmod(0o755)
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        has_gpu()
        self.bases = bases.build(self.root / "bases")
        self.case = self.root / "case"
        honest = self.case / "honest"
        honest.mkdir(parents=True)
        shutil.copytree(self.bases["megatron"][0] / "in", honest / "model")
        bases.write_wide(honest / "wide")
        (honest / "text.txt").write_text(bases.TEXT * 2)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.root, ignore_errors=True)

    def warm_up(self) -> list[Found]:
        """Try the honest inputs, which every tool must accept, and import the modules that the
        tools imported."""
        found = []
        for kind, folders in self.bases.items():
            for number, folder in enumerate(folders):
                self._lay_out(folder)
                result = self._run(-1 - number, kind, f"honest {kind}", None)
                found += result
        # Frozen objects are not visited by the garbage collection of forked processes, so their
        # memory stays shared.
        gc.collect()
        gc.freeze()
        return found

    def try_one(self, number: int) -> list[Found]:
        """Make one input and run every tool that reads it."""
        rng = random.Random(f"{self.seed}/{number}")
        kind = rng.choice(("megatron",) * 5 + ("huggingface",) * 4 + tuple(bases.KINDS))
        folder = rng.choice(self.bases[kind])
        self._lay_out(folder)
        source, canary = self.case / "one/in", self.case / "one/canary"
        changed = [f"{kind}/{folder.name}"]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            with contextlib.suppress(OSError):
                changed.append(edits.edit(rng, source, kind, canary))
        if rng.random() < 0.7:
            edits.sign(source)
        drawn = random.Random(f"{self.seed}/{number}/tools")
        return self._run(number, kind, " ".join(changed), drawn)

    def _lay_out(self, folder: Path) -> None:
        one = self.case / "one"
        if one.exists():
            shutil.rmtree(one)
        shutil.copytree(folder, one, symlinks=True)
        (one / "out").mkdir()

    def _run(
        self, number: int, kind: str, changed: str, drawn: random.Random | None
    ) -> list[Found]:
        """Run the tools that `drawn` draws; without it, all tools, on an honest input."""
        honest = drawn is None
        one, out = self.case / "one", self.case / "one/out"
        before = judge.state(self.case, out)
        todo = list(calls(kind, one, out))
        if drawn is not None:
            todo = [call for call in todo if drawn.random() < self.share] or [drawn.choice(todo)]
        notes, log = self.root / "notes", self.root / "log"
        notes.write_text("")
        start = time.monotonic()
        idle = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 10
        pid = os.fork()
        if pid == 0:
            _be_tools(todo, notes, log, honest)
        code, usage = _wait(pid, SECONDS)
        took = time.monotonic() - start
        self.slowest = max(self.slowest, (took, number))
        said = [json.loads(line) for line in notes.read_text().splitlines()]
        found = []

        def add(tool: str, what: str, text: str = "") -> None:
            found.append(Found(number, changed, tool, what, text[-1500:]))

        done = [note for note in said if "code" in note]
        for note in done:
            self.runs[note["code"]] = self.runs.get(note["code"], 0) + 1
            if note["wrong"]:
                add(note["tool"], note["wrong"], note["said"])
            elif honest and note["code"]:
                add(note["tool"], f"refused an honest input ({note['code']})", note["said"])
        if code != 0:
            started = [note["tool"] for note in said if "code" not in note and "new" not in note]
            what = f"took more than {SECONDS} s" if code is None else f"ended by {code}"
            add(started[-1] if started else "?", what, log.read_text(errors="replace"))
        if not honest and usage.ru_maxrss > idle + RESIDENT_KB:
            add("?", f"took {(usage.ru_maxrss - idle) >> 10} MiB")
        after = judge.state(self.case, out)
        if after != before:
            differ = {p for p in before | after if before.get(p) != after.get(p)}
            add("?", f"changed {sorted(differ)[:3]}")
        for note in said:
            for name in note.get("new", ()):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        if self.keep and found:
            subprocess.run(["cp", "-a", one, self.root / f"bad-{number}"], check=True)
        return found


def _wait(pid: int, seconds: float) -> tuple[int | None, resource.struct_rusage]:
    """Wait for a process; returns its exit code and resource usage.

    The process is killed, and the code is None, after `seconds` of CPU time (which other programs
    do not slow), or after `seconds` without using the CPU.
    """
    handle = os.pidfd_open(pid)
    used, since = 0.0, time.monotonic()
    ended = False
    while not ended and used < seconds and time.monotonic() - since < seconds:
        ended = bool(select.select([handle], [], [], 0.5)[0])
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        now = (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")
        if now > used:
            used, since = now, time.monotonic()
    os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None, usage


def _be_tools(todo: list[Call], notes: Path, log: Path, honest: bool) -> None:
    """Run tools one after the other in a forked process, and write a note before and after each."""
    known = set(sys.modules)
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    noted = notes.open("a")
    for fd in (1, 2):
        os.dup2(file, fd)
    sys.stdin = io.StringIO()
    os.chdir(notes.parent / "case/one/out")
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20,) * 2)
    if os.getuid() == 0:
        _obey_permissions()

    def note(**values: object) -> None:
        noted.write(json.dumps(values) + "\n")
        noted.flush()

    for call in todo:
        argv = " ".join(str(word).rpartition("/case/one/")[2] for word in call.argv)
        tool = f"{call.name}: {argv}"
        note(tool=tool)
        out, err = _Captured(1), _Captured(2)
        with out, err:
            try:
                code = call.run()
            except BaseException:
                traceback.print_exc()
                code = 70
        wrong = judge.wrong(call, code, out.text, err.text)
        if wrong is None and code == 0:
            try:
                wrong = judge.wrong_result(call, out.text)
            except Exception as error:
                wrong = f"a result that cannot be read ({error!r:.300})"
        note(tool=tool, code=code, wrong=wrong, said=out.text[-500:] + err.text[-1000:])
    if honest:
        note(new=[name for name in sys.modules if name not in known])
    noted.flush()
    os._exit(0)


def _obey_permissions() -> None:
    """Make file modes bind this process although it runs as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) == 0:
        for i in (0, 1):  # effective, permitted
            data[i] &= ~_BOUND_BY_NOTHING
        libc.capset(header, data)


class _Captured:
    """Captures the output to a file descriptor and to Python's stream on it, within a block."""

    def __init__(self, fd: int) -> None:
        self.fd, self.name = fd, {1: "stdout", 2: "stderr"}[fd]

    def __enter__(self) -> None:
        self.file = tempfile.TemporaryFile()
        self.kept = os.dup(self.fd), getattr(sys, self.name), getattr(sys, f"__{self.name}__")
        os.dup2(self.file.fileno(), self.fd)
        stream = open(self.fd, "w", closefd=False, errors="surrogateescape")
        setattr(sys, self.name, stream)
        setattr(sys, f"__{self.name}__", stream)

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ValueError, OSError):
            getattr(sys, self.name).flush()
        os.dup2(self.kept[0], self.fd)
        os.close(self.kept[0])
        setattr(sys, self.name, self.kept[1])
        setattr(sys, f"__{self.name}__", self.kept[2])
        self.file.seek(0)
        self.text = self.file.read(1 << 20).decode(errors="replace")
        self.file.close()


def numbers(inputs: int, only: int | None) -> Iterator[int]:
    """Which inputs to try."""
    yield from range(inputs) if only is None else [only]
