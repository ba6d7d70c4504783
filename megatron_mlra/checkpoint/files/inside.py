"""File names from inside a checkpoint: they may name files of its folder, and no others.

The author of a checkpoint chose its file names and symbolic links. Through a name with `..`, or a
link to a private file, a tool would copy that file into an exported folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from megatron_mlra.command_line.plain_file import NotPlain, open_plain
from megatron_mlra.description.model import CheckpointError


def inside(folder: str | Path, name: str) -> Path:
    """`folder / name`, checked to lie in the folder after links are resolved. It need not exist.

    `folder` itself may be a link: the caller chose it. A snapshot of the Hugging Face hub's cache
    may also link to the blobs of the same repository.

    Raises:
        CheckpointError: the name, or a link of this name, leads out of the folder.
    """
    folder = Path(folder)
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{folder} names {name!r:.80}, which is no name of a file in it")
    _refuse_outside(path, folder, Path(os.path.realpath(path)))
    return path


def open_inside(folder: str | Path, name: str) -> BinaryIO:
    """The file `folder / name`, opened to be copied elsewhere. The opened file itself is checked to
    lie in the folder, since its path may have been replaced after a check of the path.

    Raises:
        CheckpointError: see `inside`; or the path names no plain file, or it cannot be read.
    """
    path = inside(folder, name)
    try:
        opened = open_plain(path)
    except (OSError, NotPlain) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    try:
        _refuse_outside(path, Path(folder), Path(os.readlink(f"/proc/self/fd/{opened.fileno()}")))
    except BaseException:
        opened.close()
        raise
    return opened


def _refuse_outside(path: Path, folder: Path, target: Path) -> None:
    root = Path(os.path.realpath(folder))
    if not any(target.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise CheckpointError(
            f"{path} is a link out of its folder, to {target}, and is not followed; put a copy"
            " in its place if the link is yours"
        )


def _blobs(root: Path) -> list[Path]:
    """[REPOSITORY/blobs] if `root` is REPOSITORY/snapshots/REVISION of the hub's cache, else []."""
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    return [blobs] if blobs is not None and blobs.is_dir() and not blobs.is_symlink() else []
