"""Runs prefill and decoding steps: host lists to device tensors, CUDA graphs of the decode step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mlra.inference.cache import BlockTables, PagePool
from megatron_mlra.inference.checks import whole
from megatron_mlra.inference.context import TokenCut
from megatron_mlra.inference.model import Fresh, InferenceModel, Step
from mlra_kernels.prompts import Bundle, PromptChunk, plan_history, plan_prompts


@dataclass
class Chunk:
    """The next tokens of one sequence's prompt."""

    tokens: list[int]
    start: int
    """Tokens of the sequence that are cached already."""
    pages: list[int]
    """Pages of the whole sequence, on all ranks."""


def last_rows(chunks: Iterable[Chunk]) -> list[int]:
    """The row of each chunk's last token, where they lie one behind the other."""
    return [end - 1 for end in itertools.accumulate(len(chunk.tokens) for chunk in chunks)]


def batch_buckets(max_batch: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, then multiples of 8; the last is `max_batch`."""
    sizes = [1, 2, 4, *range(8, max_batch, 8)]
    return [size for size in sizes if size < max_batch] + [max_batch]


class Runner:
    """Steps of one rank's model.

    Args:
        max_batch: sequences that decode together.
        max_pages: pages of the longest sequence, on all ranks.
        graphs: capture the decode step in CUDA graphs, one for each of `batch_buckets`, at first
            use; a batch runs in the next larger one, its spare rows empty.

    Raises:
        ValueError: a size that is not a whole number of at least 1, or graphs asked for where the
            backend cannot be captured.
    """

    def __init__(
        self, model: InferenceModel, max_batch: int, max_pages: int, graphs: bool = False
    ) -> None:
        if graphs and model.ops.name != "mlra_kernels":
            raise ValueError(
                f"CUDA graphs need backend mlra_kernels, this is {model.ops.name}; leave graphs out"
            )
        self.model = model
        self.max_batch = max_batch = whole("max_batch", max_batch)
        self.max_pages = whole("max_pages", max_pages)
        self.cut = TokenCut(
            model.cache.page_size, model.parallel.context, model.parallel.context_rank
        )
        self.tables = BlockTables(max_batch, max_pages, model.device, self.cut)
        # Rows: tokens, positions, slots. Captured steps read these addresses.
        self._inputs = torch.zeros(3, max_batch, dtype=torch.int64, device=model.device)
        self._lengths = torch.zeros(max_batch, dtype=torch.int32, device=model.device)
        self._buckets = batch_buckets(max_batch) if graphs else []
        # A graph reads its step's schedule, so the step lives as long as the graph.
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Step]] = {}

    def prefill(self, chunks: list[Chunk], every_row: bool = False) -> Tensor:
        """Cache the tokens of some prompts; logits `[chunks, vocab]` behind each one's last token.

        `every_row` gives the logits of all tokens instead, `[T, vocab]`.
        """
        rows = None
        if not every_row:
            rows = torch.tensor(last_rows(chunks)).to(self.model.device)
        return self.model.forward(self._prompt_step(chunks), rows)

    def states(self, chunks: list[Chunk], behind: Tensor | None = None) -> Tensor:
        """As `prefill`: the states `[T, d]` of all tokens, of which `model.logits` makes logits.

        Args:
            behind: see `Step`.
        """
        return self.model.states(replace(self._prompt_step(chunks), behind=behind))

    def _prompt_step(self, chunks: list[Chunk]) -> Step:
        tokens, positions, slots = [], [], []
        for chunk in chunks:
            where = range(chunk.start, chunk.start + len(chunk.tokens))
            tokens += chunk.tokens
            positions += where
            slots += [self.cut.slot(chunk.pages, position) for position in where]
        inputs = torch.tensor([tokens, positions, slots], dtype=torch.int64).to(self.model.device)
        return Step(*inputs, *self._plan(chunks))

    def _plan(self, chunks: list[Chunk]) -> tuple[tuple[Bundle, ...], Fresh | None]:
        """What a prefill step's tokens attend to."""
        cut, limit, device = self.cut, self.model.prompt_keys, self.model.device

        def own(chunk: Chunk, start: int) -> PromptChunk:
            pages = torch.tensor(cut.own_pages(chunk.pages), dtype=torch.int64).to(device)
            return PromptChunk(len(chunk.tokens), start, pages)

        if cut.ranks == 1:
            prompts = [own(chunk, chunk.start) for chunk in chunks]
            return plan_prompts(prompts, cut.page_size, limit), None
        history = [own(chunk, cut.own_tokens(chunk.pages, chunk.start)) for chunk in chunks]
        fresh, slots, pages = [], [], 0
        for chunk in chunks:
            count, first = len(chunk.tokens), pages
            pages += -(-count // cut.page_size)
            fresh.append(PromptChunk(count, 0, torch.arange(first, pages, device=device)))
            slots += range(first * cut.page_size, first * cut.page_size + count)
        return plan_prompts(fresh, cut.page_size, limit), Fresh(
            pages=pages,
            slots=torch.tensor(slots).to(device),
            history=plan_history(history, cut.page_size, limit),
            has_history=any(chunk.start for chunk in chunks),
        )

    def decode(self, tokens: list[int], lengths: list[int], pages: list[list[int]]) -> Tensor:
        """One more token for the first rows of the block tables; logits `[b, vocab]`.

        The result may live in a captured graph's memory: use it before the next call.

        Args:
            tokens: the token of each row that is not cached yet.
            lengths: tokens of each row that are, on all ranks.
            pages: each row's, as they were given to `tables`.
        """
        b = len(tokens)
        bucket = next((size for size in self._buckets if size >= b), b)
        spare = [0] * (bucket - b)
        rows = list(zip(pages, lengths, strict=True))
        slots = [self.cut.slot(own, n) for own, n in rows]
        inputs = [tokens + spare, lengths + spare, slots + [-1] * (bucket - b)]
        self._inputs[:, :bucket].copy_(torch.tensor(inputs, dtype=torch.int64))
        new = [self.cut.own_tokens(own, n + 1) for own, n in rows]
        self._lengths[:bucket].copy_(torch.tensor(new + spare, dtype=torch.int32))
        if not self._buckets:
            return self.model.forward(self._step(bucket))
        return self.captured(bucket)()[:b]

    def captured(self, rows: int) -> Callable[[], Tensor]:
        """The captured step of `rows` rows on the inputs of the last `decode`."""
        if rows not in self._graphs:
            self._capture(rows)
        graph, logits, _ = self._graphs[rows]

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def _step(self, rows: int) -> Step:
        lengths = self._lengths[:rows]
        return Step(
            *self._inputs[:, :rows].unbind(0),
            block_table=self.tables.device_table[:rows],
            lengths=lengths,
            metadata=self.model.decode_schedule(lengths),
        )

    def _capture(self, rows: int) -> None:
        step = self._step(rows)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Rewriting the same cache rows with the same values is harmless.
            for _ in range(2):
                self.model.forward(step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            if step.metadata is not None:
                step.metadata.update(step.lengths)
            logits = self.model.forward(step)
        self._graphs[rows] = graph, logits, step


def pool_for(model: InferenceModel) -> PagePool:
    """The free lists over all pages of the model's cache, on every rank."""
    data, page_size = model.cache.data, model.cache.page_size
    pages = data.size(1) if model.model.attention == "mlra" else data.size(2) - 1
    return PagePool(pages, page_size, model.parallel.context)
