"""A prompt on its way through the engine, and the token that a step draws for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mlra.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Draw:
    """The next token of a request."""

    token: int
    logprob: float | None


@dataclass(eq=False)
class Request:
    """One prompt, its output and its state. Two requests are never equal."""

    id: int
    prompt: list[int]
    params: SamplingParams
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    """Text of the output, cut in front of a stop text; empty without a detokenizer."""
    finish_reason: str | None = None
    """'stop', 'length', 'cancelled', 'error'; None while it runs."""
    error: str | None = None
    """The error of a request whose finish reason is 'error', in one line."""
    submitted: float = 0.0
    """time.monotonic() of submission; below, of the first and of the latest token. Seconds."""
    first_token: float | None = None
    last_token: float | None = None
    pages: list[int] = field(default_factory=list, repr=False)
    cached: int = field(default=0, repr=False)

    @property
    def limit(self) -> int:
        """Tokens the request can put into the cache; the last new token is never fed back."""
        return len(self.prompt) + self.params.max_new_tokens - 1
