"""Megatron's datasets with a cache of their own: keyed by content, checked, built on every host.

Megatron keys the order of samples by the data's path, so that other data under the same path are
read by the old order; it has rank 0 alone build it, whose files another host may not see.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_mlra.command_line.parser import say
from megatron_mlra.data.contents import cache_folder, sha256
from megatron_mlra.data.index_cache import cached
from megatron_mlra.fault_tolerance.samples import SourcedDataset


class CachedDataset(SourcedDataset):
    """The GPT dataset, whose order of samples is a function of the content of PREFIX.idx."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        prefix = self.dataset.path_prefix
        # Where the data lie is no part of what they are.
        self.unique_identifiers.pop("dataset_path")
        self.unique_identifiers["index"] = _index_digest(prefix, _state(prefix + ".idx"))
        return _cached(
            self,
            self.unique_identifiers,
            cache_folder(prefix, self.config.path_to_cache),
            ("document_index", "sample_index", "shuffle_index"),
            super()._build_document_sample_shuffle_indices,
        )


class CachedBlend(BlendedDataset):
    """Which dataset of a blend a sample comes from; cached where --data-cache-path is given."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        identifiers = {
            "datasets": [dataset.unique_identifiers for dataset in self.datasets],
            "weights": self.weights,
            "size": self.size,
        }
        names = ("dataset_index", "dataset_sample_index")
        folder = self.config.path_to_cache
        return _cached(self, identifiers, folder, names, super()._build_indices)


class CachedBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, whose blends are `CachedBlend`."""

    @staticmethod
    def build_generic_dataset(cls: type, *rest: Any) -> Any:
        """See BlendedMegatronDatasetBuilder."""
        cls = CachedBlend if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *rest)


def _cached(
    dataset: Any,
    identifiers: dict[str, Any],
    folder: str | Path | None,
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
) -> tuple[np.ndarray, ...]:
    """Megatron's arrays through the cache of `folder`; None for none."""
    config = dataset.config

    def build_here() -> tuple[np.ndarray, ...]:
        # An empty path has Megatron build on any rank, and write nothing.
        dataset.config = copy.copy(config)
        dataset.config.path_to_cache = ""
        try:
            return build()
        finally:
            dataset.config = config

    if folder is None:
        return build_here()
    described = json.dumps(identifiers, default=lambda other: other.unique_identifiers)
    key = f"{type(dataset).__name__}-{hashlib.sha256(described.encode()).hexdigest()[:24]}"
    return cached(Path(folder), key, names, build_here, _say_once)


def _say_once(line: str) -> None:
    """The ranks of a host see the same files: its first one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(line)


def _state(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _index_digest(prefix: str, state: tuple[int, int]) -> str:
    """Size and SHA-256 of PREFIX.idx, read once for all parts of a split."""
    return f"{state[0]} {sha256(prefix + '.idx')}"
