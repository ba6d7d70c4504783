"""Fingerprints of what all ranks must have in common: environment, code, arguments, files.

A fingerprint maps the name of a thing, as messages call it, to a short text. Two hosts agree if
their fingerprints are equal.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
from argparse import Namespace
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_mlra.command_line.parser import flag
from megatron_mlra.version import installed

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "flash-attn")
"""Packages whose version may change the results of a run."""

ENVIRONMENT = (
    "WORLD_SIZE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "NVTE_UNFUSED_ATTN",
    "TORCHDYNAMO_DISABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "TRITON_INTERPRET",
)
"""Environment variables that change which collectives or kernels run. Those that name interfaces or
devices of a host may differ."""

LOCAL = {"rank", "local_rank", "config", "tensorboard_dir", "wandb_save_dir"}
"""Arguments that may differ between ranks: `config`, since a preset's values are arguments
themselves, and folders of logs, which one rank writes."""

BLOCK = 4096
"""Bytes of one sample of a file."""
BLOCKS = 1024
"""Samples of all files together; each file has 4 to 64."""


def of_environment() -> dict[str, str]:
    """The variables of `ENVIRONMENT`."""
    return {
        f"the environment variable {name}": os.environ.get(name, "not set") for name in ENVIRONMENT
    }


def of_arguments(args: Namespace, positional: Collection[str] = ()) -> dict[str, str]:
    """Flag -> value of every argument, except those that may differ between ranks.

    Args:
        positional: arguments without a flag, which messages call by their bare name.
    """
    return {
        name if name in positional else flag(name): value if isinstance(value, str) else repr(value)
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


def of_files(files: Iterable[str | Path]) -> dict[str, str]:
    """Size of every file, and a digest of blocks spread evenly over the file."""
    paths = sorted({str(file) for file in files})
    blocks = max(4, min(64, BLOCKS // max(len(paths), 1)))
    with ThreadPoolExecutor(16) as threads:
        samples = list(threads.map(lambda path: _sample(path, blocks), paths))
    found = {}
    for path, (size, digest) in zip(paths, samples, strict=True):
        found[f"the size of {path}"] = f"{size:,} bytes"
        found[f"the content of {path}"] = f"SHA-256 {digest[:12]} of samples"
    return found


def _sample(path: str, blocks: int) -> tuple[int, str]:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - BLOCK, 0)
        for i in range(blocks):
            digest.update(os.pread(file.fileno(), BLOCK, last * i // (blocks - 1)))
    return size, digest.hexdigest()
