"""What a cache's dtype costs: losses of the same tokens, decoded from caches of several dtypes.

A window of a dataset is served as a server serves it: its first half is a prompt, and the second
half is decoded, one given token after another, with everything before read from the cache. All
models decode the same window side by side, so their logits are compared token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.evaluation.rope_rounding import FP8_ROPE, RoundedRopeOps
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.runner import Runner, pool_for

PAGE = 64


@dataclass
class CacheLoss:
    """Sums over decoded tokens of one cache dtype."""

    tokens: int = 0
    log_likelihood: float = 0.0
    squares: float = 0.0
    logits: int = 0
    largest: float = 0.0

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor) -> None:
        """Count one step.

        Args:
            logits: float32 `[b, V]`.
            targets: the tokens that follow, int64 `[b]`.
            reference: logits `[b, V]` of the cache that others are compared with.
        """
        log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])
        difference = logits - reference
        self.tokens += len(targets)
        self.log_likelihood += log_probs.double().sum().item()
        self.squares += difference.double().square().sum().item()
        self.logits += difference.numel()
        self.largest = max(self.largest, difference.abs().max().item())

    def result(self) -> dict[str, float]:
        """Loss in nats per token; root mean square and largest difference of a logit."""
        return {
            "loss": -self.log_likelihood / self.tokens,
            "tokens": self.tokens,
            "rms_logit_error": (self.squares / self.logits) ** 0.5,
            "max_logit_error": self.largest,
        }


def load_runners(
    source: CheckpointFolder,
    cache_dtypes: Sequence[str],
    dtype: str | None,
    device: str,
    batch_size: int,
    length: int,
) -> dict[str, Runner]:
    """One runner per cache dtype.

    Args:
        cache_dtypes: every name but 'fp8' and 'fp8-rope' (a simulation: rope_rounding.py) is the
            dtype of cache and weights.
        dtype: of the weights beside an FP8 cache; None takes the checkpoint's, float32 on a CPU.
        batch_size: windows that decode together.
        length: tokens of a window.

    Raises:
        ValueError: a dtype that the model or the device does not take, or that is named twice.
    """
    if len(set(cache_dtypes)) < len(cache_dtypes):
        raise ValueError(f"--cache-dtype names a dtype twice in {' '.join(cache_dtypes)}")
    pages = -(-length // PAGE)
    runners = {}
    for name in cache_dtypes:
        fp8, simulated = name in ("fp8", FP8_ROPE), name == FP8_ROPE
        if simulated and not source.description.qk_rope_head_dim:
            raise ValueError(f"--cache-dtype {FP8_ROPE} is for RoPE keys, which the model lacks")
        options = LoadOptions(
            dtype=dtype or "auto" if fp8 else name,
            cache_dtype="fp8" if fp8 else "auto",
            cache_tokens=batch_size * pages * PAGE,
            page_size=PAGE,
            max_positions=length,
        )
        model = load_model(source.description, source.tensor, options, device)
        graphs = model.ops.name == "mlra_kernels" and not simulated
        if simulated:
            model.ops = RoundedRopeOps(model.ops, source.description.qk_rope_head_dim)
        runners[name] = Runner(model, batch_size, pages, graphs=graphs)
    return runners


def chosen_windows(tokens: np.ndarray, length: int, count: int, name: str) -> np.ndarray:
    """`count` windows of a stream at equal distances, or all where it has fewer.

    Args:
        tokens: the stream.
        length: tokens that a window predicts.
        name: of the stream, for the error.

    Returns:
        Inputs and, one place on, their targets: int64 `[n, length + 1]`.

    Raises:
        ValueError: the stream is shorter than a window.
    """
    windows = (len(tokens) - 1) // length
    if windows < 1:
        raise ValueError(
            f"{name} has {len(tokens)} tokens and a window takes {length + 1}; use --max-length"
            f" {max(1, len(tokens) - 1)}"
        )
    places = np.linspace(0, windows - 1, min(count, windows)).round().astype(int)
    return np.stack([tokens[at * length :][: length + 1] for at in places]).astype(np.int64)


@torch.inference_mode()
def decoded_losses(
    runners: dict[str, Runner], rows: np.ndarray, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Losses of the second half of each window, per cache dtype; the first dtype is the reference.

    Args:
        runners: of models of the same weights; each takes a batch of `max_batch` windows.
        rows: what `chosen_windows` gave.
    """
    sums = {name: CacheLoss() for name in runners}
    batch = min(runner.max_batch for runner in runners.values())
    prompt = (rows.shape[1] - 1) // 2
    decoded = rows.shape[0] * (rows.shape[1] - 1 - prompt)
    shown = bar(desc="decoding", total=decoded, unit="tokens", shown=progress)
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        steps = [_prefilled(runner, some, prompt) for runner in runners.values()]
        for at in range(prompt, rows.shape[1] - 1):
            logits = [step(some[:, at].tolist(), at).float() for step in steps]
            targets = torch.from_numpy(some[:, at + 1]).to(logits[0].device)
            for total, found in zip(sums.values(), logits, strict=True):
                total.add(found, targets, logits[0])
            shown.update(len(some))
    shown.close()
    return {name: total.result() for name, total in sums.items()}


def _prefilled(runner: Runner, rows: np.ndarray, prompt: int) -> Callable[[list[int], int], Tensor]:
    """Cache each row's first `prompt` tokens; the function that decodes one more token of each."""
    pool = pool_for(runner.model)
    pages = [pool.take(rows.shape[1] - 1) for _ in rows]
    for row, (tokens, own) in enumerate(zip(rows, pages, strict=True)):
        runner.tables.set(row, own)
        # One after another: of all at once the activations would take as many times the memory.
        if prompt:  # a window of one token has none
            runner.prefill([Chunk(tokens[:prompt].tolist(), 0, own)])
    return lambda tokens, at: runner.decode(tokens, [at] * len(tokens), pages)
