"""Validation on the same samples each time, and without a trace in training.

Each of Megatron's evaluations takes the next samples of the validation data. Two losses of one run,
or of two runs with different intervals, are then of different text and cannot be compared.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader, Dataset, Subset


class _First(Subset):
    """The first `count` samples of a validation dataset, still marked as validation."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        super().__init__(dataset, range(min(count, len(dataset))))
        self.index_split = Split.valid


class _Again:
    """A loader that starts over at its end, without end."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.loader


def samples(args: Namespace) -> int:
    """The number of samples of one evaluation."""
    return args.eval_iters * args.eval_global_batch_size


def same_samples(build: Callable, args: Namespace) -> Callable:
    """Wrap `build_pretraining_data_loader`: each evaluation gets the same first `samples(args)`."""

    def build_loader(dataset, consumed_samples):
        part = getattr(dataset, "split", getattr(dataset, "index_split", None))
        again = part is Split.valid and args.dataloader_type == "single" and samples(args)
        if dataset is None or not again:
            return build(dataset, consumed_samples)
        return _Again(build(_First(dataset, samples(args)), 0))

    return build_loader


def draws_apart(build: Callable) -> Callable:
    """Wrap `build_pretraining_data_loader`, of loaders that draw from a generator of their own.

    At each start a loader draws a seed for its processes, by default from torch's generator of the
    CPU. Training on a CPU has its dropout from the same one: masks would depend on how often a run
    evaluates and resumes.
    """

    def build_apart(dataset, consumed_samples):
        loader = build(dataset, consumed_samples)
        if isinstance(loader, DataLoader):
            loader.generator = torch.Generator().manual_seed(torch.initial_seed())
        return loader

    return build_apart
