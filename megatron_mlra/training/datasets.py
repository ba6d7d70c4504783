"""Megatron's datasets with a cache of their own: keyed by content, checked, built on every host.

Megatron keys its cached order of samples by the data's path, so that new data under an old path are
read in the old order. Megatron has rank 0 alone build the cache, whose files another host may not
see.
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
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.command_line.ranks import first_of_host
from megatron_mlra.data.contents import cache_folder
from megatron_mlra.data.index_cache import cached
from megatron_mlra.fault_tolerance.samples import SourcedDataset

_AT_ONCE = 1 << 20
"""Rows of an index that are compared at once."""

_FULL = 0.80
"""Megatron shuffles the last pass over the data by itself where less than this share is drawn."""


class CachedDataset(SourcedDataset):
    """The GPT dataset, whose order of samples is a function of the content of PREFIX.idx."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        prefix = self.dataset.path_prefix
        # The key is the content of the data, not their path.
        self.unique_identifiers.pop("dataset_path")
        self.unique_identifiers["index"] = _index_digest(prefix, _state(prefix + ".idx"))
        return _cached(
            self,
            self.unique_identifiers,
            cache_folder(prefix, self.config.path_to_cache),
            ("document_index", "sample_index", "shuffle_index"),
            super()._build_document_sample_shuffle_indices,
            self._misfit,
        )

    def order_of(self, count: int) -> tuple[int, bool]:
        """What Megatron's order of the samples depends on beside data and seed, if `count` samples
        are drawn: the passes over the data, and whether the last pass is shuffled by itself."""
        drawn = copy.copy(self)
        drawn.num_samples = count
        tokens, extra = self._get_num_tokens_per_epoch(), self.config.add_extra_token_to_sequence
        passes = drawn._get_num_epochs(tokens)
        before_last, once = (
            (many * tokens - extra) // self.config.sequence_length for many in (passes - 1, 1)
        )
        return passes, passes > 1 and count - before_last < int(_FULL * once)

    def _misfit(self, arrays: tuple[np.ndarray, ...]) -> str | None:
        """Why the three cached indexes cannot be those of this data, or None.

        Args:
            arrays: document_index `[documents * epochs]`, sample_index `[samples + 1, 2]` (a
                position in document_index and a token's offset), shuffle_index `[samples]`.
        """
        documents, samples, shuffle = arrays
        if [a.ndim for a in arrays] != [1, 2, 1] or any(a.dtype.kind not in "iu" for a in arrays):
            return "its indexes are no lists of numbers"
        if samples.shape[1] != 2 or len(shuffle) != len(samples) - 1:
            return "its indexes are not of one length"
        if not _within(documents, self.indices.min(), self.indices.max()):
            return "it names documents that this part of the data does not have"
        if not _within(shuffle, 0, len(samples) - 2):
            return "it names samples that are none"
        lengths = self.dataset.sequence_lengths
        for start in range(0, len(samples), _AT_ONCE):
            # One row more, so that the last sample of the block is compared with the next.
            first, offset = np.asarray(samples[start : start + _AT_ONCE + 1]).T
            if not _within(first, 0, len(documents) - 1) or (np.diff(first) < 0).any():
                return "its samples are of no documents"
            if (offset < 0).any() or (offset > lengths[documents[first]]).any():
                return "its samples start outside their documents"
        return None


class CachedBlend(BlendedDataset):
    """A blend whose indexes (dataset and sample per row) are cached in --data-cache-path."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        identifiers = {
            "datasets": [dataset.unique_identifiers for dataset in self.datasets],
            "weights": self.weights,
            "size": self.size,
        }
        names = ("dataset_index", "dataset_sample_index")
        folder = self.config.path_to_cache
        return _cached(self, identifiers, folder, names, super()._build_indices, self._misfit)

    def _misfit(self, arrays: tuple[np.ndarray, ...]) -> str | None:
        """Why the two cached indexes `[samples]` cannot be those of this blend, or None."""
        which, samples = arrays
        if which.ndim != 1 or any(a.dtype.kind not in "iu" for a in arrays):
            return "its indexes are no lists of numbers"
        size = sum(self.weights) if self.size is None else self.size
        if which.shape != samples.shape or len(which) != size:
            return "its indexes are not of the blend's length"
        if not _within(which, 0, len(self.datasets) - 1):
            return "it names datasets that the blend does not have"
        ends = np.array([len(dataset) for dataset in self.datasets])
        for start in range(0, len(which), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            if (samples[part] < 0).any() or (samples[part] >= ends[which[part]]).any():
                return "it names samples that a dataset does not have"
        return None


class CachedBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, whose blends are `CachedBlend`."""

    @staticmethod
    def build_generic_dataset(cls: type, *rest: Any) -> Any:
        """See BlendedMegatronDatasetBuilder."""
        cls = CachedBlend if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *rest)


def order_differs(dataset: Any, planned: int, now: int) -> bool:
    """Whether a training dataset or blend of `now` samples begins otherwise than with `planned`.

    A blend's choice of dataset does not depend on its length, the order within a dataset does.
    """
    for part in getattr(dataset, "datasets", [dataset]):
        count = getattr(part, "num_samples", None)
        if isinstance(part, CachedDataset) and count is not None:
            before = -(-count * planned // now)  # a dataset's share of a blend stays
            if part.order_of(before) != part.order_of(count):
                return True
    return False


def _cached(
    dataset: Any,
    identifiers: dict[str, Any],
    folder: str | Path | None,
    names: tuple[str, ...],
    build: Callable[[], tuple[np.ndarray, ...]],
    misfit: Callable[[tuple[np.ndarray, ...]], str | None],
) -> tuple[np.ndarray, ...]:
    """The arrays that Megatron's `build` returns, through a cache in `folder`.

    Args:
        identifiers: determine the arrays; their hash is the cache's key.
        folder: None for no cache.
        names, misfit: see data/index_cache.py.
    """
    config = dataset.config

    def build_here() -> tuple[np.ndarray, ...]:
        # With an empty path Megatron builds on any rank and writes nothing.
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
    return cached(Path(folder), key, names, build_here, _say_once, misfit)


def _within(values: np.ndarray, least: int, most: int) -> bool:
    return not len(values) or (least <= values.min() and values.max() <= most)


def _say_once(line: str) -> None:
    """Print `line` on the first rank of a host, since all ranks of a host see the same files."""
    if first_of_host():
        say(line)


def _state(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _index_digest(prefix: str, state: tuple[int, int]) -> str:
    """Size and SHA-256 of PREFIX.idx, read once for all parts of a split."""
    return f"{state[0]} {sha256(prefix + '.idx')}"
