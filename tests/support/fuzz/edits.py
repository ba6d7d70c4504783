"""Changes that know a format: what a reader trusts is changed, the rest stays honest."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mlra.checkpoint.files import safe_pickle
from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from support.fuzz import changes
from support.hostile import CODE, PICKLES, replace_entry, saved

TRACKER = "latest_checkpointed_iteration.txt"
STEPS = (
    *(
        b"",
        b"release",
        b"-1",
        b"0",
        b"2",
        b"99999999999999999999",
        b"../x",
        b"/etc",
        b"4\n2",
        b"1e3",
    ),
    *("٤".encode(), b"\xff", b" 4 ", b"4" * 100_000, b"iter_0000004", b"4.0", b"\0"),
)


class Skip(Exception):
    """This input has nothing that the change is about."""


def edit(rng: random.Random, folder: Path, kind: str, canary: Path) -> str:
    """Change one thing of the input below `folder`; returns what, in words."""
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
    """Write the checksums anew wherever there are any: the change is no damage then."""
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
    """Of plain files alone: a device has no end."""
    files = {name: Path(before + name) for name in names}
    found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def _pick(rng: random.Random, folder: Path, *patterns: str) -> Path:
    """One of the plain files of these names."""
    files = sorted(
        path
        for pattern in patterns
        for path in folder.rglob(pattern)
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o400
    )
    if not files:
        raise Skip
    return rng.choice(files)


# -- of any input ----------------------------------------------------------------------------------


def _bytes(rng: random.Random, folder: Path, canary: Path) -> str:
    file = _pick(rng, folder, "*")
    file.write_bytes(changes.data(rng, file.read_bytes()))
    return file.name


def _delete(rng: random.Random, folder: Path, canary: Path) -> str:
    file = _pick(rng, folder, "*")
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
    return file.name


def _swap(rng: random.Random, folder: Path, canary: Path) -> str:
    one, other = _pick(rng, folder, "*"), _pick(rng, folder, "*")
    held = one.read_bytes(), other.read_bytes()
    one.write_bytes(held[1])
    other.write_bytes(held[0])
    return f"{one.name}, {other.name}"


def _link(rng: random.Random, folder: Path, canary: Path) -> str:
    """A link in place of a file: to a private one, in a circle, to a device, to nothing, within."""
    file = _pick(rng, folder, "*")
    secret = canary.parent / "secret"
    inner = file.with_name(f"{file.name}.real")
    target = rng.choice((secret, file, Path("/dev/zero"), Path("/dev/full"), canary, inner))
    if target in (secret, inner):
        shutil.copyfile(file, target)
    file.unlink()
    file.symlink_to(target)
    return f"{file.name} -> {target.name}"


def _pipe(rng: random.Random, folder: Path, canary: Path) -> str:
    file = _pick(rng, folder, "*")
    file.unlink()
    os.mkfifo(file)
    return file.name


def _forbid(rng: random.Random, folder: Path, canary: Path) -> str:
    there = [folder, *(p for p in sorted(folder.rglob("*")) if not p.is_symlink())]
    path = rng.choice(there)
    path.chmod(rng.choice((0, 0o200 if path.is_file() else 0o600)))
    return path.name


def _stranger(rng: random.Random, folder: Path, canary: Path) -> str:
    """One more file, of an odd name."""
    beside = _pick(rng, folder, "*")
    names = ("x" * 255, "é\n.safetensors", "tokenizer.model", "__9_9.distcp", "a.tiktoken")
    names += ("generation_config.json", "added_tokens.json", "model.safetensors.index.json")
    file = beside.with_name(rng.choice(names))
    if os.path.lexists(file):
        raise Skip
    file.write_bytes(rng.choice((b"", b"{}", b"[]", b"\xff", beside.read_bytes())))
    return file.name[:30]


# -- of JSON and YAML ------------------------------------------------------------------------------


def _json(rng: random.Random, folder: Path, canary: Path) -> str:
    file = _pick(rng, folder, "*.json")
    file.write_bytes(changes.json_text(rng, file.read_text(errors="replace")))
    return file.name


def _yaml(rng: random.Random, folder: Path, canary: Path) -> str:
    import yaml

    file = _pick(rng, folder, "*.yaml")
    text = file.read_text(errors="replace")
    lines = text.splitlines() or [""]
    at = rng.randrange(len(lines))
    key = lines[at].partition(":")[0]
    what = rng.randrange(8)
    if what < 4:
        changed = changes.value(rng, yaml.safe_load(lines[at].partition(":")[2] or "0"))
        lines[at] = f"{key}: {json.dumps(changed, ensure_ascii=False, default=str)}"
    elif what == 4:
        lines.append(lines[at] if rng.random() < 0.5 else f"{key}x: 1")
    elif what == 5:
        del lines[at]
    elif what == 6:
        odd = (
            "- a",
            "\t: x",
            "{" * 300,
            "[" * 20_000,
            "a: &a [1]",
            "b: *a",
            "!!python/name:os.system",
        )
        odd += (
            "? [1, 2]\n: 3",
            "1: 2",
            "null: 3",
            "a: 2024-13-45",
            "a: 0x_",
            "a: .inf",
            "---\na: 1",
        )
        odd += ("base: preset.yaml", "base: /etc/passwd", "base: ..", "base: 5", 'base: "\\0"')
        lines.insert(at, rng.choice(odd))
    else:
        file.write_bytes(changes.data(rng, text.encode()))
        return file.name
    file.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return f"{file.name}: {lines[at][:60] if at < len(lines) else ''}"


# -- of weights ------------------------------------------------------------------------------------


def _header(rng: random.Random, folder: Path, canary: Path) -> str:
    """The header of a safetensors file, or how long it says to be."""
    file = _pick(rng, folder, "*.safetensors")
    held = file.read_bytes()
    if len(held) < 8:
        raise Skip
    size = int.from_bytes(held[:8], "little")
    text, rest = held[8 : 8 + size], held[8 + size :]
    if rng.random() < 0.15:
        said = rng.choice(changes.INTEGERS)
        file.write_bytes(said.to_bytes(8, "little") + held[8:])
        return f"{file.name}: {said} bytes"
    text = changes.json_text(rng, text.decode(errors="replace"))
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    return file.name


def _numbers(rng: random.Random, folder: Path, canary: Path) -> str:
    """NaN, or a bit, in the last bytes of a file of weights."""
    file = _pick(rng, folder, "*.safetensors", "*.bin", "*.distcp")
    held = bytearray(file.read_bytes())
    if len(held) < 3000:
        raise Skip
    at = rng.randrange(len(held) // 2, len(held) - 2000) & ~3
    held[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e30, 0.0)))
    file.write_bytes(held)
    return file.name


def _steps(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.rglob(".metadata") if file.is_file())


def _step(rng: random.Random, folder: Path) -> Path:
    steps = _steps(folder)
    if not steps:
        raise Skip
    return rng.choice(steps[-1:] * 3 + steps)


def _tracker(rng: random.Random, folder: Path, canary: Path) -> str:
    text = rng.choice(STEPS)
    (folder / TRACKER).write_bytes(text)
    return repr(text[:24])


def _index(rng: random.Random, folder: Path, canary: Path) -> str:
    """A number, a name or a type of `.metadata`."""
    step = _step(rng, folder)
    try:
        index = safe_pickle.load((step / ".metadata").read_bytes()).value
        entries, stored = index.state_dict_metadata, index.storage_data
        tensors = [e for e in entries.values() if isinstance(e, TensorStorageMetadata)]
        at, info = rng.choice(list(stored.items()))
        entry = rng.choice(tensors)
    except (ValueError, AttributeError, IndexError):
        raise Skip from None
    what = rng.randrange(9)
    odd = changes.value(rng, rng.choice((info.offset, info.length)))
    if what == 0:
        info.offset = odd
    elif what == 1:
        info.length = odd
    elif what == 2:
        names = (
            "../x",
            "/etc/passwd",
            "",
            ".",
            "x" * 300,
            "\0",
            ".metadata",
            5,
            None,
            "__0_0.distcp ",
        )
        info.relative_path = rng.choice(names)
    elif what == 3:
        size = list(entry.size) or [1]
        size[rng.randrange(len(size))] = rng.choice((0, 1, 2**40, size[-1] + 1, -1))
        entry.size = torch.Size(size) if rng.random() < 0.8 else size
    elif what == 4 and entry.chunks:
        chunk = rng.choice(entry.chunks)
        name = rng.choice(("offsets", "sizes"))
        held = list(getattr(chunk, name)) or [0]
        held[rng.randrange(len(held))] = rng.choice((0, 1, 2, 2**40, -1))
        setattr(chunk, name, torch.Size(held))
    elif what == 5:
        del stored[at]
    elif what == 6:
        entry.properties.dtype = rng.choice(
            (torch.int64, torch.float16, torch.complex64, torch.bool)
        )
    elif what == 7:
        del entries[rng.choice(list(entries))]
    else:
        entry.chunks = rng.choice(([], entry.chunks * 2, None, entry.chunks[:-1]))
    (step / ".metadata").write_bytes(pickle.dumps(index))
    return f"{what}, {odd!r:.30}"


def _arguments(rng: random.Random, folder: Path, canary: Path) -> str:
    """One of the arguments that a checkpoint was saved with, or all of its common state."""
    step = _step(rng, folder)
    try:
        stored = TorchDistFolder(step)
        state = stored.common_state()
        names = sorted(vars(state["args"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Skip from None
    name = rng.choice(names)
    what = rng.random()
    if what < 0.75:
        setattr(state["args"], name, changes.value(rng, getattr(state["args"], name)))
    elif what < 0.85:
        delattr(state["args"], name)
    else:
        name = rng.choice(list(state))
        state[name] = changes.value(rng)
    if (COMMON_KEY, ()) in stored.stored:
        replace_entry(step, COMMON_KEY, saved([state]))
    else:
        (step / "common.pt").write_bytes(saved(state))
    return name


def _code(rng: random.Random, folder: Path, canary: Path) -> str:
    """Code that would make the canary."""
    step = _step(rng, folder)
    change = rng.choice(CODE)
    try:
        change(step, canary)
    except (ValueError, OSError, StopIteration, KeyError):
        raise Skip from None
    return change.__name__


def _pickle(rng: random.Random, folder: Path, canary: Path) -> str:
    file = _pick(rng, folder, ".metadata", "common.pt", "*.bin")
    name = rng.choice(sorted(PICKLES))
    held = file.read_bytes()
    file.write_bytes(PICKLES[name] if rng.random() < 0.4 else changes.data(rng, held))
    return f"{file.name}: {name}"


# -- of data ---------------------------------------------------------------------------------------


def _offsets(rng: random.Random, folder: Path, canary: Path) -> str:
    """A number of PREFIX.idx."""
    file = _pick(rng, folder, "*.idx")
    held = bytearray(file.read_bytes())
    if len(held) < 40:
        raise Skip
    sizes = {9: 8, 17: 1, 18: 8, 26: 8}
    at = rng.choice(list(sizes)) if rng.random() < 0.4 else rng.randrange(34, len(held) - 8)
    at -= (at - 34) % 4 if at >= 34 else 0
    size = sizes.get(at, rng.choice((4, 8)))
    old = int.from_bytes(held[at : at + size], "little")
    new = rng.choice((old + 1, max(0, old - 1), *changes.INTEGERS)) % (1 << 8 * size)
    held[at : at + size] = new.to_bytes(size, "little")
    file.write_bytes(held)
    return f"byte {at}: {old} -> {new}"


def _tokens(rng: random.Random, folder: Path, canary: Path) -> str:
    """More or fewer tokens, or ids outside the vocabulary."""
    file = _pick(rng, folder, "*.bin")
    held = file.read_bytes()
    more = rng.choice((held[:-2], held[:-1], held + b"\1\0", held[: len(held) // 2], b""))
    file.write_bytes(more if rng.random() < 0.6 else b"\xff\xff" * 20 + held[40:])
    return file.name


def _records(rng: random.Random, folder: Path, canary: Path) -> str:
    """A line of JSON lines."""
    file = _pick(rng, folder, "*.jsonl")
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = changes.json_text(rng, lines[at].decode(errors="replace"))
    file.write_bytes(rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines))
    return f"line {at + 1}"


_ANY = (_bytes, _delete, _swap, _link, _pipe, _forbid, _stranger)
EDITS = {
    "megatron": (_index, _index, _arguments, _arguments, _pickle, _code, _tracker, _json, _numbers),
    "huggingface": (_json, _json, _header, _numbers),
    "research": (_json, _json, _header, _pickle, _numbers),
    "data": (_offsets, _offsets, _tokens, _json, _bytes),
    "preset": (_yaml,),
    "text": (_records, _bytes, _bytes),
    "tokenizer": (_json,),
}
