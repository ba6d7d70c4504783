"""Edits of checkpoints: of weights, indices, arguments and pickles."""

from __future__ import annotations

import pickle
import random
import struct
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mlra.checkpoint.files import safe_pickle
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from support.fuzz import changes
from support.fuzz.pick import Skip, pick
from support.hostile import CODE, PICKLES, replace_entry, saved

TRACKER = "latest_checkpointed_iteration.txt"
STEPS = (
    *(b"", b"release", b"-1", b"0", b"2", b"9" * 20, b"../x", b"/etc", b"4\n2", b"1e3"),
    *("٤".encode(), b"\xff", b" 4 ", b"4" * 100_000, b"iter_0000004", b"4.0", b"\0"),
)
"""Contents of the tracker."""
PATHS = (
    *("../x", "/etc/passwd", "", ".", "x" * 300),
    *("\0", ".metadata", 5, None, "__0_0.distcp "),
)
"""Names of data files in `.metadata`."""


def edit_header(rng: random.Random, folder: Path, canary: Path) -> str:
    """Change the header of a safetensors file, or its stated length."""
    file = pick(rng, folder, "*.safetensors")
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


def edit_numbers(rng: random.Random, folder: Path, canary: Path) -> str:
    """Write NaN, infinity, 1e30 or 0 into the second half of a file of weights."""
    file = pick(rng, folder, "*.safetensors", "*.bin", "*.distcp")
    held = bytearray(file.read_bytes())
    if len(held) < 3000:
        raise Skip
    at = rng.randrange(len(held) // 2, len(held) - 2000) & ~3
    held[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 1e30, 0.0)))
    file.write_bytes(held)
    return file.name


def _step(rng: random.Random, folder: Path) -> Path:
    """The folder of a step, mostly of the last."""
    steps = sorted(file.parent for file in folder.rglob(".metadata") if file.is_file())
    if not steps:
        raise Skip
    return rng.choice(steps[-1:] * 3 + steps)


def edit_tracker(rng: random.Random, folder: Path, canary: Path) -> str:
    text = rng.choice(STEPS)
    (folder / TRACKER).write_bytes(text)
    return repr(text[:24])


def edit_index(rng: random.Random, folder: Path, canary: Path) -> str:
    """Change a number, a name or a type of `.metadata`."""
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
        info.relative_path = rng.choice(PATHS)
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


def edit_arguments(rng: random.Random, folder: Path, canary: Path) -> str:
    """Change one argument that a checkpoint was saved with, or an entry of its common state."""
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


def add_code(rng: random.Random, folder: Path, canary: Path) -> str:
    """Plant code that makes the canary when it runs."""
    step = _step(rng, folder)
    change = rng.choice(CODE)
    try:
        change(step, canary)
    except (ValueError, OSError, StopIteration, KeyError):
        raise Skip from None
    return change.__name__


def edit_pickle(rng: random.Random, folder: Path, canary: Path) -> str:
    file = pick(rng, folder, ".metadata", "common.pt", "*.bin")
    name = rng.choice(sorted(PICKLES))
    held = file.read_bytes()
    file.write_bytes(PICKLES[name] if rng.random() < 0.4 else changes.data(rng, held))
    return f"{file.name}: {name}"
