"""Arrays that take long to build, kept in files that are either whole or built again.

Any number of processes on any number of hosts may ask for the same arrays at once. The arrays are
a function of their key, so that whoever writes them writes the same bytes; each file appears whole,
by renaming, and the list of their checksums appears last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.command_line.parser import aside, own_name, write_text
from megatron_mlra.data.contents import sha256


def cached(
    folder: Path,
    key: str,
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
    say: Callable[[str], None],
    misfit: Callable[[tuple[np.ndarray, ...]], str | None] = lambda _: None,
) -> tuple[np.ndarray, ...]:
    """The arrays of `build`, mapped from `folder` if they are there and whole, else built and kept.

    Args:
        key: what the arrays are a function of; part of the files' names.
        names: of the arrays.
        say: is told, in a line, of files that are damaged, and of a folder that cannot be written;
            arrays that cannot be kept are only returned.
        misfit: what makes arrays of the folder none of `build`'s, if anything. A cache may come
            with the data, and its checksums with it.
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
        partial = aside(own_name(path))
        try:
            with partial.open("xb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            written[path.name] = sha256(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    write_text(sums, json.dumps(written) + "\n")


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of a host builds, and the others wait for it. Where the file system has no locks
    they all build, which costs time and no harm."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(
                lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
            )
            held.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
