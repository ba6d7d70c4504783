"""Scores whole held-out datasets after the last training step (`--held-out NAME=PREFIX ...`).

Megatron's validation draws other samples at each evaluation. Here every token of each set is
predicted once, in the order of the file (token_stream.py), so that runs can be compared exactly.
The results are printed, written to `held_out.json` in the run's folder and added to the curves.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import training

from megatron_mlra.command_line.parser import say, write_json
from megatron_mlra.evaluation.token_stream import named_sets, read_stream, windows

FILE = "held_out.json"


Record = Callable[[dict[str, float], int], None]
"""Adds points to curves: (name -> value, step)."""


class HeldOut:
    """Scores a run's sets once its last step is done, and saved.

    Make it before progress.py wraps Megatron's `evaluate`, so that no line is printed per set.
    """

    def __init__(self, args: Namespace, folder: Path, record: Record) -> None:
        """
        Args:
            folder: where the results are written.
        """
        self.args, self.folder, self.record = args, folder, record
        self.sets = named_sets(args.held_out)
        self._evaluate = training.evaluate
        self._score: Callable[[], None] | None = None

    def wrap_train(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train`: score behind it if the last step is done, and no save follows.

        Megatron saves a last step that is no multiple of --save-interval behind its `train`.
        Scoring may take minutes, in which a run that is killed would lose the steps.
        """
        if not self.sets:
            return train
        args = self.args

        def run(forward_step, model, *rest, **named):
            result = train(forward_step, model, *rest, **named)
            if result[0] < args.train_iters:
                return result
            # Megatron's train(forward_step, model, optimizer, scheduler, two iterators,
            # process_non_loss_data_func, config, ...).
            config = rest[5]
            groups = {k: named[k] for k in ("p2p_communicator", "pg_collection") if k in named}

            def loss(batches: Any, iterations: int) -> float | None:
                losses, _, _ = self._evaluate(
                    forward_step, batches, model, None, config, eval_iters=iterations, **groups
                )
                return float(losses["lm loss"]) if losses else None

            self._score = lambda: score(args, self.sets, self.folder, loss, len(model), self.record)
            if not (args.save and args.save_interval and result[0] % args.save_interval):
                self._score_once()
            return result

        return run

    def wrap_save(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `save_checkpoint_and_time`: score behind the save of the last step."""
        if not self.sets:
            return save

        def run(*rest, **named):
            result = save(*rest, **named)
            self._score_once()
            return result

        return run

    def _score_once(self) -> None:
        score_now, self._score = self._score, None
        if score_now is not None:
            score_now()


def score(
    args: Namespace,
    sets: dict[str, str],
    folder: Path,
    evaluate: Callable[[Any, int], float | None],
    chunks: int,
    record: Record,
) -> None:
    """Score each set, print the losses in nats per token and write them. All ranks call this.

    Args:
        sets: name -> prefix.
        evaluate: (micro-batches, or a list of them per model chunk; number of iterations) -> mean
            loss per token, None on ranks without the output layer.
        chunks: number of model chunks of this rank.
    """
    consumed, results = args.consumed_valid_samples, {}
    for name, prefix in sets.items():
        tokens = read_stream(prefix)
        if args.rank == args.world_size - 1:
            # It may take longer than the steps did.
            say(f"scoring {name}: {len(tokens):,} tokens held out")
        rows = list(windows(tokens, end_of_document(args), args.seq_length))
        batches = [micro_batches(rows, args) for _ in range(chunks)]
        iterations = math.ceil(len(rows) / args.eval_global_batch_size)
        loss = evaluate(batches if chunks > 1 else batches[0], iterations)
        if loss is not None:
            results[name] = {"loss": loss, "tokens": len(tokens), "prefix": prefix}
    args.consumed_valid_samples = consumed
    if results and args.rank == args.world_size - 1:
        say(
            f"held out at step {args.train_iters:,}: "
            + ", ".join(
                f"{name} {found['loss']:.4f} ({found['tokens']:,} tokens)"
                for name, found in results.items()
            )
        )
        folder.mkdir(parents=True, exist_ok=True)
        told = {"step": args.train_iters, "seq_length": args.seq_length, "sets": results}
        write_json(folder / FILE, told, indent=1)
        losses = {f"lm loss held out {name}": found["loss"] for name, found in results.items()}
        record(losses, args.train_iters)


def end_of_document(args: Namespace) -> int:
    """Id of the end-of-document token, which precedes a stream."""
    if args.null_tokenizer_eod_id is not None:
        return args.null_tokenizer_eod_id
    return args.vocab_size - 1


def micro_batches(
    rows: list[tuple[np.ndarray, np.ndarray]], args: Namespace
) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches `[b, s]` of all rows, in order. Missing tokens of the
    last micro-batches have loss mask 0."""
    size, length = args.eval_micro_batch_size, args.seq_length
    replicas, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    count = math.ceil(len(rows) / args.eval_global_batch_size) * args.eval_global_batch_size
    for first in range(rank * size, count, replicas * size):
        tokens, labels = np.zeros((2, size, length), np.int64)
        mask = np.zeros((size, length), np.float32)
        for row, (inputs, targets) in enumerate(rows[first : first + size]):
            tokens[row, : len(inputs)] = inputs
            labels[row, : len(targets)] = targets
            mask[row, : len(targets)] = 1
        yield {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.arange(length).repeat(size, 1),
        }
