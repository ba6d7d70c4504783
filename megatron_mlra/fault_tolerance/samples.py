"""Remembers the samples of a rank's latest micro-batch and step, so that errors can name them."""

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
"""Key of a sample's origin, int64 `[3]`: its number in the dataset, its first document, and the
position of its first token in that document."""

BAD_TOKEN = "bad_token"
"""Key of a line on a wrong token id in the sample; empty if there is none."""

_latest: Tensor | None = None
_step: list[list[int]] = []


class _WithSource:
    """A mixin that adds two entries to samples: `SOURCE`, and `BAD_TOKEN`, a line on a token id
    outside the model's vocabulary.

    Ids are checked before Megatron replaces those that equal the padding id. The data loader's
    process does not raise an error, which would arrive as a traceback inside another message.
    """

    def __init__(self, *rest: Any, **named: Any) -> None:
        self.vocabulary = vocabulary(get_args())
        self._bad_token = ""
        super().__init__(*rest, **named)

    def _query_document_sample_shuffle_indices(self, idx: int):
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        self._bad_token = ""
        # The last sample of an epoch is padded after its documents.
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
    """The number of valid token ids: the size of the vocabulary without padding if it is given.

    Rows that pad the embedding belong to no token. An id of such a row comes from another
    tokenizer.
    """
    return args.vocab_size or args.padded_vocab_size


def check(loaded: dict[str, Any]) -> None:
    """Refuse a micro-batch with a token id outside the vocabulary; the error ends all ranks.

    A tensor-parallel rank treats an id outside its shard of the embedding as another rank's. For an
    id outside all shards the model would train on a vector of zeros.

    Raises:
        ValueError: names the data, the document, the token in it and the id.
    """
    if bad := next(filter(None, loaded.get(BAD_TOKEN, ())), None):
        tell(bad)
        raise ValueError(bad)


def name_bad(train_step: Callable) -> Callable:
    """Megatron's `train_step`, whose error for a NaN or infinite gradient names the step's samples.

    Megatron checks gradients once per step, after those of all micro-batches are summed.
    """

    @functools.wraps(train_step)
    def named_step(*rest, **named):
        _step.clear()
        try:
            return train_step(*rest, **named)
        except RuntimeError as error:
            # Of Megatron's validate_result, which reports a step one too high. Rank, node and
            # device go to the log with the cause.
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
    """Remember the samples of a micro-batch from the data loader."""
    global _latest
    _latest = loaded.get(SOURCE)
    if torch.is_grad_enabled() and _latest is not None:
        _step.extend(_latest.tolist())


def latest() -> str:
    """The samples of the latest micro-batch, for a message. Only the first rank of a
    tensor-parallel group loads data; the others refer to it."""
    if _latest is None:
        where = f"data-parallel rank {mpu.get_data_parallel_rank()}"
        return f"{where} (its first tensor-parallel rank names the samples)"
    return _words(_latest.tolist(), "samples")


def _of_step() -> list[list[int]]:
    """`SOURCE` of this step's samples so far; on ranks that load no data only their numbers."""
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
