"""The interface of checkpoint folders of every kind: the model, and its tensors by name."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.tracker import NO_CHECKPOINT
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.description.model import CheckpointError, ModelDescription
from megatron_mlra.description.tensors import expected_tensors

CONFIG_BYTES = 4 << 20
"""Most bytes of a config.json."""
PROBLEMS_SHOWN = 200
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
)


class CheckpointFolder:
    """A model's weights in a folder: global tensors with canonical names (description/tensors.py).

    `tensor` reads one tensor at a time; nothing is cached.
    """

    kind: str
    """'megatron', 'huggingface' or 'research'."""

    path: Path
    description: ModelDescription

    verify: bool = False
    """Compare files with the folder's checksums, if it has any."""

    args: argparse.Namespace | None = None
    """The run's arguments, of a 'megatron' folder."""

    iteration: int | None = None
    """The run's step, of a 'megatron' folder."""

    @functools.cached_property
    def folder(self) -> Path:
        """The folder of the weights: `path`, or an `iter_*` or release folder in it."""
        return self.path

    @property
    def ahead(self) -> str | None:
        """What layers of multi-token prediction the model has, in words."""
        depths = self.description.mtp_num_layers
        said = f"multi-token prediction ({depths} token{'s' * (depths > 1)} ahead)"
        return said if depths else None

    def names(self) -> list[str]:
        """Canonical names of all tensors, in the order of a forward pass."""
        return list(expected_tensors(self.description))

    def tensor(self, name: str) -> torch.Tensor:
        """The global tensor of a canonical name, on the CPU, in the description's dtype (float32
        for a router's expert bias), which holds every stored number exactly.

        Raises:
            CheckpointError: the tensor is damaged, or holds NaN or infinities.
            KeyError: the model has no tensor of this name.
        """
        tensor = self._read(name)
        check_finite(tensor, f"{self.path}: {name}")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        """As `tensor`, without the check of the numbers."""
        raise NotImplementedError

    def check_finite(self) -> None:
        """Read every tensor once.

        Raises:
            CheckpointError: a tensor is damaged, or holds NaN or infinities.
        """
        for _ in self.tensors():
            pass

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every tensor, in the order of `names`."""
        for name in self.names():
            yield name, self.tensor(name)

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer beside the weights.

        Raises:
            CheckpointError: a file differs from its checksum, or is a link out of the folder.
        """
        files = tokenizer_files(self.path)
        if self.verify:
            manifest.check_listed(self.path, [file.name for file in files])
        return files

    def named_tokenizer(self) -> list[Path]:
        """Files of a tokenizer elsewhere, whose path the checkpoint names.

        The user's own process may read the files. They are never copied into an export: the author
        of the checkpoint chose the path.
        """
        return []


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Refuse NaN and infinities.

    Args:
        what: name of the tensor, for the message.

    Raises:
        CheckpointError: the tensor holds NaN or infinities.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = (value.item() for value in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(
            f"{what} has {bad:,} NaN or infinite of {tensor.numel():,} numbers; the run that saved"
            " it had diverged: use an earlier checkpoint"
        )


def tokenizer_files(folder: Path, *, follow_links: bool = False) -> list[Path]:
    """Tokenizer files in a folder.

    Args:
        follow_links: allow links out of the folder, for files that are read and not copied.

    Raises:
        CheckpointError: a file is a link out of the folder.
    """
    names = [*TOKENIZER_FILES, *sorted(path.name for path in folder.glob("*.tiktoken"))]
    there = [folder / name for name in names if (folder / name).is_file()]
    return there if follow_links else [inside(folder, path.name) for path in there]


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer."""
    return name in TOKENIZER_FILES or name.endswith(".tiktoken")


def read_config(path: Path, verify: bool = False) -> dict:
    """The folder's config.json.

    Args:
        verify: compare the file with its checksum, if it has one.

    Raises:
        CheckpointError: the file is missing, is no JSON object, or differs from its checksum.
    """
    file = inside(path, "config.json")
    if not file.is_file():
        raise CheckpointError(NO_CHECKPOINT.format(path))
    if verify:
        manifest.check(path, ["config.json"], ("config.json",))
    try:
        config = read_json(file, CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def check_tensors(
    where: str | Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare stored tensors (name -> shape) with those that the model needs.

    Raises:
        CheckpointError: names the tensors that are missing, unknown or of another shape, the first
            `PROBLEMS_SHOWN` of them.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [
        f"unknown {name if name.isprintable() else repr(name)} {list(found[name])}"
        for name in found
        if name not in expected
    ]
    problems += [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if problems:
        if len(problems) > PROBLEMS_SHOWN:
            more = len(problems) - PROBLEMS_SHOWN
            problems[PROBLEMS_SHOWN:] = [f"and {more:,} more"]
        raise CheckpointError(f"{where} does not fit its model: {'; '.join(problems)}")
