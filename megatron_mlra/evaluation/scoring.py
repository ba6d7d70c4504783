"""Log-likelihoods of texts and of continuations under a causal language model.

The conventions are those of lm-evaluation-harness, so that both give the same numbers: trailing
spaces of a context belong to its continuation; an empty context becomes the end-of-document token;
inputs that are too long lose tokens on the left; a long text is scored in windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.evaluation.token_stream import windows

SHARED = 256
"""Fewest first tokens that continuations must share to be read once for all of them."""


@dataclass(frozen=True)
class Score:
    """The score of one continuation or text."""

    log_likelihood: float
    """Sum over tokens of the natural logarithm of their probability."""

    is_greedy: bool
    """Whether every token is the model's first choice."""

    num_tokens: int

    was_cut: bool = False
    """Whether the context lost tokens on the left."""


@dataclass(frozen=True)
class _Request:
    inputs: list[int]
    targets: list[int]
    was_cut: bool = False


class Scorer:
    """Scores texts with a model.

    Args:
        logits: (ids `[b, s]`, n) -> logits `[b, n, V]` of the last n positions. Padding on the
            right must not change earlier positions.
        encode: text -> ids, without special tokens.
        prefix_id: id that precedes a text without context, the end of a document.
        max_length: most tokens of an input of the model.
        batch_size: sequences per forward.
        progress: show a bar.
        vocab_size: of the model.
        shared: (first ids `[1, p]`, ids `[b, s]`, n) -> logits `[b, n, V]` of the last n positions
            of b rows behind one beginning, with padding as above. None: each row is read whole.
    """

    def __init__(
        self,
        logits: Callable[[Tensor, int], Tensor],
        encode: Callable[[str], list[int]],
        prefix_id: int,
        max_length: int,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        progress: bool = False,
        vocab_size: int | None = None,
        shared: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ) -> None:
        self.vocab_size, self.shared = vocab_size, shared
        self._encode_context = lru_cache(maxsize=1)(encode)  # an item's choices follow each other
        self.logits, self.encode, self.prefix_id = logits, encode, prefix_id
        self.max_length, self.batch_size = max_length, batch_size
        self.device, self.progress = device, progress

    def continuations(self, pairs: Iterable[tuple[str, str]]) -> list[Score]:
        """The score of each (context, continuation).

        Raises:
            ValueError: a continuation has no tokens, or more than the model takes.
        """
        return self._score([self._pair(*pair) for pair in pairs])

    def texts(self, texts: Iterable[str]) -> list[Score]:
        """The score of each whole text, of any length."""
        windows = [list(self._windows(self.encode(text))) for text in texts]
        scores = iter(self._score([request for text in windows for request in text]))
        return [_sum([next(scores) for _ in text]) for text in windows]

    def stream(self, tokens: np.ndarray, first: int) -> Score:
        """The score of a dataset's tokens, in the windows of token_stream.py.

        Args:
            tokens: all tokens of the dataset.
            first: id that precedes the stream, the end of a document.
        """
        cut = windows(tokens, first, self.max_length)
        return _sum(self._score([_Request(a.tolist(), b.tolist()) for a, b in cut]))

    def _pair(self, context: str, continuation: str) -> _Request:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            ids = self.encode(continuation)
            # No second prefix for a continuation that starts with the prefix itself.
            ids = ids if ids[:1] == [self.prefix_id] else [self.prefix_id, *ids]
            start = 1
        else:
            ids = self.encode(kept + continuation)
            start = len(self._encode_context(kept))
        targets = ids[start:]
        if not targets:
            raise ValueError(f"the continuation {continuation!r} has no tokens of its own")
        if len(targets) > self.max_length:
            raise ValueError(
                f"a continuation has {len(targets)} tokens and the model takes {self.max_length};"
                " score it as a text"
            )
        return _Request(ids[:-1][-self.max_length :], targets, len(ids) - 1 > self.max_length)

    def _windows(self, ids: list[int]) -> Iterator[_Request]:
        """Windows that predict every token once; each begins with the last token of the previous
        window."""
        ids = [self.prefix_id, *ids]
        for start in range(0, len(ids) - 1, self.max_length):
            window = ids[start : start + self.max_length + 1]
            if start and len(window) <= self.max_length:
                # The last window is filled up with context on its left.
                longer = ids[-self.max_length - 1 :]
                yield _Request(longer[:-1], window[1:])
            else:
                yield _Request(window[:-1], window[1:])

    @torch.inference_mode()
    def _score(self, requests: Sequence[_Request]) -> list[Score]:
        scores: dict[int, Score] = {}
        tokens_of_all = sum(len(request.targets) for request in requests)
        shown = bar(
            desc="scoring",
            total=tokens_of_all,
            unit="tokens",
            unit_scale=tokens_of_all > 9999,
            shown=self.progress,
        )
        for common, batch in self._batches(requests):
            rows = [requests[i] for i in batch]
            logits, skipped = self._logits(rows, common)
            for row, i in enumerate(batch):
                scores[i] = _score_row(logits[row], skipped, requests[i])
            shown.update(sum(len(request.targets) for request in rows))
        shown.close()
        return [scores[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[_Request]) -> Iterator[tuple[int, list[int]]]:
        """Yield (tokens that the inputs begin with together, indices of requests)."""
        alone = list(range(len(requests)))
        if self.shared is not None:
            families = _families(requests)
            alone = [i for _, family in families if len(family) == 1 for i in family]
            for common, family in families:
                for start in range(0, len(family) if len(family) > 1 else 0, self.batch_size):
                    yield common, family[start : start + self.batch_size]
        alone.sort(key=lambda i: -len(requests[i].inputs))
        for start in range(0, len(alone), self.batch_size):
            yield 0, alone[start : start + self.batch_size]

    def _logits(self, rows: list[_Request], common: int) -> tuple[Tensor, int]:
        """Logits `[b, n, V]` of the rows' last positions, and the number of positions in front."""
        width = max(len(request.inputs) for request in rows)
        tokens = torch.full((len(rows), width - common), self.prefix_id)
        for row, request in enumerate(rows):
            tokens[row, : len(request.inputs) - common] = torch.tensor(request.inputs[common:])
        # Logits of a long context would take more memory than the model.
        skipped = min(len(request.inputs) - len(request.targets) for request in rows)
        tokens = tokens.to(self.device)
        if not common:
            return self.logits(tokens, width - skipped), skipped
        first = torch.tensor([rows[0].inputs[:common]], device=self.device)
        return self.shared(first, tokens, width - skipped), skipped


def _families(requests: Sequence[_Request]) -> list[tuple[int, list[int]]]:
    """Neighbours whose inputs begin with the same `SHARED` or more tokens, none of which predicts a
    target: (how many tokens, indices)."""
    families: list[tuple[int, list[int]]] = []
    for i, request in enumerate(requests):
        own = len(request.inputs) - len(request.targets)
        if families:
            common, family = families[-1]
            common = min(common, own, _alike(requests[family[0]].inputs, request.inputs))
            if common >= SHARED:
                families[-1] = common, [*family, i]
                continue
        families.append((own, [i]))
    return families


def _alike(a: list[int], b: list[int]) -> int:
    """How many first numbers of two lists are equal."""
    if a[:SHARED] != b[:SHARED]:
        return 0
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _score_row(logits: Tensor, skipped: int, request: _Request) -> Score:
    """Score of a request's targets, from the logits `[n, V]` of positions `skipped` and later."""
    end, count = len(request.inputs) - skipped, len(request.targets)
    log_probs = logits[end - count : end].float().log_softmax(-1)
    wanted = torch.tensor(request.targets, device=logits.device)
    picked = log_probs.gather(-1, wanted[:, None])
    greedy = bool((log_probs.argmax(-1) == wanted).all())
    return Score(float(picked.double().sum()), greedy, count, request.was_cut)


def _sum(scores: Sequence[Score]) -> Score:
    return Score(
        sum(score.log_likelihood for score in scores),
        all(score.is_greedy for score in scores),
        sum(score.num_tokens for score in scores),
    )
