"""Names that a checkpoint holds: they may name files of its folder, and nothing else.

Whoever made a checkpoint chose its file names and its symbolic links. A name with `..`, or a link
to a private file, would have a tool read that file and write its content into an exported folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from megatron_mlra.command_line.plain_file import NotPlain, open_plain
from megatron_mlra.description.model import CheckpointError


def inside(folder: str | Path, name: str) -> Path:
    """`folder / name`, which may not exist, where links lead nowhere but into the folder.

    The folder itself may be reached by a link: its caller chose it. A snapshot of the Hugging Face
    hub's cache may also link to the blobs of the same repository.

    Raises:
        CheckpointError: the name, or a link that it names, leads out of the folder.
    """
    folder = Path(folder)
    path = folder / name
    if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
        raise CheckpointError(f"{folder} names {name!r:.80}, which is no name of a file in it")
    _refuse_outside(path, folder, Path(os.path.realpath(path)))
    return path


def open_inside(folder: str | Path, name: str) -> BinaryIO:
    """The file `folder / name`, opened, of which the content will be written elsewhere: what was
    opened lies in the folder, whatever was put in its place since somebody looked.

    Raises:
        CheckpointError: see `inside`; or no plain file lies there, or it cannot be read.
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
    """Where the hub's cache keeps the files of REPOSITORY/snapshots/REVISION."""
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    return [blobs] if blobs is not None and blobs.is_dir() and not blobs.is_symlink() else []
