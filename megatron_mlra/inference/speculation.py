"""Speculative decoding by multi-token prediction: one guess per step, verified by the decoder.

A layer of multi-token prediction guesses the token behind a request's latest token. The next step
runs the latest token and the guess through the decoder at once. The first row draws the next token.
If that token equals the guess, the second row is valid too and draws one more token. A draw depends
on the request's seed and the position alone, so the output equals the output without guesses, at
any temperature.

The layer caches every token, in one more cache layer with the decoder's page ids. The cache rows of
a wrong guess are overwritten by the token that was drawn.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_mlra.inference.chunks import Chunk, last_rows
from megatron_mlra.inference.model import DraftModel
from megatron_mlra.inference.request import Draw, Request
from megatron_mlra.inference.runner import Runner


class Speculation:
    """The guesses of one engine.

    Args:
        model: the layer, from `load.load_draft`.
        runner: the decoder's runner, whose block tables are shared.

    Raises:
        ValueError: tokens are cut over context-parallel ranks.
    """

    def __init__(self, model: DraftModel, runner: Runner) -> None:
        if model.parallel.context > 1:
            raise ValueError(
                f"guesses need whole sequences, and context parallel size is"
                f" {model.parallel.context}; use 1, or decode without them"
            )
        self.runner = Runner(
            model, runner.max_batch, runner.max_pages, runner.graphs, runner.verified, runner.tables
        )
        self.guesses: dict[Request, int] = {}
        """By request, the guess of the token behind the latest one of its output."""
        self.guessed = 0
        self.right = 0

    def chunk(self, request: Request) -> Chunk:
        """The decoder's next chunk: the latest token, and the guess if the request has room."""
        tokens = [request.output[-1]]
        if request in self.guesses and request.cached + 2 <= request.limit:
            tokens.append(self.guesses[request])
        return Chunk(tokens, request.cached, request.pages)

    def accepted(self, chunk: Chunk, drawn: list[int]) -> int:
        """How many of a chunk's draws are valid: 2 if the guess equals the first draw, else 1."""
        if len(chunk.tokens) == 1:
            return 1
        right = chunk.tokens[1] == drawn[0]
        self.guessed += 1
        self.right += right
        return 1 + right

    def follow_prompts(
        self,
        chunks: dict[Request, Chunk],
        draws: dict[Request, Draw | Exception | None],
        states: Tensor,
    ) -> None:
        """Like `follow`, for chunks of prompts; `draws`: the token drawn for a prompt that ends."""
        following = {}
        for request, chunk in chunks.items():
            end = request.cached + len(chunk.tokens)
            following[request] = request.prompt[request.cached + 1 : end + 1]
            if isinstance(draws[request], Draw):
                following[request].append(draws[request].token)
        own, rows = self._own(chunks, following)
        own = {request: chunk for request, chunk in own.items() if chunk.tokens}
        if not own:  # Each prompt ends in this step, and none has a token drawn.
            return
        found = self.runner.states(list(own.values()), states[rows])
        self._guess(own, self.runner.model.logits(found[last_rows(own.values())]))

    def follow(
        self, chunks: dict[Request, Chunk], following: dict[Request, list[int]], states: Tensor
    ) -> None:
        """Cache the verified tokens in the layer, and make new guesses.

        Args:
            chunks: the chunks that the decoder verified, in the order of the block tables.
            following: per request, the tokens behind its chunk's first tokens. The layer caches
                as many tokens.
            states: the decoder's states `[T, d]` of the chunks' tokens.
        """
        own, rows = self._own(chunks, following)
        if not rows:
            return
        _, logits = self.runner.verify(list(own.values()), states[rows], trusted=True)
        own = {request: chunk for request, chunk in own.items() if chunk.tokens}
        self._guess(own, logits[last_rows(own.values())])

    def _own(
        self, chunks: dict[Request, Chunk], following: dict[Request, list[int]]
    ) -> tuple[dict[Request, Chunk], list[int]]:
        """The layer's chunks, and the rows of the decoder's states that go with their tokens."""
        own, rows, at = {}, [], 0
        for request, chunk in chunks.items():
            tokens = following.get(request, [])
            own[request] = replace(chunk, tokens=tokens)
            rows += range(at, at + len(tokens))
            at += len(chunk.tokens)
        return own, rows

    def _guess(self, chunks: dict[Request, Chunk], logits: Tensor) -> None:
        self.guesses.update(zip(chunks, logits.argmax(-1).tolist(), strict=True))

    def forget(self, request: Request) -> None:
        """Drop the guess of a request that has ended."""
        self.guesses.pop(request, None)
