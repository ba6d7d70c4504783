"""Judges a tool's run on any input: the tool must do its task, or refuse with one line and exit
code 2."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import torch

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.description.model import CheckpointError
from support.fuzz.tools import Call

LONGEST = 3000
"""Most characters of a line of refusal."""


def state(folder: Path, without: Path) -> dict[str, tuple]:
    """Path -> (kind and mode, size, SHA-256 or target of a link), of everything below a folder
    except `without`."""
    found = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == without:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = os.path.join(root, name)
            if Path(path) == without:
                continue
            seen = os.lstat(path)
            content = ""
            if stat.S_ISREG(seen.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(seen.st_mode):
                content = os.readlink(path)
            found[path] = (seen.st_mode, seen.st_size, content)
    return found


def wrong(call: Call, code: int, out: str, err: str) -> str | None:
    """The fault of a tool's run in a few words; None for a right run."""
    if "Traceback (most recent call last)" in err + out:
        return "traceback"
    if code not in (0, 2, *call.may_fail):
        return f"exit code {code}"
    if code == 0:
        return None
    lines = [line for line in err.splitlines() if line.strip()]
    if code == 2 or not out:
        errors = [line for line in lines if line.startswith("error: ")]
        if len(errors) != 1 or (len(lines) != 1 and not call.may_fail):
            return f"{len(lines)} lines of error"
        if len(errors[0]) > LONGEST:
            return f"a line of {len(errors[0])} characters"
        if len(errors[0]) < 16:
            return "a line that says nothing"
    if call.writes is not None:
        left = [p.name for p in call.writes.parent.glob(f"*{call.writes.name}*")]
        if left:
            return f"left {', '.join(left)} behind"
    return None


def wrong_result(call: Call, out: str) -> str | None:
    """The fault in the result of a tool that exited with 0; None for a right result."""
    command = call.argv[0]
    if call.writes is not None and not _exists(call.writes):
        return "wrote nothing"
    if call.writes is None and not out.strip() and not call.name.startswith("entry"):
        return "said nothing"
    if call.name == "preprocess":
        return wrong_data(str(call.writes))
    if call.name == "entry --data-path":
        return wrong_data(str(call.argv[call.argv.index("--data-path") + 1]))
    if isinstance(command, str) and command.startswith(("import", "export", "reshard")):
        return _differs(call.argv[1], call.writes, command == "reshard")
    if "nan" in out.lower().split():
        return "said nan"
    return None


def _exists(written: Path) -> bool:
    return written.exists() or written.with_name(f"{written.name}.bin").exists()


def _differs(source: Path, destination: Path, source_may_be_any: bool) -> str | None:
    """The first tensor or field in which a converted folder differs from its source, or None."""
    try:
        there = open_checkpoint(source)
    except CheckpointError:
        # What reshard copies need not be a model that can be converted.
        return None if source_may_be_any else "converted what cannot be read"
    here = open_checkpoint(destination)
    if there.names() != here.names():
        return "another model"
    for name in there.names():
        if not torch.equal(there.tensor(name), here.tensor(name)):
            return f"{name} differs"
    for field in ("num_attention_heads", "rotary_base", "vocab_size", "softmax_scale", "rope_type"):
        if getattr(there.description, field) != getattr(here.description, field):
            return f"{field} differs"
    return None


def wrong_data(prefix: str) -> str | None:
    """The fault of an accepted dataset by the rules of its format, or None."""
    with open(prefix + ".idx", "rb") as file:
        held = file.read()
    code, sequences, bounds = held[17], *np.frombuffer(held, "<u8", 2, 18)
    itemsize = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    sequences, bounds = int(sequences), int(bounds)
    if len(held) != 34 + 12 * sequences + 8 * bounds:
        return "an index of another size"
    lengths = np.frombuffer(held, "<i4", sequences, 34).astype(np.int64)
    offsets = np.frombuffer(held, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(held, "<i8", bounds, 34 + 12 * sequences)
    ends = np.cumsum(lengths) * itemsize
    if (lengths < 0).any() or (offsets != np.concatenate([[0], ends[:-1]])).any():
        return "an index of shifted documents"
    if os.path.getsize(prefix + ".bin") != ends[-1]:
        return "a .bin of another size"
    if (
        not bounds
        or documents[0] != 0
        or documents[-1] != sequences
        or (np.diff(documents) < 0).any()
    ):
        return "bounds of documents that are none"
    return None
