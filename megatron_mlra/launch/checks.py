"""What torchrun's flags ask for is possible on this host. torchrun itself ends in tracebacks, with
exit code 1, after which a cluster starts a job again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from argparse import Namespace
from importlib.machinery import PathFinder

from torch.distributed.elastic.multiprocessing import Std
from torch.distributed.run import determine_local_world_size

from megatron_mlra.command_line.numbers import MOST_PROCESSES


def check(args: Namespace) -> None:
    """Refuse values that no rank can be started with.

    Args:
        args: of torchrun's parser.

    Raises:
        ValueError: one line that names the flag, or the program, and the fix.
    """
    if args.standalone and args.nnodes not in ("1", "1:1"):
        raise ValueError(
            f"--standalone is one host, and --nnodes (PET_NNODES) is {args.nnodes}; leave one out"
        )
    _check_processes(args.nproc_per_node)
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts is {args.max_restarts}; it must be at least 0")
    if not args.monitor_interval > 0:
        raise ValueError(f"--monitor-interval is {args.monitor_interval:g}; it must be above 0")
    if args.log_dir and args.log_dir != os.devnull:
        try:
            os.makedirs(args.log_dir, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--log-dir {args.log_dir} cannot be made ({error.strerror}); use another folder"
            ) from None
    for flag, value in (("--redirects", args.redirects), ("--tee", args.tee)):
        try:
            Std.from_str(value)
        except ValueError as error:
            raise ValueError(f"{flag} {value}: {' '.join(str(error).split())}") from None
    ranks = args.local_ranks_filter
    if ranks and not re.fullmatch(r"\d+(,\d+)*", ranks):
        raise ValueError(f"--local-ranks-filter {ranks} is no list of ranks, as 0,1")
    _check_program(args)


def wrong_switch() -> str:
    """One line on the variable of a switch of torchrun's (PET_STANDALONE) that is no number."""
    wrong = [
        f"{name} is {os.environ[name]!r}" for name in sorted(os.environ) if _is_no_switch(name)
    ]
    return f"{', '.join(wrong)}; set it to 1 or 0, or unset it"


def _is_no_switch(name: str) -> bool:
    switches = ("STANDALONE", "MODULE", "NO_PYTHON", "RUN_PATH", "VIRTUAL_LOCAL_RANK")
    return name in {f"PET_{n}" for n in switches} and not os.environ[name].strip().isdigit()


def _check_processes(said: str) -> None:
    wrong = f"--nproc-per-node {said} is no number of processes; use 1 or more, or gpu, cpu or auto"
    try:
        count = determine_local_world_size(said)
    except ValueError as error:
        if "Unsupported" in str(error):
            raise ValueError(wrong) from None
        raise ValueError(f"--nproc-per-node {said}: {error}") from None
    if count < 1:
        raise ValueError(wrong)
    if count > MOST_PROCESSES:
        raise ValueError(f"--nproc-per-node {said} is too many; use at most {MOST_PROCESSES}")


def _check_program(args: Namespace) -> None:
    """Refuse a script, a module or a program that is not there."""
    name = args.training_script
    if args.no_python and args.module:
        raise ValueError("--no-python and -m exclude each other; leave one out")
    if args.no_python:
        if shutil.which(name) is None:
            if os.path.isfile(name) and os.sep in name:
                raise ValueError(f"{name} cannot be run: it is not executable")
            raise ValueError(f"there is no program {name}; name one of the PATH, or a file as ./x")
    elif args.module:
        if "PYTHON_EXEC" not in os.environ and not _has_module(name):
            raise ValueError(f"there is no module {name}; name one that python -m takes")
    elif not os.path.exists(name):
        fix = ""
        if name == "mlra" or shutil.which(name):
            fix = "; put --no-python in front of it"
        elif re.fullmatch("[a-z][a-z-]*", name):
            fix = f"; start it as --no-python mlra {name}, if it is a command of mlra"
        raise ValueError(f"there is no script {name}{fix}")


def _has_module(name: str) -> bool:
    """Whether `python -m name` finds a module. None is imported, as a package's import may need
    what a rank alone has."""
    first, *inner = name.split(".")
    try:
        spec = PathFinder.find_spec(first, [os.getcwd()]) or importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return False
    for count in range(len(inner)):
        if spec is None or spec.submodule_search_locations is None:
            return False
        if spec.origin is None:  # a namespace, whose parts may lie anywhere
            return True
        whole = ".".join((first, *inner[: count + 1]))
        spec = PathFinder.find_spec(whole, spec.submodule_search_locations)
    return spec is not None
