"""Fingerprints of what all hosts of a run must have in common: code, arguments, data files.

A fingerprint maps the name of a thing, as messages call it, to a short text. Two hosts agree if
their fingerprints are equal.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_mlra.command_line.parser import flag
from megatron_mlra.version import installed

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "flash-attn")
"""Packages whose version may change the results of a run."""

LOCAL = {"rank", "local_rank", "config", "tensorboard_dir", "wandb_save_dir"}
"""Arguments that may differ between ranks: `config`, since a preset's values are arguments
themselves, and folders of logs, which one rank writes."""

BLOCK = 4096
"""Bytes of one sample of a data file."""
BLOCKS = 1024
"""Samples of all data files together; each file has 4 to 64."""


def of_arguments(args: Namespace) -> dict[str, str]:
    """Flag -> value of every argument, except those that may differ between ranks."""
    return {
        flag(name): value if isinstance(value, str) else repr(value)
        for name, value in sorted(vars(args).items())
        if name not in LOCAL
    }


def of_code() -> dict[str, str]:
    """Versions of packages, and digests of this project's source."""
    found = {f"the version of {name}": said for name, said in installed(*PACKAGES).items()}
    found["the version of torch"] = torch.__version__  # with its build, such as +cu128
    for name in ("megatron_mlra", "mlra_kernels"):
        folder = Path(str(importlib.resources.files(name)))
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
        found[f"the source of {name}"] = f"SHA-256 {digest.hexdigest()[:12]}"
    return found


def of_data(args: Namespace) -> dict[str, str]:
    """Size of every data file, and a digest of blocks spread evenly over the file."""
    if args.mock_data or args.skip_train:
        return {}
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [b for b in (blend, *(per_split or ())) if b is not None]
    paths = sorted({prefix + end for names, _ in blends for prefix in names for end in _FILES})
    paths = [path for path in paths if Path(path).is_file()]
    blocks = max(4, min(64, BLOCKS // max(len(paths), 1)))
    with ThreadPoolExecutor(16) as threads:
        samples = list(threads.map(lambda path: _sample(path, blocks), paths))
    found = {}
    for path, (size, digest) in zip(paths, samples, strict=True):
        found[f"the size of {path}"] = f"{size:,} bytes"
        found[f"the content of {path}"] = f"SHA-256 {digest[:12]} of samples"
    return found


_FILES = (".bin", ".idx")


def _sample(path: str, blocks: int) -> tuple[int, str]:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - BLOCK, 0)
        for i in range(blocks):
            digest.update(os.pread(file.fileno(), BLOCK, last * i // (blocks - 1)))
    return size, digest.hexdigest()
