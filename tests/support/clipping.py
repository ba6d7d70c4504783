"""The largest logits of the tiny model, and QK-clip."""

from __future__ import annotations

from argparse import Namespace

from megatron_mlra.training.logits import LogitWatch
from support.tiny import Tiny


def clip(tiny: Tiny, threshold: float | None, step: bool = False, learn: bool = True) -> LogitWatch:
    """Watch the largest logits in a pass over batch 0, and clip the heads above `threshold`.

    Args:
        threshold: None: clip nothing.
        step: take an optimizer step before the clip, as training does.
        learn: take the step at the learning rate; False: at a rate of 0, which only renews the
            weights from the optimizer's copies.
    """
    watch = LogitWatch(
        Namespace(
            attention="mlra",
            qk_clip=threshold is not None,
            qk_clip_threshold=threshold,
            qk_clip_alpha=0.5,
        )
    )
    watch.optimizer = tiny.optimizer
    watch.begin(tiny.chunks)
    for chunk in tiny.chunks:
        chunk.zero_grad_buffer()
    tiny.optimizer.zero_grad()
    tiny._run(0, forward_only=False)
    if step:
        for group in tiny.optimizer.param_groups:
            group["lr"] = 1e-3 if learn else 0.0
        tiny.optimizer.step()
    watch.finish(tiny.chunks)
    watch.begin(tiny.chunks, wanted=False)
    return watch
