"""Rewrites a Megatron checkpoint: into other files, without the optimizer, or in another dtype.

Loading at another parallel layout needs no rewriting: torch_dist stores global tensors. Entries are
copied without knowledge of the model, so every attention and mixtures of experts work.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.staging import written_aside
from megatron_mlra.checkpoint.files.tokenizer_copy import copy_file, say_nothing
from megatron_mlra.checkpoint.files.torch_dist_index import COMMON_FILE
from megatron_mlra.checkpoint.files.tracker import TRACKER, is_megatron
from megatron_mlra.checkpoint.folder import check_finite, tokenizer_files
from megatron_mlra.checkpoint.megatron.folder import iteration_folder
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from megatron_mlra.checkpoint.megatron.writer import (
    StreamingPlanner,
    save_torch_dist,
    saved_object,
    seal,
)
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.description.model import DTYPES, CheckpointError
from megatron_mlra.description.tensors import EXPERT_BIAS

_OF_A_RUN = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state|opt_param_scheduler")
_STACKED = re.compile(r"(.*\.)?decoder\.layers\.(?!\d)")
_RESHARDABLE = (None, "fully_reshardable", "fully_sharded_model_space")
"""Formats of a distributed optimizer's state that do not depend on the parallel layout."""


def reshard(
    source: str | Path,
    destination: str | Path,
    *,
    files: int = 1,
    weights_only: bool = False,
    dtype: str | None = None,
    progress: bool = True,
    say: Callable[[str], object] = say_nothing,
    verify: bool = True,
) -> None:
    """Rewrite the latest checkpoint of a `--save` folder, or an `iter_*` folder.

    Args:
        files: number of files for the tensors; each is written by its own thread.
        weights_only: leave out optimizer, schedule and random states. The copy is a release
            checkpoint: a run that loads it starts at step 0.
        dtype: of the weights, default the source's; needs `weights_only`, since an optimizer's
            state belongs to weights of its dtype.
        say: called with one line per copied tokenizer file.
        verify: compare the source's files with its checksums, if it has any.

    Raises:
        CheckpointError: an argument is wrong; the source is damaged; its optimizer state depends on
            its parallel layout; or see `written_aside`.
    """
    if files < 1:
        raise CheckpointError(f"files is {files}; use at least 1")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if dtype is not None and not weights_only:
        raise CheckpointError(f"dtype {dtype} does not fit the optimizer's state; add weights_only")
    root = Path(source)
    if not is_megatron(root):
        raise CheckpointError(
            f"{root} is not a Megatron folder: it has neither {TRACKER} nor .metadata; give the"
            " --save of a run or its iter_* folder"
        )
    folder = iteration_folder(root, verify)
    stored = TorchDistFolder(folder, verify)
    stored.check_contents(name for name, _ in stored.stored)
    _check_layout(stored, weights_only)
    name = "release" if weights_only else folder.name
    planner = _Copy(stored, weights_only, getattr(torch, dtype) if dtype else None)
    with (
        bar(
            desc="writing", total=planner.bytes, unit="B", unit_scale=True, shown=progress
        ) as shown,
        written_aside(destination, planner.bytes) as partial,
    ):
        planner.bar = shown
        (partial / name).mkdir()
        save_torch_dist(planner, partial / name, files)
        if (folder / COMMON_FILE).is_file() and not weights_only:
            copy_file(folder / COMMON_FILE, partial / name / COMMON_FILE)
        tokenizer = tokenizer_files(root)
        if verify:
            manifest.check_listed(root, [file.name for file in tokenizer])
        seal(partial / name, partial, tokenizer, say)
        step = name.removeprefix("iter_").lstrip("0") or "0"
        (partial / TRACKER).write_text(step)


def _check_layout(stored: TorchDistFolder, weights_only: bool) -> None:
    content = stored.common_state().get("content_metadata") or {}
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {stored.path}: its content_metadata is {content!r:.60}, not a dictionary"
        )
    kind = content.get("distrib_optim_sharding_type")
    if not weights_only and kind not in _RESHARDABLE:
        raise CheckpointError(
            f"checkpoint {stored.path} holds optimizer state bound to its layout ({kind}); use"
            " --weights-only, or save with --dist-ckpt-optim-fully-reshardable"
        )


class _Copy(StreamingPlanner):
    """Plans every entry of a checkpoint. A tensor is one block; stacked layers one per layer."""

    def __init__(
        self, stored: TorchDistFolder, weights_only: bool, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.stored = stored
        self.dtype = dtype
        self.bar: tqdm | None = None
        self.shapes = {
            key: shape
            for key, shape in stored.shapes().items()
            if not (weights_only and _OF_A_RUN.match(key))
        }
        tensors = stored.shapes()
        self.objects = [
            key
            for key, _ in stored.stored
            if key not in tensors and not (weights_only and _OF_A_RUN.match(key))
        ]
        self.replaced: dict[str, bytes] = {}
        if weights_only:
            self.objects = [COMMON_KEY, *(key for key in self.objects if key != COMMON_KEY)]
            self.replaced[COMMON_KEY] = saved_object([_released(stored, dtype)])
        self.bytes = sum(
            math.prod(shape) * self._dtype(key).itemsize for key, shape in self.shapes.items()
        )

    def _dtype(self, key: str) -> torch.dtype:
        dtype = self.stored.dtype(key)
        cast = self.dtype is not None and dtype.is_floating_point and not key.endswith(EXPERT_BIAS)
        return self.dtype if cast else dtype

    def plan(self) -> None:
        """Add the objects, then the tensors."""
        for key in self.objects:
            known = self.replaced.get(key)
            self.add_bytes(key, self.stored.stored[key, ()].length if known is None else len(known))
        for key, shape in self.shapes.items():
            zeros = (0,) * len(shape)
            blocks = [(zeros, shape)]
            if _STACKED.match(key) and len(shape) > 1:
                blocks = [((i, *zeros[1:]), (1, *shape[1:])) for i in range(shape[0])]
            self.add_tensor(key, shape, self._dtype(key), blocks)

    def data(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor | bytes:
        """The bytes of an object, copied as they are, or a block of a tensor."""
        if key not in self.shapes:
            known = self.replaced.get(key)
            return self.stored.raw(key) if known is None else known
        stacked = _STACKED.match(key) and len(self.shapes[key]) > 1
        tensor = self.stored.tensor(key, offsets[:1] if stacked else ())
        cast = tensor.to(self._dtype(key))
        if not _OF_A_RUN.match(key):
            check_finite(tensor, f"checkpoint {self.stored.path}: {key}")
            check_finite(cast, f"checkpoint {self.stored.path}: {key} in {cast.dtype}")
        tensor = cast
        self.bar.update(tensor.numel() * tensor.element_size())
        return tensor.contiguous()


def _released(stored: TorchDistFolder, dtype: torch.dtype | None) -> dict[str, Any]:
    """The common state of a checkpoint at step 0: the arguments without the run's progress."""
    state = stored.common_state()
    args = state.get("args")
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(f"checkpoint {stored.path} names no arguments")
    values = {name: value for name, value in vars(args).items() if _is_plain(value)}
    values |= dict.fromkeys(
        ("iteration", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"),
        0,
    )
    values |= {"no_save_optim": True, "no_save_rng": True}
    if dtype is not None:
        values |= {"params_dtype": dtype}
        values |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    return {
        "args": argparse.Namespace(**values),
        "checkpoint_version": state.get("checkpoint_version", 3.0),
        "iteration": 0,
        "content_metadata": state.get("content_metadata"),
    }


def _is_plain(value: Any) -> bool:
    """Whether a value is complete. Enums and objects of other classes are not: safe_pickle reads
    them as inert objects."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)
