"""Guesses of multi-token prediction, measured: how many are right, and what a step with them takes.

The engine serves the same prompts without guesses and with them. A step is all that a request waits
for: scheduling, the model, drawing and, with guesses, the layer that makes them. Only steps that
begin with the whole batch count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mlra.benchmarks.decoding.measure import PAGE, random_reader
from megatron_mlra.benchmarks.decoding.place import Place, tiny
from megatron_mlra.command_line.parser import read_text
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import preset_description
from megatron_mlra.evaluation.token_stream import read_stream
from megatron_mlra.inference.engine import Engine
from megatron_mlra.inference.load import LoadOptions, load_draft, load_model
from megatron_mlra.inference.parallel import check_parallel
from megatron_mlra.inference.runner import Runner
from megatron_mlra.inference.sampling import SamplingParams

WARM_UP = 6
"""New tokens of the run in front, which captures the graphs."""


@dataclass(frozen=True)
class Guesser:
    """A model with a layer of multi-token prediction, and where prompts for it come from."""

    label: str
    model: ModelDescription
    read: Callable[[str], Tensor]
    """Canonical name -> global tensor."""
    prompts: Callable[[int, int], list[list[int]]]
    """Batch, tokens -> as many prompts of so many tokens."""


def of_checkpoint(folder: str, text: str | None, data: str | None = None) -> Guesser:
    """A trained model; prompts are pieces of a text file, of a dataset, or of a sample.

    Args:
        data: prefix of a dataset, from which prompts are taken at equal distances.

    Raises:
        ValueError: no such layer, no checkpoint, or no dataset.
    """
    from megatron_mlra.checkpoint.formats import open_checkpoint
    from megatron_mlra.checkpoint.verify.compare import sample_tokens

    source = open_checkpoint(folder, verify=True)
    own = None if text is None else read_text(text, newline="")
    stream = None if data is None else read_stream(data)
    if not source.description.mtp_num_layers:
        raise ValueError(
            f"--speculate needs a layer of multi-token prediction, and {folder} has none; train"
            " with --mtp-num-layers 1, or leave the folder out to time presets"
        )

    def prompts(batch: int, length: int) -> list[list[int]]:
        if stream is not None:
            return data_prompts(stream, batch, length, source.description.vocab_size, data)
        found = sample_tokens(source, own, None, batch * length, length)[0].tolist()
        if len(found) < batch or len(found[0]) < length:
            have = f"{len(found)} prompts of {len(found[0])} tokens"
            raise ValueError(
                f"the text makes {have}, and {batch} of {length} are asked for; give a longer one"
                " by --text, or use fewer --batches and --contexts"
            )
        return found[:batch]

    label = f"{source.description.variant} ({Path(folder).name})"
    return Guesser(label, source.description, source.tensor, prompts)


def data_prompts(
    stream: np.ndarray, batch: int, length: int, vocab_size: int, data: str
) -> list[list[int]]:
    """`batch` pieces of `length` tokens of a dataset, at equal distances.

    Raises:
        ValueError: the dataset is too short, or made with another tokenizer.
    """
    if len(stream) < batch * length:
        raise ValueError(
            f"--data {data} has {len(stream)} tokens, and {batch} prompts of {length} are asked"
            " for; use fewer --batches and --contexts"
        )
    places = np.linspace(0, len(stream) - length, batch).round().astype(int)
    found = np.stack([stream[at : at + length] for at in places]).astype(np.int64)
    if found.max() >= vocab_size:
        raise ValueError(
            f"--data {data} holds token {found.max()} and the model has {vocab_size};"
            " give data made with the model's tokenizer"
        )
    return found.tolist()


def of_preset(preset: str, place: Place, seed: int) -> Guesser:
    """A preset with random weights, which guess by chance.

    Raises:
        ValueError: the processes cannot share it.
    """
    model = preset_description(preset)
    check_parallel(model, place.ranks, 1)
    if place.rehearsal:
        model = tiny(model)
    model = model.replace(mtp_num_layers=1)
    draw = torch.Generator().manual_seed(seed)

    def prompts(batch: int, length: int) -> list[list[int]]:
        return torch.randint(model.vocab_size, (batch, length), generator=draw).tolist()

    read = random_reader(model, place.device, seed=seed)
    return Guesser(f"{model.variant}, random", model, read, prompts)


def measure_guesses(
    guesser: Guesser, batch: int, context: int, new: int, temperature: float, place: Place
) -> dict[str, Any]:
    """One record: a batch of prompts of `context` tokens, and `new` tokens behind each.

    Raises:
        ValueError: the prompts cannot be made.
        RuntimeError: a request ended by an error.
    """
    each = -(-(context + new) // PAGE)
    options = LoadOptions(
        dtype=place.dtype, backend=place.backend, products=place.products,
        cache_tokens=batch * each * PAGE, page_size=PAGE, max_positions=context + new, draft=True,
    )  # fmt: skip
    parallel = place.parallel(guesser.model, place.ranks, 1)
    model = load_model(guesser.model, guesser.read, options, place.device, parallel)
    draft = load_draft(model, guesser.read)
    prompts = guesser.prompts(batch, context)
    record = {
        "label": guesser.label, "variant": guesser.model.variant, "gpus": place.ranks,
        "batch": batch, "context": context, "new": new, "temperature": temperature,
    }  # fmt: skip
    outputs = []
    for name, layer in (("plain", None), ("guessing", draft)):
        runner = Runner(model, batch, each, graphs=place.backend == "mlra_kernels")
        engine = Engine(runner, max_length=context + new, draft=layer)
        _serve(engine, prompts, min(WARM_UP, new), temperature)
        if layer is not None:
            engine.speculation.guessed = engine.speculation.right = 0
        output, seconds, tokens = _serve(engine, prompts, new, temperature)
        outputs.append(output)
        if not seconds:
            raise ValueError(f"{new} new tokens leave no step to time; use more")
        record[f"{name}_ms"] = place.most(1e3 * statistics.median(seconds))
        record[f"{name}_tokens_per_step"] = tokens / len(seconds) / batch
    speculation = engine.speculation
    record["guessed"], record["right"] = speculation.guessed, speculation.right
    record["equal_outputs"] = sum(a == b for a, b in zip(*outputs, strict=True))
    ratio = record["guessing_ms"] / record["plain_ms"]
    record["speed_up"] = record["guessing_tokens_per_step"] / ratio
    record["pays_from"] = ratio - 1
    return record


def _serve(
    engine: Engine, prompts: list[list[int]], new: int, temperature: float
) -> tuple[list[list[int]], list[float], int]:
    """Outputs, and of the steps that began with the whole batch their seconds and tokens."""
    params = [SamplingParams(new, temperature=temperature, seed=i) for i in range(len(prompts))]
    requests = [engine.submit(*each) for each in zip(prompts, params, strict=True)]
    while engine.waiting or engine.prefilling:
        engine.step()
    seconds, tokens = [], 0
    while engine.busy:
        whole = len(engine.running) == len(requests)
        before, start = sum(len(r.output) for r in requests), time.monotonic()
        engine.step()
        if whole:
            seconds.append(time.monotonic() - start)
            tokens += sum(len(r.output) for r in requests) - before
    if failed := [request.error for request in requests if request.error]:
        raise RuntimeError(f"a request failed: {failed[0]}")
    return [request.output for request in requests], seconds, tokens


def guess_table(records: list[dict[str, Any]], timed: bool) -> str:
    """Markdown: time of a step, right guesses and speed-up, by model, batch and context."""
    lines = [
        "| model | batch | context | temperature | ms per step | with guesses | guesses right"
        " | tokens per step | tokens/s | with guesses | speed-up | pays from |",
        "|---" * 12 + "|",
    ]
    for r in records:
        right = f"{r['right']} of {r['guessed']} ({r['right'] / max(r['guessed'], 1):.0%})"
        ms, guessing = f"{r['plain_ms']:.2f}", f"{r['guessing_ms']:.2f}"
        gain, least = f"{r['speed_up']:.2f}", f"{max(r['pays_from'], 0):.0%} right"
        rates = [
            f"{1e3 * r['batch'] * r[f'{way}_tokens_per_step'] / r[f'{way}_ms']:,.0f}"
            for way in ("plain", "guessing")
        ]
        if not timed:
            ms = guessing = gain = least = "rehearsed"
            rates = ["rehearsed"] * 2
        lines.append(
            f"| {r['label']} | {r['batch']} | {r['context']:,} | {r['temperature']:g} | {ms}"
            f" | {guessing} | {right} | {r['guessing_tokens_per_step']:.2f} | {rates[0]}"
            f" | {rates[1]} | {gain} | {least} |"
        )
    return "\n".join(lines)
