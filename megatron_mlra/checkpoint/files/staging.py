"""Output folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_mlra.command_line.parser import check_writable
from megatron_mlra.command_line.printable import size
from megatron_mlra.description.model import CheckpointError

MARKER = ".megatron-mlra-conversion"
"""Name of a file in the folder that a conversion is writing; the conversion holds a lock on it."""

_SAYS = b"A conversion of megatron-mlra writes this folder, and empties it to start again.\n"


@contextlib.contextmanager
def written_aside(destination: str | Path, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` when the block ends without an error.

    The folder is named `destination` with `.partial` appended, and is removed on any error. A
    folder that a killed conversion left is recognised by its marker, and emptied.

    Args:
        needed_bytes: bytes that the block will write; compared with the free space first.

    Raises:
        CheckpointError: the destination exists or is being written, its `.partial` was not made by
            a conversion, or the disk is too small.
        OSError: the folder cannot be written.
    """
    destination = Path(destination)
    check_destination(destination, needed_bytes)
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f"{destination.name}.partial")
    lock = _own(partial)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{destination} is being written by another process") from None
        try:
            for left in partial.iterdir():
                if left.name != MARKER:
                    is_folder = left.is_dir() and not left.is_symlink()
                    shutil.rmtree(left) if is_folder else left.unlink()
            yield partial
            (partial / MARKER).unlink()
            # Checked again, since rename would replace an empty folder.
            check_destination(destination, 0)
            partial.rename(destination)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            # torch.save raises a RuntimeError after a write has failed; its cause is the OSError.
            cause = error.__context__ if isinstance(error, RuntimeError) else error
            if isinstance(cause, OSError) and cause.filename is None:
                raise OSError(cause.errno, cause.strerror, str(destination)) from None
            raise
    finally:
        os.close(lock)


def _own(partial: Path) -> int:
    """Make the folder, or take over one that a killed conversion left.

    Anything else at that path, a link to a folder included, belongs to the user and must not be
    emptied.

    Returns:
        The file descriptor of the folder's marker.

    Raises:
        CheckpointError: the path exists and is no folder with this tool's marker.
    """
    try:
        partial.mkdir()
    except FileExistsError:
        if not partial.is_symlink() and partial.is_dir():
            with contextlib.suppress(OSError):
                marker = os.open(partial / MARKER, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                if os.read(marker, len(_SAYS) + 1) == _SAYS:
                    return marker
                os.close(marker)
        raise CheckpointError(
            f"{partial} is in the way, and is no folder that a conversion left (it has no"
            f" {MARKER}); move or remove it, or choose another destination"
        ) from None
    marker = os.open(partial / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(marker, _SAYS)
    return marker


def check_destination(destination: Path, needed_bytes: int) -> None:
    """Refuse a destination that exists, cannot be made, or has too little room on its disk.

    Raises:
        CheckpointError: names the destination, and the fix or the bytes.
    """
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists already; remove it, or choose another folder")
    try:
        existing = check_writable(destination.absolute().parent, str(destination))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{destination} has {size(free)} free and needs {size(needed_bytes)}; free some, or use"
            " another disk"
        )
