"""Continuous batching: requests wait, are prefilled in chunks, decode together and leave.

A request gets all pages it can need when it is admitted, so a running one never runs out of cache
and never loses pages to another. Requests are admitted in order of arrival: one that does not fit
yet waits, and so do those behind it; one that can never fit is refused when it is submitted.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_mlra.inference.cache import CacheFull
from megatron_mlra.inference.runner import Chunk, Runner, pool_for
from megatron_mlra.inference.sampling import SamplingParams, sample


@dataclass
class Request:
    """One prompt and what has become of it."""

    id: int
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    """Of the output, cut in front of a stop text (with a detokenizer)."""
    finish_reason: str | None = None
    """'stop', 'length', 'cancelled'; None while it runs."""
    submitted: float = 0.0
    """time.monotonic() of submission, of the first and of the last token."""
    first_token: float | None = None
    last_token: float | None = None
    pages: list[int] = field(default_factory=list, repr=False)
    cached: int = field(default=0, repr=False)

    @property
    def limit(self) -> int:
        """Tokens it can put into the cache: the last one is never fed back."""
        return len(self.prompt) + self.params.max_new_tokens - 1


class Engine:
    """Serves requests on one model (on each rank of one, in lockstep).

    Args:
        runner: its `max_batch` is the number of sequences that run together.
        chunk_size: prompt tokens prefilled in a step; decoding goes on between chunks.
        detokenize: ids to text; needed for stop texts and `Request.text`.
        max_length: longest prompt plus output; None takes the model's positions.

    Under tensor parallelism every rank submits the same requests in the same order: logits are the
    same on all ranks, and so are the draws.
    """

    def __init__(
        self,
        runner: Runner,
        chunk_size: int = 2048,
        detokenize: Callable[[list[int]], str] | None = None,
        max_length: int | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk size is {chunk_size}; use at least 1")
        self.runner, self.chunk_size, self.detokenize = runner, chunk_size, detokenize
        self.max_length = min(max_length or runner.model.max_positions, runner.model.max_positions)
        self.pool = pool_for(runner.model)
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.running: list[Request] = []
        self._ids = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.prefilling or self.running)

    def submit(self, prompt: list[int], params: SamplingParams | None = None) -> Request:
        """Queue a prompt.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or a length beyond the model.
            CacheFull: it needs more pages than the cache has.
        """
        params = params or SamplingParams()
        request = Request(next(self._ids), list(prompt), params, submitted=time.monotonic())
        self._check(request)
        self.waiting.append(request)
        return request

    def _check(self, request: Request) -> None:
        vocab, tokens = self.runner.model.model.vocab_size, len(request.prompt)
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        bad = next((t for t in request.prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise ValueError(f"prompt token {bad} is outside the vocabulary of {vocab}")
        total = tokens + request.params.max_new_tokens
        if total > self.max_length:
            raise ValueError(
                f"a prompt of {tokens} tokens and {request.params.max_new_tokens} new ones exceed"
                f" the context of {self.max_length}; use at most"
                f" {max(0, self.max_length - tokens)} new tokens or a shorter prompt"
            )
        if request.params.stop and self.detokenize is None:
            raise ValueError("stop texts need a tokenizer; use stop_ids")
        needed = self.pool.pages_for(request.limit)
        if needed > self.pool.num_pages:
            raise CacheFull(
                f"{request.limit} tokens need {needed} pages of {self.pool.page_size}, the cache"
                f" has {self.pool.num_pages}; use a larger cache or fewer new tokens"
            )

    def cancel(self, request: Request) -> None:
        """End a request now; others are not touched."""
        if request.finish_reason is None:
            for queue in (self.waiting, self.prefilling):
                if request in queue:
                    queue.remove(request)
            self._finish(request, "cancelled")

    def step(self) -> list[Request]:
        """Admit, prefill one chunk of prompts, decode one token for all that run.

        Returns:
            the requests that got a token.
        """
        self._admit()
        # Rows of the decode step are settled before a prefill adds to them.
        advanced = self._decode() if self.running else []
        if self.prefilling:
            advanced += self._prefill()
        return advanced

    def run(self) -> Iterator[Request]:
        """Step until nothing is left; yields each request as it gets a token."""
        while self.busy:
            yield from self.step()

    # -- parts of a step ---------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.prefilling) < self.runner.max_batch:
            request = self.waiting[0]
            if self.pool.pages_for(request.limit) > self.pool.free:
                return
            request.pages = self.pool.take(request.limit)
            self.prefilling.append(self.waiting.popleft())

    def _prefill(self) -> list[Request]:
        chunks: list[Chunk] = []
        taken: list[Request] = []
        room = self.chunk_size
        while self.prefilling and room:
            request = self.prefilling[0]
            tokens = request.prompt[request.cached : request.cached + room]
            chunks.append(Chunk(tokens, request.cached, request.pages))
            taken.append(request)
            request.cached += len(tokens)
            room -= len(tokens)
            if request.cached < len(request.prompt):
                break
            self.prefilling.popleft()
        logits = self.runner.prefill(chunks)
        rows = [i for i, request in enumerate(taken) if request.cached == len(request.prompt)]
        ready = [taken[i] for i in rows]
        if not ready:
            return []
        for request in ready:
            self.runner.tables.set(len(self.running), request.pages)
            self.running.append(request)
        self._take_tokens(ready, logits[rows])
        return ready

    def _decode(self) -> list[Request]:
        batch = list(self.running)
        logits = self.runner.decode(
            [request.output[-1] for request in batch],
            [request.cached for request in batch],
            [request.pages for request in batch],
        )
        for request in batch:
            request.cached += 1
        self._take_tokens(batch, logits)
        return batch

    def _take_tokens(self, requests: list[Request], logits) -> None:
        positions = [len(request.prompt) + len(request.output) for request in requests]
        tokens, logprobs = sample(logits, [r.params for r in requests], positions)
        now = time.monotonic()
        for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            request.output.append(token)
            if request.params.logprobs:
                request.logprobs.append(logprobs[i])
            request.first_token = request.first_token or now
            request.last_token = now
            reason = self._reason_to_stop(request)
            if reason:
                self._finish(request, reason)

    def _reason_to_stop(self, request: Request) -> str | None:
        params = request.params
        if self.detokenize is not None and params.stop:
            request.text = self.detokenize(request.output)
            found = [at for at in map(request.text.find, params.stop) if at >= 0]
            if found:
                request.text = request.text[: min(found)]
                return "stop"
        if request.output[-1] in params.stop_ids:
            return "stop"
        return "length" if len(request.output) == params.max_new_tokens else None

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if self.detokenize is not None and not (reason == "stop" and request.params.stop):
            request.text = self.detokenize(request.output)
        if request in self.running:
            # The last row takes the free one's place, so that rows stay without gaps.
            row, last = self.running.index(request), len(self.running) - 1
            if row != last:
                self.running[row] = self.running[last]
                self.runner.tables.move(last, row)
            self.running.pop()
        self.pool.give_back(request.pages)
        request.pages = []
