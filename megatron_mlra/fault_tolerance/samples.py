"""Which samples a rank's latest micro-batch and step hold, so that a bad one can be named."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, training
from torch import Tensor

_MOST_NAMED = 4

SOURCE = "source"
"""Key of what a sample is made from: its number in the dataset, its first document and the token in
it, int64 `[3]`."""

_latest: Tensor | None = None
_step: list[list[int]] = []


class _WithSource:
    """Samples that say what they are made from."""

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        place, token = self.sample_index[self.shuffle_index[idx or 0]]
        number = -1 if idx is None else int(idx)
        document = int(self.document_index[place])
        return sample | {SOURCE: torch.tensor([number, document, int(token)])}


class SourcedDataset(_WithSource, GPTDataset):
    """Megatron's GPT dataset with `SOURCE`."""


class SourcedMockDataset(_WithSource, MockGPTDataset):
    """Megatron's mock dataset with `SOURCE`."""


def install() -> None:
    """Have the trainer's error for a NaN or infinite gradient name the samples of the step.

    Megatron looks at gradients once a step, when those of all its micro-batches are summed up.
    """
    train_step = training.train_step

    @functools.wraps(train_step)
    def named_step(*rest, **named):
        _step.clear()
        try:
            return train_step(*rest, **named)
        except RuntimeError as error:
            # Megatron's validate_result, whose iteration is one too high; its rank, node and device
            # go to the log with the cause.
            found = re.search(r"Unexpected result (\S+) \(message='(.*)'\)", str(error))
            if not found:
                raise
            step, (value, what) = get_args().curr_iteration + 1, found.groups()
            told = RuntimeError(
                f"step {step}: {what}: {value}, on {_words(_of_step(), 'one of samples')}; lower"
                " --lr, or look at the batch"
            )
            told.add_note(f"all samples of this rank in step {step}: {_of_step()}")
            raise told from error

    training.train_step = named_step


def note(loaded: dict[str, Any]) -> None:
    """Remember a micro-batch as it comes from the loader."""
    global _latest
    _latest = loaded.get(SOURCE)
    if torch.is_grad_enabled() and _latest is not None:
        _step.extend(_latest.tolist())


def latest() -> str:
    """The latest micro-batch in words. Of a tensor-parallel group the first rank loads, and the
    others say so."""
    if _latest is None:
        where = f"data-parallel rank {mpu.get_data_parallel_rank()}"
        return f"{where} (its first tensor-parallel rank names the samples)"
    return _words(_latest.tolist(), "samples")


def _of_step() -> list[list[int]]:
    """The `SOURCE` of this step's samples so far; only their numbers on ranks that load none."""
    if _step:
        return _step
    args, rank = get_args(), mpu.get_data_parallel_rank()
    if args.dataloader_type != "single":
        return []
    micro, replicas = args.micro_batch_size, mpu.get_data_parallel_world_size()
    return [
        [args.consumed_train_samples + (batch * replicas + rank) * micro + i]
        for batch in range(get_num_microbatches())
        for i in range(micro)
    ]


def _words(sources: list[list[int]], title: str) -> str:
    said = [
        str(number) + (" (document {} from token {})".format(*origin) if origin else "")
        for number, *origin in sources[:_MOST_NAMED]
    ]
    more = f" and {len(sources) - _MOST_NAMED} more" if len(sources) > _MOST_NAMED else ""
    listed = f", {title} {', '.join(said)}{more}" if said else ""
    return f"data-parallel rank {mpu.get_data_parallel_rank()}{listed}"
