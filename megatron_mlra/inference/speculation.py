"""Speculative decoding by multi-token prediction: a guess per step, and the decoder's word on it.

A layer of multi-token prediction guesses the token behind the one that a request has just got. The
next step runs both through the decoder at once. The first row draws as ever; if its token is the
guess, the second row is as good, and draws the token behind. Draws depend on a request's seed and
the position alone, so outputs are those without guesses, at any temperature.

The layer caches every token as the decoder does, in a layer more of the same pages. Rows of guesses
that were wrong are written again by the tokens that came instead.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_mlra.inference.model import DraftModel
from megatron_mlra.inference.request import Draw, Request
from megatron_mlra.inference.runner import Chunk, Runner, last_rows


class Speculation:
    """The guesses of one engine.

    Args:
        model: see `load.load_draft`.
        runner: of the decoder.

    Raises:
        ValueError: tokens are cut over ranks.
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
        """The token behind the latest one of a request's output."""
        self.guessed = 0
        self.right = 0

    def chunk(self, request: Request) -> Chunk:
        """What the decoder computes next: the latest token, and the guess if there is room."""
        tokens = [request.output[-1]]
        if request in self.guesses and request.cached + 2 <= request.limit:
            tokens.append(self.guesses[request])
        return Chunk(tokens, request.cached, request.pages)

    def accepted(self, chunk: Chunk, drawn: list[int]) -> int:
        """How many of a chunk's draws count."""
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
        """`follow` of prompts' chunks; `draws` of those that end."""
        following = {}
        for request, chunk in chunks.items():
            end = request.cached + len(chunk.tokens)
            following[request] = request.prompt[request.cached + 1 : end + 1]
            if isinstance(draws[request], Draw):
                following[request].append(draws[request].token)
        own, rows = self._own(chunks, following)
        own = {request: chunk for request, chunk in own.items() if chunk.tokens}
        found = self.runner.states(list(own.values()), states[rows])
        self._guess(own, self.runner.model.logits(found[last_rows(own.values())]))

    def follow(
        self, chunks: dict[Request, Chunk], following: dict[Request, list[int]], states: Tensor
    ) -> None:
        """Cache what the decoder has verified, and guess anew.

        Args:
            chunks: what it verified, in the order of the block tables and of the rows of `states`
                `[T, d]`.
            following: the token behind each of a chunk's first tokens; no more are cached.
        """
        own, rows = self._own(chunks, following)
        if not rows:
            return
        _, logits = self.runner.verify(list(own.values()), states[rows])
        own = {request: chunk for request, chunk in own.items() if chunk.tokens}
        self._guess(own, logits[last_rows(own.values())])

    def _own(
        self, chunks: dict[Request, Chunk], following: dict[Request, list[int]]
    ) -> tuple[dict[Request, Chunk], list[int]]:
        """The layer's chunks, and which of the decoder's states stand behind their tokens."""
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
        """A request has ended."""
        self.guesses.pop(request, None)
