"""Runs prefill and decoding steps: host lists to device tensors, CUDA graphs of decoding steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_mlra.inference import graphs
from megatron_mlra.inference.cache import BlockTables, PagePool
from megatron_mlra.inference.checks import shown, whole
from megatron_mlra.inference.chunks import Chunk, Limits, last_rows
from megatron_mlra.inference.context import TokenCut
from megatron_mlra.inference.model import DraftModel, Fresh, InferenceModel, Step
from mlra_kernels.prompts import Bundle, PromptChunk, plan_history, plan_prompts


def batch_buckets(max_batch: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, then multiples of 8; the last is `max_batch`."""
    sizes = [1, 2, 4, *range(8, max_batch, 8)]
    return [size for size in sizes if size < max_batch] + [max_batch]


class Runner:
    """Steps of one rank's model.

    Args:
        max_batch: most sequences that decode together.
        max_pages: pages of the longest sequence, on all ranks.
        graphs: capture the decode step in CUDA graphs, one per size of `batch_buckets`, at first
            use. A batch runs in the graph of the next larger size, with spare rows empty. Steps of
            `verify` have graphs of their own.
        verified: tokens per sequence in a step of `verify`.
        tables: another runner's block tables, for the same sequences; None: new ones.

    Raises:
        ValueError: a size that is not a whole number of at least 1, or graphs asked for where the
            backend cannot be captured.
    """

    def __init__(
        self,
        model: InferenceModel,
        max_batch: int,
        max_pages: int,
        graphs: bool = False,
        verified: int = 2,
        tables: BlockTables | None = None,
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
        self.verified = whole("verified", verified)
        pages = model.cache.pages * model.parallel.context
        if tables is None:
            tables = BlockTables(max_batch, max_pages, model.device, self.cut, pages)
        self.limits = Limits(
            vocab=model.model.vocab_size,
            positions=min(model.max_positions, model.tables[0].size(0)),
            page_size=model.cache.page_size,
            pages=pages,
            sequence_pages=self.max_pages,
            sequences=self.max_batch,
        )
        self.tables = tables
        # Captured steps read these addresses. Rows: tokens, positions, slots.
        rows, device = max_batch * verified, model.device
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._behind = None
        if isinstance(model, DraftModel):
            self._behind = model.weights.embedding.new_zeros(rows, model.model.hidden_size)
        self.graphs = graphs
        self._buckets = batch_buckets(max_batch) if graphs else []
        # By (sequences, tokens per sequence). A graph reads its step's schedule, so the step must
        # live as long as the graph.
        self._graphs: dict[
            tuple[int, int], tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor], Step]
        ] = {}

    def prefill(self, chunks: list[Chunk], every_row: bool = False) -> Tensor:
        """Cache the chunks' tokens; float32 logits `[chunks, vocab]` at each chunk's last token.

        `every_row` returns the logits at all tokens instead, `[T, vocab]`.

        Raises:
            ValueError: a chunk that does not fit the model or the cache; nothing is cached then.
        """
        chunks, rows = self.limits.checked(chunks), None
        if not every_row:
            rows = torch.tensor(last_rows(chunks)).to(self.model.device)
        return self.model.forward(self._prompt_step(chunks), rows)

    def states(self, chunks: list[Chunk], behind: Tensor | None = None) -> Tensor:
        """Cache the chunks' tokens; the states `[T, d]` of all tokens (`model.logits` takes them).

        Args:
            behind: see `Step`.

        Raises:
            ValueError: a chunk or `behind` does not fit; nothing is cached then.
        """
        chunks = self.limits.checked(chunks)
        self._check_behind(behind, chunks)
        return self.model.states(replace(self._prompt_step(chunks), behind=behind))

    def _check_behind(self, behind: Any, chunks: list[Chunk]) -> None:
        """A layer that guesses takes the decoder's states, and a decoder takes none."""
        shape = getattr(behind, "shape", None)
        if self._behind is None:
            if behind is not None:
                raise ValueError("behind is for a DraftModel, this is the decoder; leave it out")
        elif shape != (rows := sum(len(c.tokens) for c in chunks), self._behind.size(1)):
            raise ValueError(
                f"behind is {shown(behind) if shape is None else list(shape)}; a DraftModel takes"
                f" the decoder's states [{rows}, {self._behind.size(1)}]"
            )

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
        """The launches of a prefill step, and with tokens cut over ranks its `Fresh`."""
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

    def decode(
        self,
        tokens: list[int],
        lengths: list[int],
        pages: list[list[int]],
        trusted: bool = False,
    ) -> Tensor:
        """Cache one more token for the first b rows of the block tables; logits `[b, vocab]`.

        The logits may lie in a captured graph's memory: use them before the next call.

        Args:
            tokens: each row's new token, not cached yet.
            lengths: each row's number of cached tokens, on all ranks.
            pages: each row's pages, as given to `tables`.
            trusted: all of it is known to fit, as an `Engine` knows it, and is not checked: a check
                takes some microseconds of each sequence and step.

        Raises:
            ValueError: the lists differ in length, or do not fit the model, the cache or the block
                tables; nothing is cached then.
        """
        try:
            rows = list(zip(tokens, lengths, pages, strict=True))
        except (TypeError, ValueError):
            raise ValueError(
                f"tokens are {shown(tokens)}, lengths {shown(lengths)}, pages {shown(pages)};"
                " give three lists of equal length"
            ) from None
        chunks = [Chunk([token], start, own) for token, start, own in rows]
        if not trusted:
            chunks = self._checked_rows(chunks, None, 1, 1)
        return self._rows(chunks, 1)[1]

    def verify(
        self, chunks: list[Chunk], behind: Tensor | None = None, trusted: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Cache up to `verified` more tokens for each of the first rows of the block tables.

        The step has `verified` rows per sequence, a fixed size that a graph can hold. A sequence
        with fewer tokens has them in its last rows. Its first rows are padding: they are not cached
        and their results are dropped.

        Args:
            chunks: one per sequence, in the order of the tables; a chunk may have no token.
            behind: `[T, d]` for a `DraftModel`, see `Step`.
            trusted: see `decode`.

        Returns:
            States `[T, d]` and logits `[T, vocab]` of the chunks' T tokens, in order. Both may lie
            in a captured graph's memory: use them before the next call.

        Raises:
            ValueError: a chunk or `behind` does not fit; nothing is cached then. Or tokens are cut
                over ranks: a row's last tokens may then lie on another rank.
        """
        if self.cut.ranks > 1 and self.verified > 1:
            raise ValueError(
                f"steps of {self.verified} tokens a sequence need whole sequences, and context"
                f" parallel size is {self.cut.ranks}; use `decode`"
            )
        if not trusted:
            chunks = self._checked_rows(chunks, behind, 0, self.verified)
        states, logits = self._rows(chunks, self.verified, behind)
        if len(states) == sum(len(chunk.tokens) for chunk in chunks):
            return states, logits
        rows = self._places(chunks, self.verified)
        return states[rows], logits[rows]

    def _places(self, chunks: list[Chunk], q: int) -> Tensor:
        """The row of each of the chunks' tokens in a step with `q` rows per sequence."""
        ends = range(q, q * len(chunks) + 1, q)
        rows = [
            row
            for end, chunk in zip(ends, chunks, strict=True)
            for row in range(end - len(chunk.tokens), end)
        ]
        return torch.tensor(rows, dtype=torch.int64).to(self.model.device)

    def _checked_rows(
        self, chunks: list[Chunk], behind: Tensor | None, least: int, most: int
    ) -> list[Chunk]:
        """The chunks of a decoding step, if they and `behind` fit."""
        chunks = self.limits.checked(chunks, least, most, decoding=True)
        self._check_behind(behind, chunks)
        for row, chunk in enumerate(chunks):
            end = max(1, chunk.start + len(chunk.tokens))
            self.tables.check(row, chunk.pages, (end - 1) // self.cut.page_size)
        return chunks

    def _rows(
        self, chunks: list[Chunk], q: int, behind: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States `[b q, d]` and logits `[b q, vocab]` of a step with `q` rows per sequence."""
        b = len(chunks)
        bucket = next((size for size in self._buckets if size >= b), b)
        tokens, positions, slots = [], [], []
        for chunk in chunks:
            spare = q - len(chunk.tokens)
            where = range(chunk.start, chunk.start + len(chunk.tokens))
            tokens += [0] * spare + chunk.tokens
            positions += [0] * spare + list(where)
            slots += [-1] * spare + [self.cut.slot(chunk.pages, position) for position in where]
        spare = [0] * (bucket - b)
        inputs = [tokens + spare * q, positions + spare * q, slots + [-1] * len(spare * q)]
        self._inputs[:, : bucket * q].copy_(torch.tensor(inputs, dtype=torch.int64))
        new = [self.cut.own_tokens(c.pages, c.start + len(c.tokens)) for c in chunks]
        self._lengths[:bucket].copy_(torch.tensor(new + spare, dtype=torch.int32))
        if behind is not None:
            self._behind[: bucket * q].zero_()
            self._behind[self._places(chunks, q)] = behind
        if self._buckets:
            states, logits = self.captured(bucket, q)()
        else:
            states, logits = self._forward(self._step(bucket, q))
        return states[: b * q], logits[: b * q]

    def captured(self, sequences: int, q: int = 1) -> Callable[[], tuple[Tensor, Tensor]]:
        """The captured step of `sequences` sequences with `q` tokens each, as a function that
        replays the step on the inputs of the last `decode` or `verify`: states and logits."""
        key = sequences, q
        if key not in self._graphs:
            self._capture(*key)
        graph, found, _ = self._graphs[key]

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return found

        return replay

    def _forward(self, step: Step) -> tuple[Tensor, Tensor]:
        states = self.model.states(step)
        return states, self.model.logits(states)

    def _step(self, sequences: int, q: int) -> Step:
        lengths, rows = self._lengths[:sequences], sequences * q
        return Step(
            *self._inputs[:, :rows].unbind(0),
            block_table=self.tables.device_table[:sequences],
            lengths=lengths,
            metadata=self.model.decode_schedule(lengths, q),
            behind=None if self._behind is None else self._behind[:rows],
        )

    def _capture(self, sequences: int, q: int) -> None:
        step = self._step(sequences, q)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Warm up. Writing the same values to the same cache rows again is harmless.
            for _ in range(2):
                self._forward(step)
        torch.cuda.current_stream().wait_stream(side)
        graph = graphs.keep(torch.cuda.CUDAGraph())
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            if step.metadata is not None:
                step.metadata.update(step.lengths)
            found = self._forward(step)
        self._graphs[sequences, q] = graph, found, step


def pool_for(model: InferenceModel) -> PagePool:
    """The free lists over all pages of the model's cache, on every rank."""
    return PagePool(model.cache.pages, model.cache.page_size, model.parallel.context)
