"""Edits that know a format: an edit changes what a reader trusts, and leaves the rest honest.

An edit takes (random generator, folder of the input, path of the canary), changes the input, and
returns what was changed, in words. Code that an edit plants makes the canary when it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from support.fuzz import changes
from support.fuzz.checkpoint_edits import (
    add_code,
    edit_arguments,
    edit_header,
    edit_index,
    edit_numbers,
    edit_pickle,
    edit_tracker,
)
from support.fuzz.pick import Skip, pick
from support.fuzz.text_edits import edit_json, edit_offsets, edit_records, edit_tokens, edit_yaml


def edit(rng: random.Random, folder: Path, kind: str, canary: Path) -> str:
    """Apply one edit to the input below `folder`; returns what was changed, in words."""
    own = EDITS[kind]
    for _ in range(50):
        change = rng.choice(own if rng.random() < 0.75 else _ANY)
        try:
            said = change(rng, folder, canary)
        except Skip:
            continue
        return f"{change.__name__.strip('_')}({said})"
    return "nothing"


def sign(folder: Path) -> None:
    """Write all checksums anew, so that a tool does not refuse the input as damaged."""
    for manifest in folder.rglob(MANIFEST):
        _sums(manifest, lambda names, where=f"{manifest.parent}/": _digests(where, names))
    for metadata in folder.rglob("*.json"):
        prefix = metadata.with_suffix("")
        _sums(metadata, lambda names, prefix=str(prefix): _digests(prefix, names))


def _sums(file: Path, of: Callable[[list[str]], dict]) -> None:
    if not file.is_file():
        return
    try:
        held = json.loads(file.read_text())
        key = "files" if file.name == MANIFEST else "sha256"
        held[key] = of(list(held[key]))
        file.write_text(json.dumps(held))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass


def _digests(before: str, names: list[str]) -> dict[str, str]:
    """Name -> SHA-256, of plain files only: a device has no end."""
    files = {name: Path(before + name) for name in names}
    found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


# -- of any input ----------------------------------------------------------------------------------


def _bytes(rng: random.Random, folder: Path, canary: Path) -> str:
    file = pick(rng, folder, "*")
    file.write_bytes(changes.data(rng, file.read_bytes()))
    return file.name


def _delete(rng: random.Random, folder: Path, canary: Path) -> str:
    file = pick(rng, folder, "*")
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
    return file.name


def _swap(rng: random.Random, folder: Path, canary: Path) -> str:
    one, other = pick(rng, folder, "*"), pick(rng, folder, "*")
    held = one.read_bytes(), other.read_bytes()
    one.write_bytes(held[1])
    other.write_bytes(held[0])
    return f"{one.name}, {other.name}"


def _link(rng: random.Random, folder: Path, canary: Path) -> str:
    """Replace a file with a link: to a private file, to itself, to a device, to nothing, or to a
    file beside it."""
    file = pick(rng, folder, "*")
    secret = canary.parent / "secret"
    inner = file.with_name(f"{file.name}.real")
    target = rng.choice((secret, file, Path("/dev/zero"), Path("/dev/full"), canary, inner))
    if target in (secret, inner):
        shutil.copyfile(file, target)
    file.unlink()
    file.symlink_to(target)
    return f"{file.name} -> {target.name}"


def _pipe(rng: random.Random, folder: Path, canary: Path) -> str:
    file = pick(rng, folder, "*")
    file.unlink()
    os.mkfifo(file)
    return file.name


def _forbid(rng: random.Random, folder: Path, canary: Path) -> str:
    there = [folder, *(p for p in sorted(folder.rglob("*")) if not p.is_symlink())]
    path = rng.choice(there)
    path.chmod(rng.choice((0, 0o200 if path.is_file() else 0o600)))
    return path.name


def _stranger(rng: random.Random, folder: Path, canary: Path) -> str:
    """Add a file with an odd name."""
    beside = pick(rng, folder, "*")
    names = ("x" * 255, "é\n.safetensors", "tokenizer.model", "__9_9.distcp", "a.tiktoken")
    names += ("generation_config.json", "added_tokens.json", "model.safetensors.index.json")
    file = beside.with_name(rng.choice(names))
    if os.path.lexists(file):
        raise Skip
    file.write_bytes(rng.choice((b"", b"{}", b"[]", b"\xff", beside.read_bytes())))
    return file.name[:30]


_ANY = (_bytes, _delete, _swap, _link, _pipe, _forbid, _stranger)
EDITS = {
    "megatron": (
        *(*[edit_index] * 2, *[edit_arguments] * 2, edit_pickle, add_code, edit_tracker),
        *(edit_json, edit_numbers),
    ),
    "huggingface": (edit_json, edit_json, edit_header, edit_numbers),
    "research": (edit_json, edit_json, edit_header, edit_pickle, edit_numbers),
    "data": (edit_offsets, edit_offsets, edit_tokens, edit_json, _bytes),
    "preset": (edit_yaml,),
    "text": (edit_records, _bytes, _bytes),
    "tokenizer": (edit_json,),
}
