"""Measure what the tables of README and docs show, a piece at a time, on the GPUs of this host.

    python examples/measure/measure.py --status
    python examples/measure/measure.py --minutes 30
    python examples/measure/tables.py

queue.yaml lists the pieces. A piece that is done for this commit is not done again, so a second
call goes on where the first one stopped. A piece that fails, or is ended because it takes too long,
is tried again by the next call, behind the others.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured import FOLDERS, ROOT, VERSIONS, Result, kind, results
from megatron_mlra.benchmarks.gpus import listed_gpus
from megatron_mlra.command_line.parser import OneLineParser, make_folder, run, write_text
from pieces import Piece, read_queue

HERE = Path(__file__).resolve().parent
PATIENCE = 20.0
"""Seconds in which a piece that is told to end may end by itself."""
MARK = "MLRA_MEASURED_PIECE"
"""Variable of the environment by which the processes of a piece are known."""
ASK_VERSIONS = """
import importlib.metadata as packages, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = packages.version(name)
    except packages.PackageNotFoundError: pass
print(json.dumps(found))
"""


def commit_of(root: Path, dirty: bool) -> str:
    """Short hash of a checkout; with `-dirty-` and a hash of the changes if there are some.

    Raises:
        ValueError: there is no checkout, or it has changes and `dirty` is False.
    """

    def git(*words: str) -> str:
        asked = ["git", "-C", str(root), *words]  # whose answer may quote files that are no UTF-8
        done = subprocess.run(asked, capture_output=True, text=True, errors="surrogateescape")
        return done.stdout if done.returncode == 0 else ""

    commit, changes = git("rev-parse", "--short", "HEAD").strip(), git("diff", "HEAD")
    if not commit:
        raise ValueError(f"{root} is no checkout of git; name its commit by --commit")
    if changes and not dirty:
        name = git("diff", "HEAD", "--name-only").partition("\n")[0]
        raise ValueError(f"{name} differs from commit {commit}; commit changes, or give --dirty")
    return commit + (
        f"-dirty-{hashlib.sha256(changes.encode(errors='surrogateescape')).hexdigest()[:7]}"
        * bool(changes)
    )


def visible_gpus() -> list[dict[str, str]]:
    """`index`, `name` and `driver` of each GPU, see `listed_gpus`."""
    found = listed_gpus("index", "name", "driver_version")
    return [dict(zip(("index", "name", "driver"), gpu, strict=True)) for gpu in found]


@dataclass
class Queue:
    """Pieces to measure, and where.

    Attributes:
        gpus: as `visible_gpus` lists them.
        vllm_python: the Python that has vLLM, or nothing.
        results: folder of result files.
        work: folder of logs and unfinished results, in a folder for each commit and piece.
        now: says the checkout's commit at any time; None: nobody watches the checkout.
    """

    pieces: list[Piece]
    commit: str
    gpus: list[dict[str, str]]
    vllm_python: str
    results: Path
    work: Path
    now: Callable[[], str] | None = None

    def folder(self, piece: Piece) -> Path:
        return self.work / self.commit / piece.name

    def done(self) -> set[str]:
        """Names of the pieces that have a result of this commit."""
        return {r.piece for r in self._known() if r.told.get("commit") == self.commit}

    def _known(self, piece: str | None = None) -> list[Result]:
        """Results of a piece, or all, committed ones too."""
        return results(piece, [*FOLDERS, self.results])

    def why_failed(self, piece: Piece) -> str:
        """Why the last try of a piece failed, or nothing."""
        note = self.folder(piece) / "failed.txt"
        return note.read_text().strip() if note.is_file() else ""

    def why_not(self, piece: Piece) -> str:
        """Why a piece cannot be measured here, or nothing."""
        if piece.gpus > len(self.gpus):
            return f"needs {piece.gpus} GPUs, {len(self.gpus)} here"
        if piece.vllm and not self.vllm_python:
            return "needs --vllm-python, a Python that has vLLM and this project's plugin"
        return ""

    def seconds(self, piece: Piece) -> tuple[float, str]:
        """Expected seconds, as the newest result on such a GPU took, or the queue's; and which."""
        names = {gpu["name"] for gpu in self.gpus}
        told = [r.told for r in self._known(piece.name)]
        took = [each["seconds"] for each in told if each.get("gpu") in names and "seconds" in each]
        return (took[-1], "measured") if took else (piece.estimated_seconds, "estimate")

    def status(self) -> str:
        """A line on each piece, and one on all."""
        done, lines, total = self.done(), [], 0.0
        for piece in self.pieces:
            seconds, how = self.seconds(piece)
            misfit, failed = self.why_not(piece), self.why_failed(piece)
            what = f"{misfit or 'left'}, about {seconds:.0f} s ({how})"
            what += f"; failed: {failed}" if failed else ""
            total += 0 if misfit or piece.name in done else seconds
            lines.append(f"{piece.name}: {'done' if piece.name in done else what}")
        left = sum(piece.name not in done for piece in self.pieces)
        lines.append(
            f"commit {self.commit}: {len(self.pieces) - left} pieces are done, {left} are left;"
            f" what can run here takes about {total / 60:.0f} minutes"
        )
        return "\n".join(lines)

    def run(self, deadline: float) -> list[str]:
        """Measure what is left and fits; returns the names of the pieces that failed."""
        done, failed = self.done(), []
        left = [p for p in self.pieces if p.name not in done and not self.why_not(p)]
        for number, piece in enumerate(sorted(left, key=lambda p: bool(self.why_failed(p))), 1):
            expected, room = self.seconds(piece)[0], deadline - time.monotonic()
            at = f"[{number}/{len(left)}] {piece.name}"
            if expected > room:
                print(f"{at}: not begun, takes about {expected:.0f} s", flush=True)
                continue
            print(f"{at}: begun, about {expected:.0f} s", flush=True)
            said = self._measure(piece, min(piece.timeout or max(300, 3 * expected), room))
            print(f"{at}: {said}", flush=True)
            failed += [piece.name] if self.why_failed(piece) else []
        return failed

    def _measure(self, piece: Piece, limit: float) -> str:
        """Run a piece and write its result, or why there is none; returns what there is to say."""
        folder, python = self.folder(piece), self.vllm_python if piece.vllm else sys.executable
        make_folder(folder, "--work")
        target, log, note = folder / piece.writes, folder / "log.txt", folder / "failed.txt"
        target.unlink(missing_ok=True)
        note.write_text("interrupted\n")
        about = self._about(piece, python)
        words, env = piece.started_by(python, folder)
        # The checkout's code, whatever is installed; then what the caller's variable adds.
        paths = [str(ROOT), str(ROOT / "kernels"), *env.get("PYTHONPATH", "").split()]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        env["PYTHONPATH"] = os.pathsep.join(paths)
        if piece.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(g["index"] for g in self.gpus[: piece.gpus])
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts
        began = time.monotonic()
        try:
            code = run_to_end(words, env, log, limit)
            why = f"ended after {limit:.3g} s" if code is None else f"exit code {code}" * bool(code)
        except OSError as error:  # of a program that is not there
            why = str(error)
        took = time.monotonic() - began
        if not why and self.now is not None and (now := self.now()) != self.commit:
            why = f"the checkout became {now} meanwhile"
        try:
            content = None if why else json.loads(target.read_text())
        except (OSError, ValueError) as error:
            why = f"no JSON in {target} ({error})"
        if why:
            lines = [line.strip() for line in log.read_text(errors="replace").split("\n")]
            last = next((line for line in reversed(lines) if line), "")[:200]
            note.write_text(f"{why}: {last} ({log})\n")
            return f"failed: {self.why_failed(piece)}"
        content = content if isinstance(content, dict) else {"records": content}
        gpu = kind(about["gpu"]).lower() + (f"x{piece.gpus}" if piece.gpus > 1 else "")
        file = self.results / f"{about['date'][:10]}_{gpu}_{piece.name}_{self.commit}.json"
        write_text(file, json.dumps(content | about | {"seconds": round(took)}, indent=1) + "\n")
        note.unlink()
        return f"done in {took:.0f} s, {file}"

    def _about(self, piece: Piece, python: str) -> dict[str, Any]:
        """On what a piece is measured. It wins over what the benchmark says of itself."""
        used = self.gpus[: piece.gpus]
        driver = {"driver": used[0]["driver"]} if used else {}
        return driver | versions(python) | {
            "piece": piece.name, "gpu": used[0]["name"] if used else "CPU", "gpus": len(used),
            "commit": self.commit, "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "command": re.sub(r"( --\w+)? \{\w+\}", "", piece.command),
        }  # fmt: skip


@functools.cache
def versions(python: str) -> dict[str, str]:
    """Versions of the packages that a Python has, as captions name them."""
    asked = [python, "-c", ASK_VERSIONS, *VERSIONS]
    return json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


def check_vllm(python: str) -> None:
    """Raise ValueError unless `python` is a Python that has vLLM."""
    flag = f"--vllm-python {python}"
    if not shutil.which(python):
        raise ValueError(f"{flag} is no program; give a Python's path")
    try:
        found = versions(python)
    except (OSError, ValueError, subprocess.CalledProcessError):
        raise ValueError(f"{flag} is no Python; give a Python's path") from None
    if "vllm" not in found:
        raise ValueError(f"{flag} has no vLLM; give the path of a Python that has it")


def run_to_end(words: list[str], env: Mapping[str, str], log: Path, limit: float) -> int | None:
    """The exit code of a command; None if it was ended after `limit` seconds. No process that it
    started outlives the call."""
    mark = {MARK: uuid.uuid4().hex}
    with log.open("w") as stream:
        print("$", shlex.join(words), file=stream, flush=True)
        process = subprocess.Popen(
            words, cwd=ROOT, env={**os.environ, **env, **mark}, stdin=subprocess.DEVNULL,
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(None if limit == math.inf else limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process, f"{MARK}={mark[MARK]}".encode())


def _end(process: subprocess.Popen, mark: bytes) -> None:
    """End a command and all that it started. torchrun's workers have groups of their own, so they
    are found by the mark in their environment."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for _ in range(100):  # one may have started another in between
            if not (left := _marked(mark)):
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        process.wait()


def _marked(mark: bytes) -> list[int]:
    """Ids of the processes that have an entry in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a piece failed."""
    flags = OneLineParser(description=__doc__.partition("\n")[0])
    add = flags.add_argument
    add("--minutes", type=float, default=math.inf, help="take what fits into so many minutes")
    add("--status", action="store_true", help="say what is done and left, measure nothing")
    add("--only", nargs="+", metavar="NAME", help="these pieces alone")
    add("--vllm-python", default="", metavar="FILE", help="the Python that has vLLM")
    add("--queue", type=Path, default=HERE / "queue.yaml", help="the pieces (queue.yaml here)")
    add("--results", type=Path, default=ROOT / "docs" / "results", help="folder of result files")
    add("--work", type=Path, default=ROOT / "runs" / "measure", help="folder of logs")
    add("--commit", help="commit to name, where this is no checkout of git")
    add("--dirty", action="store_true", help="measure a checkout with changes too")
    args = flags.parse_args(argv)
    try:
        if not args.minutes > 0:
            raise ValueError(f"--minutes {args.minutes:g} is no time; give more than 0")
        if args.vllm_python:
            check_vllm(args.vllm_python)
        pieces = read_queue(args.queue, args.only)
        commit = args.commit or commit_of(ROOT, args.dirty or args.status)
        gpus, folders = visible_gpus(), (args.results, args.work)
        now = None if args.commit else functools.partial(commit_of, ROOT, dirty=True)
        queue = Queue(pieces, commit, gpus, args.vllm_python, *map(Path.absolute, folders), now)
        if args.status:
            print(queue.status())
            return 0
        if not gpus and all(piece.gpus for piece in pieces):
            raise ValueError("measuring needs a GPU, and nvidia-smi lists none; --status does not")
        make_folder(args.results, f"--results {args.results}")
        # An exception ends the processes of the piece in progress.
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda got, _: sys.exit(128 + got))
        failed = queue.run(time.monotonic() + 60 * args.minutes)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        flags.error(str(error))
    print(queue.status())
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
