"""The world of a command that runs a model: one process, or all ranks of torchrun, told the same.

Ranks that were told different things would wait for each other for ever: in another collective, or
in a step that the others do not make. So the ranks meet before any of them reads a weight
(fault_tolerance/handshake.py), and all end with one line if they disagree.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_mlra.checkpoint.folder import tokenizer_files
from megatron_mlra.checkpoint.megatron.folder import iteration_folder
from megatron_mlra.command_line.parser import one_line
from megatron_mlra.command_line.ranks import REFUSED, first_of_host, say_refusal
from megatron_mlra.fault_tolerance import fingerprint, handshake
from megatron_mlra.fault_tolerance.handshake import Fingerprint, World
from megatron_mlra.inference import graphs

LONGEST_WAIT = timedelta(minutes=10)
"""Longest wait for the other ranks, which may still be starting on a busy host."""
_PLACE = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that say where the ranks meet."""


class Refused(ValueError):
    """All ranks are refused, with the same line."""


class Once[T]:
    """The result of a function, or the error with which it refused its input; called once.

    A rank that is refused alone comes to the meeting too, where the others learn of it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._error: Exception | None = None
        try:
            self._value = work()
        except (ValueError, OSError) as error:
            self._error = error

    def __call__(self) -> T:
        """The result.

        Raises:
            ValueError, OSError: the function's error.
        """
        if self._error is not None:
            raise self._error
        return self._value

    def text(self) -> str:
        """A short text, the same for equal results and for equal errors."""
        if self._error is not None:
            return text_of(self._error)
        if isinstance(self._value, str) and len(self._value) < 40:
            return self._value
        digest = hashlib.sha256(repr(self._value).encode(errors="surrogatepass"))
        return f"SHA-256 {digest.hexdigest()[:12]}"


def rank() -> int:
    """The number of this process among all that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meet(told: Callable[[], Fingerprint]) -> World | None:
    """Meet the other ranks, and compare what they were told and the code that they run.

    Args:
        told: what this rank was told; called where there are several.

    Returns:
        None for a single process.

    Raises:
        Refused: on every rank; names the first rank that differs, its host and the difference.
        ValueError: this rank cannot reach the others.
    """
    if size() == 1:
        return None
    if missing := [name for name in _PLACE if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {size()} and {missing[0]} is not set; start the ranks with torchrun, or"
            " unset WORLD_SIZE for a single process"
        )
    same = {"environment": fingerprint.of_environment(), "code": fingerprint.of_code(), **told()}
    try:
        return handshake.meet(rank(), size(), same, seconds=LONGEST_WAIT.total_seconds(), limit="")
    except ValueError as error:
        raise Refused(str(error)) from None
    except RuntimeError as error:  # of the store
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(f"the ranks cannot meet at {where} ({one_line(error)})") from None


@contextlib.contextmanager
def formed(met: World, backend: str, timeout: timedelta | None = None) -> Iterator[None]:
    """Inside the block the ranks that met are torch's world. Its end frees all kept CUDA graphs.

    Args:
        backend: `nccl` or `gloo`.
        timeout: of a collective; None: torch's.
    """
    dist.init_process_group(
        backend, store=met.store, rank=rank(), world_size=size(), timeout=timeout
    )
    try:
        yield
    finally:
        try:
            graphs.free()
        finally:
            dist.destroy_process_group()


def of_inputs(
    checkpoint: str | None, tokenizer: str | None = None, *files: str
) -> dict[str, dict[str, str]]:
    """The fingerprint of the files that this host reads; empty on all ranks of a host but the
    first, since they see the same files.

    Args:
        checkpoint: a checkpoint's folder of any kind.
        tokenizer: a tokenizer's file or folder, if it is one.
        files: other files.
    """
    if not first_of_host():
        return {}
    found: dict[str, dict[str, str]] = {}
    paths = [Path(file) for file in files]
    try:
        if checkpoint:
            folder = iteration_folder(Path(checkpoint), say=lambda line: None)
            found["step"] = {f"the checkpoint of {checkpoint}": folder.name}
            paths += [path for path in folder.iterdir() if path.is_file()]
            paths += tokenizer_files(Path(checkpoint), follow_links=True)
        if tokenizer and Path(tokenizer).is_dir():
            paths += tokenizer_files(Path(tokenizer), follow_links=True)
        elif tokenizer:
            paths.append(Path(tokenizer))
        return found | {"files": fingerprint.of_files(path for path in paths if path.is_file())}
    except (ValueError, OSError) as error:
        return found | {"files": {"its files": text_of(error)}}


def text_of(error: Exception) -> str:
    """The text of an error, in one line."""
    if isinstance(error, OSError) and error.filename:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(error)


def refuse(error: Exception) -> int:
    """Print the line of an error once per host, as far as the ranks know; returns the exit code."""
    if isinstance(error, Refused):
        say_refusal(text_of(error), within=1)  # the ranks have just met
    else:
        say_refusal(text_of(error), shared=False)
    return REFUSED
