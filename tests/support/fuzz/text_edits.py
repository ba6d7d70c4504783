"""Edits of presets, JSON, JSON lines and datasets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from support.fuzz import changes
from support.fuzz.pick import Skip, pick

ODD_LINES = (
    *("- a", "\t: x", "{" * 300, "[" * 20_000, "a: &a [1]", "b: *a", "!!python/name:os.system"),
    *("? [1, 2]\n: 3", "1: 2", "null: 3", "a: 2024-13-45", "a: 0x_", "a: .inf", "---\na: 1"),
    *("base: preset.yaml", "base: /etc/passwd", "base: ..", "base: 5", 'base: "\\0"'),
)
"""Lines to insert into a preset."""


def edit_json(rng: random.Random, folder: Path, canary: Path) -> str:
    file = pick(rng, folder, "*.json")
    file.write_bytes(changes.json_text(rng, file.read_text(errors="replace")))
    return file.name


def edit_yaml(rng: random.Random, folder: Path, canary: Path) -> str:
    file = pick(rng, folder, "*.yaml")
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
        lines.insert(at, rng.choice(ODD_LINES))
    else:
        file.write_bytes(changes.data(rng, text.encode()))
        return file.name
    file.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return f"{file.name}: {lines[at][:60] if at < len(lines) else ''}"


def edit_offsets(rng: random.Random, folder: Path, canary: Path) -> str:
    """Change a number of PREFIX.idx."""
    file = pick(rng, folder, "*.idx")
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


def edit_tokens(rng: random.Random, folder: Path, canary: Path) -> str:
    """Add or remove tokens, or write ids outside the vocabulary."""
    file = pick(rng, folder, "*.bin")
    held = file.read_bytes()
    more = rng.choice((held[:-2], held[:-1], held + b"\1\0", held[: len(held) // 2], b""))
    file.write_bytes(more if rng.random() < 0.6 else b"\xff\xff" * 20 + held[40:])
    return file.name


def edit_records(rng: random.Random, folder: Path, canary: Path) -> str:
    """Change a line of JSON lines."""
    file = pick(rng, folder, "*.jsonl")
    lines = file.read_bytes().split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = changes.json_text(rng, lines[at].decode(errors="replace"))
    file.write_bytes(rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines))
    return f"line {at + 1}"
