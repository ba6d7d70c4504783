"""Runs the training entry, or a driver of the tests, many times on one import: forks a process per
run.

This is the process of support/warm.py. It reads one JSON job per line from a connection, and
answers each with one JSON line:

- {"argv", "folder", and optionally "ranks", "env", "free_bytes", "file_bytes", "nan_at",
  "nan_gradient_at", "terminal", "samples", "asleep", "hosts", "in_thread"} starts the entry;
  answer {"pids": [one per rank]}.
- {"argv", "folder", "module", "timeout", "session"} starts `python -m MODULE`, in a session of its
  own if asked to; answer {"pids": [one]}.
- {"wait": pid} waits for the process; answer {"code": exit code, negative for a signal}.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.launch.ports import reserve_port
from support import ROOT
from support.parsers import read_help_once
from support.warm import serve

IMPORTED = (
    "megatron.training.training",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text",  # with transformers, a third of a short run's time
    "megatron_mlra.data.index_cache",
    "megatron_mlra.training.batches",
    "megatron_mlra.training.console",
    "megatron_mlra.training.dry_run",
    "megatron_mlra.training.hooks",
    "megatron_mlra.training.meeting",
    "megatron_mlra.training.progress",
    "megatron_mlra.training.steps",
)
"""Modules that every run imports; imported once here."""


def main(path: Path) -> None:
    """Import, then serve connections to `path`."""
    # Under nohup it is ignored, which runs would inherit and respect; a test sends it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.path.insert(0, str(ROOT))
    import pretrain_mlra

    pretrain_mlra.has_gpu()
    for name in IMPORTED:
        importlib.import_module(name)
    read_help_once()
    # Garbage collection in a run would touch, and so copy, all memory shared with this process.
    gc.collect()
    gc.freeze()

    def jobs(connection: socket.socket) -> int:
        with connection.makefile("rw") as lines:
            for line in lines:
                job = json.loads(line)
                if "wait" in job:
                    status = os.waitpid(job["wait"], 0)[1]
                    answer = {"code": os.waitstatus_to_exitcode(status)}
                else:
                    answer = {"pids": start(pretrain_mlra, job)}
                print(json.dumps(answer), file=lines, flush=True)
        return 0

    serve(path, jobs)


def start(entry: types.ModuleType, job: dict) -> list[int]:
    """Fork the ranks of a run."""
    ranks = job.get("ranks", 0)
    kept = reserve_port()  # until the last rank has ended, since all inherit it
    port = kept.getsockname()[1]
    pids = []
    for rank in range(ranks or 1):
        pid = os.fork()
        if pid == 0:
            env = job.get("env", {})
            if ranks:
                env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os._exit(be_module(job) if "module" in job else be_entry(entry, job, rank, env))
        pids.append(pid)
    kept.close()
    return pids


def be_module(job: dict) -> int:
    """Become `python -W ignore -m MODULE ARGV`, with stdout and stderr in files."""
    if job.get("session"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write_to(Path(job["folder"]), 0)
    signal.alarm(int(job["timeout"]))
    warnings.simplefilter("ignore")
    sys.argv = [job["module"], *job["argv"]]
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


def write_to(folder: Path, rank: int) -> None:
    """Have this process write its stdout and stderr into files."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)


def be_entry(entry: types.ModuleType, job: dict, rank: int, env: dict) -> int:
    """Become `python pretrain_mlra.py ARGV`, with stdout and stderr in files."""
    folder = Path(job["folder"])
    os.chdir(folder)
    # A shell that starts the tests in the background makes them ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({name: str(value) for name, value in env.items()})
    argv = job["argv"]
    if "hosts" in job:
        argv = [*argv, *be_on_host(**job["hosts"][rank])]
    write_to(folder, rank)
    shown = open_terminal(job["terminal"]) if "terminal" in job else None
    if "free_bytes" in job:
        usage = types.SimpleNamespace(free=job["free_bytes"])
        shutil.disk_usage = lambda _: usage
    if job.get("samples"):
        record_samples(folder / f"samples-{rank}.txt")
    if "nan_at" in job:
        inject_nan(job["nan_at"])
    if "nan_gradient_at" in job:
        inject_nan(job["nan_gradient_at"], in_gradient=True)
    for sleep in job.get("asleep", []):
        fall_asleep(rank, **sleep)
    if "file_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
    sys.argv = ["pretrain_mlra.py", *argv]
    try:
        code = in_thread(entry.main) if job.get("in_thread") else entry.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        # As the interpreter would: a traceback and 1.
        sys.excepthook(*sys.exc_info())
        code = 1
    entry.leave(code)
    # os._exit leaves child processes running, which the interpreter's end would stop.
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    if shown is not None:
        shown()
    return 0


def open_terminal(columns: int) -> Callable[[], None]:
    """Make stdout a terminal of `columns` columns; its output is copied to the former stdout.

    Returns:
        a function that waits until all output is copied.
    """
    file = os.dup(1)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    mode = termios.tcgetattr(theirs)
    mode[1] &= ~termios.OPOST  # newlines as they are
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    os.dup2(theirs, 1)
    os.close(theirs)

    def copy() -> None:
        with contextlib.suppress(OSError):  # raised once nobody has the terminal open
            while text := os.read(ours, 4096):
                os.write(file, text)

    copier = threading.Thread(target=copy, daemon=True)
    copier.start()

    def shown() -> None:
        os.dup2(file, 1)
        copier.join(5)

    return shown


def in_thread(main: Callable[[], int]) -> int:
    """Call the entry in a thread other than the main one, and check that it leaves the program's
    signal handlers alone."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        code = threads.submit(main).result()
    after = {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert after == handlers
    return code


def be_on_host(
    name: str,
    argv: list[str] | None = None,
    mounts: list[list[str]] | None = None,
    later: list[list[str]] | None = None,
) -> list[str]:
    """Make this process appear to be on a host of its own: another name, other files at some paths.

    Args:
        name: of the host.
        argv: more flags for this rank, which are returned.
        mounts: (file or folder, path at which this host sees it).
        later: as `mounts`, but mounted when training starts.
    """
    os.unshare(os.CLONE_NEWUTS | os.CLONE_NEWNS)
    socket.sethostname(name)
    os.environ["LOCAL_RANK"] = "0"
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)

    def mount(pairs: list[list[str]]) -> None:
        for what, where in pairs:
            subprocess.run(["mount", "--bind", what, where], check=True)

    mount(mounts or [])
    if later:
        from megatron.training import training

        train = training.train

        def mount_and_train(*rest, **named):
            mount(later)
            return train(*rest, **named)

        training.train = mount_and_train
    return argv or []


def record_samples(path: Path) -> None:
    """Append a line `STEP SAMPLE` to a file for every training sample that this rank's loader
    yields."""
    import torch
    from megatron.training import get_args

    from megatron_mlra.fault_tolerance import samples

    note = samples.note

    def note_and_write(loaded):
        note(loaded)
        if torch.is_grad_enabled():
            with open(path, "a") as file:
                for number in loaded[samples.SOURCE][:, 0].tolist():
                    file.write(f"{get_args().curr_iteration + 1} {number}\n")

    samples.note = note_and_write


def fall_asleep(
    rank: int,
    ranks: list[int],
    place: str,
    seconds: float,
    step: int | None = None,
    until: str | None = None,
) -> None:
    """Make a function take longer once on some ranks.

    Args:
        place: `module:name` of the function.
        seconds: how much longer.
        step: delay the call in this training step; None: the first call.
        until: a file; its first line ends the delay.
    """
    if rank not in ranks:
        return
    from megatron.training import get_args

    module, name = place.split(":")
    module = importlib.import_module(module)
    function, left = getattr(module, name), [seconds]

    def slow(*args, **named):
        if left and (step is None or get_args().curr_iteration + 1 == step):
            end = time.monotonic() + left.pop()
            while time.monotonic() < end and not (until and b"\n" in Path(until).read_bytes()):
                time.sleep(0.05)
        return function(*args, **named)

    setattr(module, name, slow)


def inject_nan(step: int, in_gradient: bool = False) -> None:
    """Make the training loss of a step NaN, or only the loss's gradient."""
    from megatron.training import get_args

    from megatron_mlra.training import steps

    loss_function = steps.loss_function

    def with_nan(mask, losses):
        if get_args().curr_iteration + 1 == step:
            if in_gradient:
                losses.register_hook(lambda gradient: gradient * float("nan"))
            else:
                losses = losses * float("nan")
        return loss_function(mask, losses)

    steps.loss_function = with_nan


if __name__ == "__main__":
    main(Path(sys.argv[1]))
