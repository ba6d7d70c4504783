"""Megatron checkpoint folders (torch_dist): what `pretrain_mlra.py --save` writes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.tracker import (
    TRACKER,
    candidates,
    first_usable,
    step_of,
    tracked_step,
    untracked,
)
from megatron_mlra.checkpoint.files.weight_files import common_dtype
from megatron_mlra.checkpoint.folder import (
    CheckpointFolder,
    check_tensors,
    tokenizer_files,
)
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from megatron_mlra.command_line.printable import printable
from megatron_mlra.description.megatron_args import check_convertible, from_megatron_args
from megatron_mlra.description.model import CheckpointError, check_layers
from megatron_mlra.description.tensors import (
    EXPERTS,
    MULTI_TOKEN_LAYER,
    VOCABULARY,
    dtype_of,
    expected_tensors,
)

RENAMED = {"mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
"""Stored name -> canonical name of norms that Transformer Engine fuses into the next linear. Their
stored name is the same without Transformer Engine."""

RENAMED_GQA = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
"""The same for models with grouped queries only."""

_STATE = re.compile(
    r"(?:chained_\d+\.)?optimizer\.|rng_state|rerun_state|opt_param_scheduler|.*\._extra_state"
)
_LAYER = re.compile(r"(decoder\.layers\.)(?:(\d+)\.)?(.+)")
_DRAFT_LAYER = re.compile(rf"(mtp\.layers\.)(\d+)\.{re.escape(MULTI_TOKEN_LAYER)}(.+)")


class MegatronFolder(CheckpointFolder):
    """The latest checkpoint of a `--save` folder, or an `iter_*` folder."""

    kind = "megatron"

    def __init__(self, path: Path, vocab_size: int | None, verify: bool) -> None:
        self.path = path
        self.verify = verify
        self.folder = iteration_folder(path, verify)
        self.files = TorchDistFolder(self.folder, verify)
        state = self.files.common_state()
        args = state.get("args")
        if args is None:
            raise CheckpointError(
                f"checkpoint {self.folder} names no arguments; it was not written by pretrain_mlra"
            )
        self.args = args
        overrides = {} if vocab_size is None else {"vocab_size": vocab_size}
        try:
            check_layers("num_layers", getattr(args, "num_layers", None), self._stored_layers())
            check_convertible(args)
            described = from_megatron_args(args, **overrides)
            stored = sum(key.startswith("mtp.layers.") for key in self.files.shapes())
            check_layers("mtp_num_layers", described.draft_layers, stored)
            self.description = described
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self.folder}: {error}") from None
        self.iteration = state.get("iteration")
        self._places = self._map(vocab_size)
        dtypes = {
            name: self.files.dtype(key)
            for name, (key, _) in self._places.items()
            if dtype_of(name, "") != "float32"
        }
        dtype = common_dtype(dtypes, self.folder)
        self.description = self.description.replace(dtype=dtype)
        self.files.check_contents({*(key for key, _ in self._places.values()), COMMON_KEY})

    def _read(self, name: str) -> torch.Tensor:
        """See CheckpointFolder.tensor; without the rows that pad the vocabulary."""
        tensor = self.files.tensor(*self._places[name])
        if name in VOCABULARY:
            tensor = tensor[: self.description.vocab_size]
        return tensor.to(getattr(torch, dtype_of(name, self.description.dtype)))

    def named_tokenizer(self) -> list[Path]:
        """See CheckpointFolder: the run's --tokenizer-model, a folder or a file."""
        named = self.description.tokenizer_model
        if not isinstance(named, str) or not named or "\0" in named or len(named) > 4096:
            return []
        model = Path(named)
        if model.is_dir():
            return tokenizer_files(model, follow_links=True)
        return [model] if model.is_file() else []

    def _stored_layers(self) -> int:
        """An upper bound of the layers that the stored tensors hold: one per stored name, or the
        first dimension of stacked tensors."""
        shapes = self.files.shapes()
        stacked = [s[0] for key, s in shapes.items() if s and key.startswith("decoder.layers.")]
        return max(len(shapes), *stacked, 0)

    def _map(self, vocab_size: int | None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Canonical name -> (stored name, indices of its first dimensions: layer, expert)."""
        renamed = RENAMED | (RENAMED_GQA if self.description.attention == "gqa" else {})
        found: dict[str, tuple[int, ...]] = {}
        places: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, shape in self.files.shapes().items():
            if _STATE.match(key):
                continue
            match = _LAYER.fullmatch(key) or _DRAFT_LAYER.fullmatch(key)
            if match is None:
                found[key], places[key] = shape, (key, ())
                continue
            kind, layer, rest = match.groups()
            inner = "" if match.re is _LAYER else MULTI_TOKEN_LAYER
            rest = renamed.get(rest, rest)
            if layer is None:
                # `check_tensors` refuses one layer too many; more need not be listed.
                stacked = min(shape[0] if shape else 0, self.description.num_layers + 1)
                each = [(f"decoder.layers.{i}.", (i,)) for i in range(stacked)]
            else:
                each = [(f"{kind}{layer}.{inner}", ())]
            if rest.startswith(EXPERTS):
                each = [
                    (f"{prefix}{EXPERTS}{e}.", (*at, e))
                    for prefix, at in each
                    for e in range(min(shape[len(at)], self.description.num_experts + 1))
                ]
                rest = rest.removeprefix(EXPERTS)
            for prefix, at in each:
                found[prefix + rest], places[prefix + rest] = shape[len(at) :], (key, at)
        expected = expected_tensors(self.description)
        for name in VOCABULARY:
            rows = found.get(name) or (0,)
            if vocab_size is not None and 0 < rows[0] < vocab_size:
                raise CheckpointError(
                    f"--vocab-size {vocab_size} is more than the {rows[0]} rows of {name} in"
                    f" {self.folder}; use at most as many"
                )
            if name in found and name in expected and found[name][0] > expected[name][0]:
                found[name] = (expected[name][0], *found[name][1:])
        check_tensors(f"checkpoint {self.folder}", found, expected)
        return places


def iteration_folder(
    path: Path, verify: bool = False, say: Callable[[str], object] | None = None
) -> Path:
    """The folder with the weights: the one that the tracker of `path` names; where it names none,
    the newest whole step; `path` itself without either.

    Args:
        verify: a step is whole if its files also have their checksums.
        say: called with a line on a step that the tracker does not name; default: print it to
            standard error on the first rank.

    Raises:
        CheckpointError: the tracker names a folder that is missing, or no step is whole.
    """
    step = tracked_step(path)
    if not step:
        return _untracked_folder(path, verify, say or _warn)
    folder = inside(path, _folder_of(step))
    if not folder.is_dir():
        there = sorted(each.name for each in path.glob("iter_*"))
        others = f"; there is {', '.join(there)}" if there else ""
        raise CheckpointError(
            f"checkpoint {folder} is missing, though {path / TRACKER} names it{others}"
        )
    return folder


def _untracked_folder(path: Path, verify: bool, say: Callable[[str], object]) -> Path:
    """See `iteration_folder`, of a path whose tracker is missing or empty."""

    def check(folder: Path) -> None:
        stored = TorchDistFolder(inside(path, folder.name), verify)
        stored.common_state()
        stored.check_contents(name for name, _ in stored.stored)

    try:
        found = [] if (path / ".metadata").is_file() else candidates(path)
        folder, refused = first_usable(found, check, "give its folder")
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if folder is None:
        if tracked_step(path) is None:
            return path
        raise CheckpointError(f"{untracked(path)}, and there is no step in {path}")
    for why in refused:
        say(f"warning: {why}")
    number = step_of(folder)
    say(f"warning: {untracked(path)}: reading the newest whole checkpoint, that of step {number:,}")
    return folder


def _warn(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr, flush=True)


def _folder_of(step: str) -> str:
    return step if step == "release" else f"iter_{int(step):07d}"
