"""The manifest of a checkpoint, `integrity.json`: the SHA-256 of every file of its folder.

Training runs, conversions and exports write a manifest into each folder that they make. Folders
that other programs wrote have none, and are read unverified. A file that was added later is not
listed: it is refused as a source of weights or of a model's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.staging import MARKER
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.description.model import CheckpointError

MANIFEST = "integrity.json"
MEGATRON = (".metadata", "metadata.json")
"""Files that every reader of a Megatron folder reads."""
_THREADS = 8
_EDITED = (".json", ".jinja", ".py")
"""Suffixes of files that users edit by hand."""
_DIFFERS = " does not match its checksum"


def write(folder: Path, names: Iterable[str] | None = None, made_from: str | None = None) -> None:
    """Write the manifest of a folder that was just written.

    Args:
        names: files to list; default: all files of the folder.
        made_from: the `identity` of the checkpoint that this one was converted from.
    """
    if names is None:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    names = sorted(name for name in names if name not in (MANIFEST, MARKER))
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = threads.map(sha256, [folder / name for name in names])
        files = dict(zip(names, sums, strict=True))
    listed = {"algorithm": "sha256", "files": files}
    if made_from is not None:
        listed["made_from"] = made_from
    text = json.dumps(listed, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def identity(folder: Path) -> str | None:
    """The SHA-256 of a checkpoint's manifest, None without a manifest. It differs between all
    checkpoints, even of the same step.

    Raises:
        CheckpointError: the manifest is a link out of the folder.
    """
    path = inside(folder, MANIFEST)
    return sha256(path) if path.is_file() else None


def made_from(folder: Path) -> str | None:
    """The `identity` of the checkpoint that a folder was converted from, or None if unknown.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    if entries(folder, ()) is None:
        return None
    return read_json(inside(folder, MANIFEST)).get("made_from")


def entries(folder: Path, needed: tuple[str, ...] = MEGATRON) -> dict[str, str] | None:
    """File name -> checksum, or None for a checkpoint without a manifest: saved by an older version
    or another program, or with `verify_integrity: false`.

    Args:
        needed: files that the manifest must list, since every reader of the folder reads them.

    Raises:
        CheckpointError: the manifest cannot be read, lists a path outside the folder, or lacks a
            needed file; one line without the folder's name.
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
        # A lone surrogate can be in no file name, and cannot be printed.
        if Path(name).name != name or not name.isprintable() or not isinstance(digest, str):
            raise CheckpointError(f"{MANIFEST} has an entry that is no file of the folder")
    for name in needed:
        if name not in files:
            raise CheckpointError(f"{MANIFEST} has no entry of {name}")
    return files


def damage(
    folder: Path, names: Iterable[str] | None = None, needed: tuple[str, ...] = MEGATRON
) -> str | None:
    """What is wrong with the first of these files that differs from its checksum, or None.

    Args:
        names: files of the folder; default: all that the manifest lists.
        needed: see `entries`.
    """
    try:
        files = entries(folder, needed)
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
        return None if same else f"{name}{_DIFFERS}"

    names = sorted(files if names is None else set(names))
    with ThreadPoolExecutor(_THREADS) as threads:
        return next((what for what in threads.map(problem, names) if what), None)


def check(folder: Path, names: Iterable[str], needed: tuple[str, ...] = MEGATRON) -> None:
    """Compare files with their checksums.

    Args:
        needed: see `entries`.

    Raises:
        CheckpointError: a file differs; names the first.
    """
    what = damage(folder, names, needed)
    if what is None:
        return
    if what.endswith(_DIFFERS) and what.removesuffix(_DIFFERS).endswith(_EDITED):
        raise CheckpointError(
            f"checkpoint {folder}: {what}; if you edited it, remove {folder / MANIFEST} or pass"
            " --no-verify, and if not, use another copy"
        )
    raise CheckpointError(
        f"checkpoint {folder} is damaged: {what}; use another copy or step, or read it as it is"
        " with --no-verify"
    )


def check_listed(folder: Path, names: Iterable[str]) -> None:
    """Compare with their checksums those of these files that the manifest lists.

    Raises:
        CheckpointError: a file differs; names the first.
    """
    try:
        files = entries(folder, ()) or {}
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {error}") from None
    if listed := [name for name in names if name in files]:
        check(folder, listed, ())
