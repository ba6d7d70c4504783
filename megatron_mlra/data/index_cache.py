"""Arrays that take long to build, cached in files with checksums. Damaged files are built again.

Any number of processes on any number of hosts may ask for the same arrays at once. The key
determines the arrays, so that all writers write the same bytes. Each file is renamed into place
when it is complete; the list of checksums comes last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.command_line.parser import write_json, written_whole
from megatron_mlra.command_line.plain_file import sha256


def cached(
    folder: Path,
    key: str,
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
    say: Callable[[str], None],
    misfit: Callable[[tuple[np.ndarray, ...]], str | None] = lambda _: None,
) -> tuple[np.ndarray, ...]:
    """The arrays that `build` returns, mapped from `folder` if they are cached there, else built
    and written.

    Args:
        key: determines the arrays; part of the files' names.
        names: of the arrays, one per array.
        say: called with one line if cached files are damaged, or if `folder` cannot be written (the
            arrays are then returned, and not cached).
        misfit: returns why cached arrays cannot be those of `build`, or None. Checksums do not
            suffice: a cache, checksums included, may come with somebody else's data.
    """
    paths = tuple(folder / f"{key}-{name}.npy" for name in names)
    sums = folder / f"{key}-sha256.json"
    with _alone(folder / f"{key}.lock"):
        if sums.is_file():
            try:
                arrays = _load(paths, sums)
                if what := misfit(arrays):
                    raise ValueError(what)
                return arrays
            except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
                said = " ".join(str(error).split())
                say(f"warning: data cache {sums} is damaged ({said:.200}): built again")
        arrays = build()
        try:
            _keep(arrays, paths, sums)
        except OSError as error:
            say(
                f"warning: data cache {folder} cannot be written ({error.strerror}): indexes are"
                " built at every start, on every rank; --data-cache-path names another folder"
            )
            return arrays
        return _map(paths)


def _load(paths: tuple[Path, ...], sums: Path) -> tuple[np.ndarray, ...]:
    expected = read_json(sums)
    for path in paths:
        if sha256(path) != expected[path.name]:
            raise ValueError(f"{path.name} does not match its checksum")
    return _map(paths)


def _map(paths: tuple[Path, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)


def _keep(arrays: tuple[np.ndarray, ...], paths: tuple[Path, ...], sums: Path) -> None:
    sums.parent.mkdir(parents=True, exist_ok=True)
    written = {}
    for array, path in zip(arrays, paths, strict=True):
        with written_whole(path) as partial:
            with partial.open("xb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            written[path.name] = sha256(partial)
    write_json(sums, written)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside the block this process is the only builder on its host; other processes wait. On file
    systems without locks all processes build, which costs time and does no harm."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(
                lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
            )
            held.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
