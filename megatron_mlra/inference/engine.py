"""Continuous batching: requests wait, are prefilled in chunks, decode together and leave.

A request gets all the pages it can need when it is admitted, so a running request never runs out
of cache and never loses pages to another. Requests are admitted in order of arrival: a request that
does not fit yet waits, and so do the requests behind it. A request that can never fit is refused at
submission. An exception inside a step ends the request that caused it and no other.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator

import torch

from megatron_mlra.inference.cache import CacheFull
from megatron_mlra.inference.checks import ids, shown, whole
from megatron_mlra.inference.chunks import Chunk, last_rows
from megatron_mlra.inference.model import DraftModel
from megatron_mlra.inference.request import Draw, Request
from megatron_mlra.inference.runner import Runner, pool_for
from megatron_mlra.inference.sampling import SamplingParams, sample
from megatron_mlra.inference.speculation import Speculation


class Engine:
    """Serves requests on one model; on several ranks, one engine per rank, in lockstep.

    Args:
        runner: its `max_batch` is the number of sequences that run together.
        chunk_size: prompt tokens prefilled per step; decoding goes on between chunks.
        detokenize: list of ids -> text; needed for stop texts and `Request.text`.
        max_length: tokens of the longest prompt plus output; None: the model's positions.
        draft: a layer of multi-token prediction, for speculative decoding (speculation.py).

    Raises:
        ValueError: a size that is not a whole number of at least 1, or no callable `detokenize`.

    Every rank must submit the same requests in the same order. Logits are then equal on all ranks,
    and so are the draws.
    """

    def __init__(
        self,
        runner: Runner,
        chunk_size: int = 2048,
        detokenize: Callable[[list[int]], str] | None = None,
        max_length: int | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        self.chunk_size = whole("chunk size", chunk_size)
        if detokenize is not None and not callable(detokenize):
            raise ValueError(f"detokenize is {shown(detokenize)}; use a function of a list of ids")
        self.runner, self.detokenize = runner, detokenize
        self.max_length = runner.model.max_positions
        if max_length is not None:
            self.max_length = min(whole("max length", max_length), self.max_length)
        self.pool = pool_for(runner.model)
        self.speculation = None if draft is None else Speculation(draft, runner)
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        """Requests by id, in order of arrival."""
        self.prefilling: deque[Request] = deque()
        self.running: list[Request] = []
        self._ids = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.prefilling or self.running)

    def submit(self, prompt: Iterable[int], params: SamplingParams | None = None) -> Request:
        """Queue a prompt.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, params of another type, stop
                texts without `detokenize`, or a length beyond the model or the runner.
            CacheFull: the request needs more pages than the cache has.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is {shown(params)}; use SamplingParams")
        request = Request(next(self._ids), self._tokens(prompt), params)
        self._check_length(request)
        request.submitted = time.monotonic()
        self.waiting[request.id] = request
        return request

    def _tokens(self, prompt: Iterable[int]) -> list[int]:
        tokens = ids("the prompt is", prompt, "token ids")
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        vocab = self.runner.model.model.vocab_size
        for place, token in enumerate(tokens):
            try:
                tokens[place] = whole("token", token, 0, vocab - 1)
            except ValueError:
                raise ValueError(
                    f"prompt token {shown(token)} is outside the vocabulary of {vocab};"
                    f" use ids from 0 to {vocab - 1}"
                ) from None
        return tokens

    def _check_length(self, request: Request) -> None:
        tokens, params = len(request.prompt), request.params
        if tokens + params.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {tokens} tokens and {params.max_new_tokens} new ones exceed"
                f" the context of {self.max_length}; use at most"
                f" {max(0, self.max_length - tokens)} new tokens or a shorter prompt"
            )
        if params.stop and self.detokenize is None:
            raise ValueError("stop texts need a tokenizer; use stop_ids")
        needed, page_size = self.pool.pages_for(request.limit), self.pool.page_size
        if needed > self.runner.max_pages:
            raise ValueError(
                f"{request.limit} tokens need {needed} pages of {page_size}, the runner takes"
                f" {self.runner.max_pages} a sequence; use fewer new tokens, a shorter prompt, or"
                f" Runner(max_pages={needed})"
            )
        if not self.pool.ever_fits(request.limit):
            ranks = f", {self.pool.rank_pages} a rank" if self.pool.ranks > 1 else ""
            raise CacheFull(
                f"{request.limit} tokens need {needed} pages of {page_size}, the cache"
                f" has {self.pool.num_pages}{ranks}; use a larger cache or fewer new tokens"
            )

    def cancel(self, request: Request) -> None:
        """End a request now; others go on. A request that has ended stays as it is.

        Raises:
            ValueError: `request` is no request of this engine.
        """
        if not isinstance(request, Request):
            raise ValueError(f"{shown(request)} is not a request; give what submit returned")
        if request.finish_reason is None:
            if not self._holds(request):
                raise ValueError(f"request {request.id} was submitted to another engine")
            self._finish(request, "cancelled")

    def _holds(self, request: Request) -> bool:
        waits = self.waiting.get(request.id) is request
        return waits or request in self.prefilling or request in self.running

    def step(self) -> list[Request]:
        """Admit requests, decode all running ones, prefill one chunk of prompts.

        Decoding gives a request one token, or two if a guess was right (speculation.py).

        Returns:
            The requests that got a token or ended by an error.

        Raises:
            torch.AcceleratorError: the device is lost, and with it every request.
            Exception: with several ranks, any exception of a step: the ranks may no longer be in
                lockstep, so no request can go on.
        """
        self._admit()
        # Decode first: a prefill adds rows to the decode step.
        decode = self._decode if self.speculation is None else self._speculate
        advanced = decode() if self.running else []
        if self.prefilling:
            advanced += self._prefill()
        return advanced

    def run(self) -> Iterator[Request]:
        """Step until no request is left; yields a request whenever it gets a token or fails."""
        while self.busy:
            yield from self.step()

    # -- parts of a step ---------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.prefilling) < self.runner.max_batch:
            request = next(iter(self.waiting.values()))
            if not self.pool.fits(request.limit):
                return
            request.pages = self.pool.take(request.limit)
            del self.waiting[request.id]
            self.prefilling.append(request)

    def _prefill(self) -> list[Request]:
        chunks: dict[Request, Chunk] = {}
        room = self.chunk_size
        for request in self.prefilling:
            tokens = request.prompt[request.cached : request.cached + room]
            chunks[request] = Chunk(tokens, request.cached, request.pages)
            room -= len(tokens)
            if not room:
                break

        def run(requests: list[Request]) -> list[Draw | Exception | None]:
            mine = {request: chunks[request] for request in requests}
            ends = [request.cached + len(chunks[request].tokens) for request in requests]
            rows = [i for i, request in enumerate(requests) if ends[i] == len(request.prompt)]
            if self.speculation is None:
                states, logits = None, self.runner.prefill(list(mine.values()))
            else:
                states = self.runner.states(list(mine.values()))
                logits = self.runner.model.logits(states[last_rows(mine.values())])
            draws = iter(self._draw([requests[i] for i in rows], logits[rows]) if rows else ())
            found = [next(draws) if i in rows else None for i in range(len(requests))]
            if states is not None:
                self.speculation.follow_prompts(
                    mine, dict(zip(requests, found, strict=True)), states
                )
            return found

        requests = list(chunks)
        results = dict(zip(requests, self._isolated(requests, run), strict=True))
        for request, result in results.items():
            request.cached += len(chunks[request].tokens)
            if isinstance(result, Draw):
                self.prefilling.remove(request)
                self.runner.tables.set(len(self.running), request.pages)
                self.running.append(request)
        return self._take({r: result for r, result in results.items() if result is not None})

    def _decode(self) -> list[Request]:
        batch = list(self.running)

        def run(requests: list[Request]) -> list[Draw | Exception]:
            with self._tables_of(requests):
                logits = self.runner.decode(
                    [request.output[-1] for request in requests],
                    [request.cached for request in requests],
                    [request.pages for request in requests],
                    trusted=True,
                )
            return self._draw(requests, logits)

        results = dict(zip(batch, self._isolated(batch, run), strict=True))
        for request in batch:
            request.cached += 1
        return self._take(results)

    def _speculate(self) -> list[Request]:
        """Like `_decode`, of each request's latest token and its guess at once."""
        batch, speculation = list(self.running), self.speculation

        def run(requests: list[Request]) -> list[list[Draw | Exception]]:
            with self._tables_of(requests):
                return verify(requests)

        def verify(requests: list[Request]) -> list[list[Draw | Exception]]:
            chunks = {request: speculation.chunk(request) for request in requests}
            states, logits = self.runner.verify(list(chunks.values()), trusted=True)
            rows = [(r, i) for r, chunk in chunks.items() for i in range(len(chunk.tokens))]
            draws = iter(
                self._draw([request for request, _ in rows], logits, [place for _, place in rows])
            )
            found, following = [], {}
            for request, chunk in chunks.items():
                own = [next(draws) for _ in chunk.tokens]
                if isinstance(own[0], Draw):
                    count = speculation.accepted(chunk, [own[0].token])
                    own = own[:count]
                    following[request] = [draw.token for draw in own if isinstance(draw, Draw)]
                found.append(own)
            speculation.follow(chunks, following, states)
            return found

        results = dict(zip(batch, self._isolated(batch, run), strict=True))
        for request, found in results.items():
            for result in found if isinstance(found, list) else [found]:
                request.cached += 1
                self._take({request: result})
                if request.finish_reason is not None:
                    break
        return batch

    @contextlib.contextmanager
    def _tables_of(self, requests: list[Request]) -> Iterator[None]:
        """Makes `requests`, all running ones or one alone, the first rows of the block tables."""
        alone = requests != self.running
        if alone:
            self.runner.tables.set(0, requests[0].pages)
        try:
            yield
        finally:
            if alone:
                self.runner.tables.set(0, self.running[0].pages)

    def _isolated(self, requests: list[Request], run: Callable[[list[Request]], list]) -> list:
        """`run` for all requests at once; if that raises, for one request after the other.

        Returns:
            For each request the result of `run`, or the exception that ends the request.
        """
        try:
            return run(requests)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if self.runner.model.parallel.world > 1:
                raise
            if len(requests) == 1:
                return [error]
        return [self._isolated([request], run)[0] for request in requests]

    def _draw(
        self, requests: list[Request], logits: torch.Tensor, ahead: list[int] | None = None
    ) -> list[Draw | Exception]:
        """One draw per row of `logits`; `ahead`: a row's distance to its request's next token."""
        positions = [len(request.prompt) + len(request.output) for request in requests]
        if ahead is not None:
            positions = [at + more for at, more in zip(positions, ahead, strict=True)]
        tokens, logprobs = sample(logits, [request.params for request in requests], positions)
        return [
            Draw(token, logprobs and logprobs[i])
            if token >= 0
            else ArithmeticError("the model gave NaN or infinite logits")
            for i, token in enumerate(tokens)
        ]

    def _take(self, results: dict[Request, Draw | Exception]) -> list[Request]:
        """Append each request's token; end the requests that got the last one or an exception.

        Returns:
            The requests that got a token or ended by an error.
        """
        now = time.monotonic()
        for request, result in results.items():
            if request.finish_reason is not None:
                continue  # Another request's detokenizer has cancelled this one.
            if isinstance(result, Exception):
                self._fail(request, result)
                continue
            request.output.append(result.token)
            if request.params.logprobs:
                request.logprobs.append(result.logprob)
            request.first_token = request.first_token or now
            request.last_token = now
            try:
                reason = self._reason_to_stop(request)
            except Exception as error:
                self._fail(request, error)
            else:
                if reason:
                    self._finish(request, reason)
        return list(results)

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

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        self._finish(request, "error")

    def _finish(self, request: Request, reason: str) -> None:
        if self.detokenize is not None and not (reason == "stop" and request.params.stop):
            try:
                request.text = self.detokenize(request.output)
            except Exception as error:
                reason = "error"
                request.error = request.error or f"{type(error).__name__}: {error}"
        request.finish_reason = reason
        if self.speculation is not None:
            self.speculation.forget(request)
        self.waiting.pop(request.id, None)
        if request in self.prefilling:
            self.prefilling.remove(request)
        if request in self.running:
            # The last row moves to the free one, so that rows stay without gaps.
            row, last = self.running.index(request), len(self.running) - 1
            if row != last:
                self.running[row] = self.running[last]
                self.runner.tables.move(last, row)
            self.running.pop()
        self.pool.give_back(request.pages)
        request.pages = []
