"""Which samples a rank's latest micro-batch and step hold, so that a bad one can be named."""

from __future__ import annotations

import functools
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from torch import Tensor

from megatron_mlra.fault_tolerance.heartbeat import tell

_MOST_NAMED = 4

SOURCE = "source"
"""Key of what a sample is made from: its number in the dataset, its first document and the token in
it, int64 `[3]`."""

BAD_TOKEN = "bad_token"
"""Key of what is wrong with a sample's token ids, a line; empty where nothing is."""

_latest: Tensor | None = None
_step: list[list[int]] = []


class _WithSource:
    """Samples with two more entries: their source, and a line about a token id outside the model's
    vocabulary.

    Ids are checked before Megatron replaces those that equal the padding id. The loader's process
    leaves the line in the sample and raises nothing: an error there would arrive as a traceback
    inside another message.
    """

    def __init__(self, *rest: Any, **named: Any) -> None:
        self.vocabulary = vocabulary(get_args())
        self._bad_token = ""
        super().__init__(*rest, **named)

    def _query_document_sample_shuffle_indices(self, idx: int):
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        self._bad_token = ""
        # Behind the documents the last sample of an epoch is padded.
        ids = text[: sum(lengths)]
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocabulary):
            place = int(((ids < 0) | (ids >= self.vocabulary)).argmax())
            _, token = self.sample_index[self.shuffle_index[idx]]
            self._bad_token = self._say_bad(documents, lengths, int(token), place, int(ids[place]))
        return text, documents, lengths

    def _say_bad(self, documents, lengths: list[int], token: int, place: int, value: int) -> str:
        """The line about the id at `place` of a sample that begins at `token` of its document."""
        starts = np.cumsum([0, *lengths])
        part = int(np.searchsorted(starts, place, side="right")) - 1
        token = place - int(starts[part]) + (token if part == 0 else 0)
        where = f"data {self.dataset_path}: " if self.dataset_path else ""
        return (
            f"{where}document {documents[part]}, token {token} has id {value}, outside the"
            f" model's vocabulary of {self.vocabulary}; preprocess the data with the model's"
            " tokenizer, or give its size by --vocab-size"
        )

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample = super().__getitem__(idx)
        place, token = self.sample_index[self.shuffle_index[idx or 0]]
        number = -1 if idx is None else int(idx)
        document = int(self.document_index[place])
        origin = torch.tensor([number, document, int(token)])
        return sample | {SOURCE: origin, BAD_TOKEN: self._bad_token}


class SourcedDataset(_WithSource, GPTDataset):
    """Megatron's GPT dataset with `SOURCE`."""


class SourcedMockDataset(_WithSource, MockGPTDataset):
    """Megatron's mock dataset with `SOURCE`."""


def vocabulary(args: Namespace) -> int:
    """How many token ids the data may have: the true size of the vocabulary where it is given.

    Rows that only pad the embedding belong to no token: an id of such a row comes from another
    tokenizer.
    """
    return args.vocab_size or args.padded_vocab_size


def check(loaded: dict[str, Any]) -> None:
    """Refuse a micro-batch with a token id outside the vocabulary; the line ends all ranks.

    A tensor-parallel rank would take an id that is not in its part of the embedding for another
    rank's, and train on a vector of zeros.

    Raises:
        ValueError: names the data, the document, the token in it and the id.
    """
    if bad := next(filter(None, loaded.get(BAD_TOKEN, ())), None):
        tell(bad)
        raise ValueError(bad)


def name_bad(train_step: Callable) -> Callable:
    """Megatron's `train_step`, whose error for a NaN or infinite gradient names the step's samples.

    Megatron looks at gradients once per step, when those of all its micro-batches are summed up.
    """

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

    return named_step


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
