"""The checksums of a Megatron checkpoint: `integrity.json`, the SHA-256 of every file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.description.model import CheckpointError

MANIFEST = "integrity.json"
_READ_BY_ALL = (".metadata",)
_THREADS = 8


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(folder: Path) -> dict[str, str] | None:
    """File name -> checksum, or None for a checkpoint without a manifest: an older one, a converted
    one, or one saved with `verify_integrity: false`.

    Raises:
        CheckpointError: the manifest cannot be read, or is none of this folder's files; one line
            without the folder's name.
    """
    path = inside(folder, MANIFEST)
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error})") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST} cannot be read (it holds no object of files)")
    for name, digest in files.items():
        if Path(name).name != name or not isinstance(digest, str):
            raise CheckpointError(f"{MANIFEST} names what is no file of the folder")
    missing = [name for name in _READ_BY_ALL if name not in files]
    if missing:
        raise CheckpointError(f"{MANIFEST} has no entry of {missing[0]}")
    return files


def damage(folder: Path, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the first of these files that is not what was saved, or None.

    Args:
        names: files of the folder; default: all that the manifest lists.
    """
    try:
        files = entries(folder)
    except CheckpointError as error:
        return str(error)
    if files is None:
        return None

    def problem(name: str) -> str | None:
        if name not in files:
            return f"{MANIFEST} has no entry of {name}"
        try:
            file = inside(folder, name)
            if not file.is_file():
                return f"{name} is missing"
            same = sha256(file) == files[name]
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if same else f"{name} does not match its checksum"

    names = sorted(files if names is None else set(names))
    with ThreadPoolExecutor(_THREADS) as threads:
        return next((what for what in threads.map(problem, names) if what), None)


def check(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that are not what was saved.

    Raises:
        CheckpointError: names the first.
    """
    what = damage(folder, names)
    if what is not None:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {what}; use another copy or step, or read it as it is"
            " with --no-verify"
        )
