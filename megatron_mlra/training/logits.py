"""The largest attention logit of each layer, in the log; and QK-clip, behind the optimizer's step.

Cores report the largest logit of each query head over the step's micro-batches (layers/logits.py).
One small table `[layers, N, h]` of these logits is reduced over all ranks, on logged steps, or on
every step with `--qk-clip`. maths/logits.py has the rule of QK-clip. As in the paper, QK-clip
scales the weights after the optimizer's step, by the logits of the forward pass before that step.
"""

from __future__ import annotations

import contextlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mlra.command_line.parser import flag
from megatron_mlra.layers.attention import MLRASelfAttention
from megatron_mlra.layers.logits import measured, row_factors
from megatron_mlra.maths.logits import shrink
from megatron_mlra.training.curves import LOGIT, is_logged


class LogitWatch:
    """The largest logits of a run's latest measured step.

    Args:
        args: the run's arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.optimizer: Any = None
        self.largest: list[float] = []
        """One number per layer, from the first layer on; for Megatron's own attention, a single
        number of the whole model."""
        self.clipped = 0
        """Clipped (layer, head) pairs since the last call of `said`."""

    def wrap_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap Megatron's `train_step`, so that cores report in the steps that are measured."""
        if not (self.args.qk_clip or self.args.log_max_attention_logit):
            return train_step

        def step(forward_step, data, model, optimizer, *rest: Any, **named: Any) -> Any:
            self.optimizer = optimizer
            self.begin(model, self._is_measured(self.args.curr_iteration + 1))
            return train_step(forward_step, data, model, optimizer, *rest, **named)

        return step

    def wrap_clip(self, megatrons: Callable[..., float]) -> Callable[..., float]:
        """A replacement of Megatron's `clip_qk`, which knows no branches and no sharded float32
        copies. Megatron's own attention is still served by Megatron's function."""

        def clip(model: list[torch.nn.Module], log_max_only: bool = False) -> float:
            if self.args.attention == "gqa":
                largest = torch.tensor([megatrons(model, log_max_only)])
                largest = largest.to(next(model[0].parameters()).device)
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mpu.get_model_parallel_group())
                self.largest = largest.tolist()
            elif self._is_measured(self.args.curr_iteration + 1):
                self.finish(model)
            return _top(self.largest) if self.largest else 0.0

        return clip

    def _is_measured(self, step: int) -> bool:
        return self.args.qk_clip or is_logged(self.args, step)

    def begin(self, model: list[torch.nn.Module], wanted: bool = True) -> None:
        """Drop earlier reports; have the cores of all layers report from now on, if `wanted`."""
        for chunk in model:
            for _, attention in measured(chunk):
                attention.core_attention.largest.take()
                attention.core_attention.largest.wanted = wanted

    @torch.no_grad()
    def finish(self, model: list[torch.nn.Module]) -> None:
        """Reduce the cores' reports over all ranks, and clip with `--qk-clip`.

        All ranks of the world call this together. `self.optimizer` holds the float32 copies of the
        weights.
        """
        layers = [found for chunk in model for found in measured(chunk)]
        # From the model chunk, since a pipeline stage may have no layer.
        config, device = model[0].config, next(model[0].parameters()).device
        table = _reduced(layers, config, device).cpu()
        self.largest = table.amax((1, 2)).tolist()
        if not self.args.qk_clip:
            return
        threshold, alpha = self.args.qk_clip_threshold, self.args.qk_clip_alpha
        has_rope = config.qk_rope_head_dim > 0
        factors = [shrink(layer, threshold, alpha, has_rope) for layer in table]
        self.clipped += sum(int((each.key < 1).any(0).sum()) for each in factors if each)
        for place, attention in layers:
            if factor := factors[place]:
                for weight, rows in row_factors(attention, factor):
                    scale_rows(weight, rows, self.optimizer)

    def said(self) -> list[str]:
        """Parts of the run's line; sets the count of clipped heads to 0."""
        if not self.largest:
            return []
        top = _top(self.largest)
        where = f" (layer {self.largest.index(top) + 1})" if len(self.largest) > 1 else ""
        parts = [f"max logit {top:#.3g}{where}"]
        if self.clipped:
            parts.append(f"{self.clipped} head{'s' * (self.clipped > 1)} clipped")
        self.clipped = 0
        return parts

    def points(self) -> dict[str, float]:
        """Points of the run's curves: the model's largest logit, and each layer's where known."""
        if not self.largest:
            return {}
        wide = len(str(len(self.largest)))
        layers = {f"{LOGIT}/layer_{i:0{wide}}": x for i, x in enumerate(self.largest, 1)}
        return {LOGIT: _top(self.largest)} | (layers if len(layers) > 1 else {})


def _top(largest: list[float]) -> float:
    """The largest number, or NaN if any is NaN."""
    return next((x for x in largest if math.isnan(x)), max(largest))


def measured_layers(config: TransformerConfig) -> int:
    """Layers that have weights of their own: the decoder's, and those of multi-token prediction."""
    ahead = config.mtp_num_layers or 0
    return config.num_layers + (min(ahead, 1) if config.mtp_use_repeated_layer else ahead)


def _reduced(
    layers: list[tuple[int, torch.nn.Module]], config: TransformerConfig, device: torch.device
) -> Tensor:
    """The largest logit of each layer, branch and head of the model, `[layers, N, h]` float32; -inf
    where nothing was measured."""
    branches = getattr(config, "num_branches", 1)
    shape = (measured_layers(config), branches, config.num_attention_heads)
    table = torch.full(shape, -torch.inf, device=device)
    for place, attention in layers:
        found = attention.core_attention.largest.take()
        if found is not None:
            part = table[place][_place(attention)]
            part.copy_(found.view(part.shape))
    data = mpu.get_data_parallel_group(with_context_parallel=True)
    for group in (mpu.get_model_parallel_group(), data):
        dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return table


def _place(attention: torch.nn.Module) -> tuple[slice, slice]:
    """The branches and the heads of a layer that this rank's core works on."""
    if isinstance(attention, MLRASelfAttention):
        shard = attention.shard
        branch, head = shard.branch_start, shard.head_start
        return slice(branch, branch + shard.branches), slice(head, head + shard.heads)
    own, rank = attention.own_heads, attention.tp_group.rank()
    return slice(0, 1), slice(rank * own, (rank + 1) * own)


@torch.no_grad()
def scale_rows(weight: torch.nn.Parameter, rows: Tensor, optimizer: Any) -> None:
    """Scale the rows of a weight, and of the float32 copy that the optimizer writes back to it.

    A row whose factor is 1 keeps its bits.

    Args:
        weight: its rows are indexed by all axes but the last; a vector has one row per number.
        rows: `[number of rows]`, one factor per row.
        optimizer: Megatron's. With a distributed optimizer, a rank holds a flat part of the copy.
    """
    each = rows.to(weight.device, torch.float32)[:, None]
    each = each.expand(-1, weight.numel() // rows.numel()).flatten()
    weight.data.view(-1).mul_(each)
    copy = getattr(weight, "main_param", None)
    if copy is None:
        return
    if getattr(weight, "main_param_sharded", False):
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if weight in getattr(part, "model_param_gbuf_map", {}):
                own = part._get_model_param_range_map(weight)["param"]
                each = each[own.start : own.end]
    copy.data.view(-1).mul_(each)


@contextlib.contextmanager
def without_transformer_engine(args: Namespace) -> Iterator[None]:
    """Hide the flags of logits from Megatron's validation inside this context.

    With these flags Megatron demands Transformer Engine's core, which MLRA does not need.
    """
    names = ("qk_clip", "log_max_attention_logit") if args.attention != "gqa" else ()
    asked = {name: getattr(args, name) for name in names}
    vars(args).update(dict.fromkeys(names, False))
    try:
        yield
    finally:
        vars(args).update(asked)


def check(args: Namespace) -> None:
    """Refuse flags that --qk-clip and --log-max-attention-logit cannot be combined with.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    for name, default in (("qk_clip_threshold", 100), ("qk_clip_alpha", 0.5)):
        if getattr(args, name) != default and not args.qk_clip:
            raise ValueError(
                f"{flag(name)} {getattr(args, name):g} has no effect without --qk-clip; add it, or"
                f" leave {flag(name)} out"
            )
    if not (args.qk_clip or args.log_max_attention_logit):
        return
    asked = "--qk-clip" if args.qk_clip else "--log-max-attention-logit"
    if args.attention == "gqa":
        _check_megatrons(args, asked)
    if args.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl} replays launches, and {asked} has each step"
            " ask whether to measure; use none"
        )
    if args.qk_clip:
        _check_clip(args)


def _check_megatrons(args: Namespace, asked: str) -> None:
    """Refuse what Megatron's `clip_qk`, which serves Megatron's own attention, cannot do."""
    if args.transformer_impl != "transformer_engine":
        raise ValueError(
            f"{asked} with --attention gqa needs Transformer Engine's core, which reports logits;"
            " use --attention mlra, or install the extra megatron-mlra[te]"
        )
    if not (args.bf16 or args.fp16):
        raise ValueError(f"{asked} with --attention gqa needs 16-bit weights; add --bf16")
    if args.qk_clip and args.use_distributed_optimizer:
        raise ValueError(
            "--qk-clip with --attention gqa is Megatron's, which takes the parts of"
            " --use-distributed-optimizer for whole weights; leave one of them out"
        )


def _check_clip(args: Namespace) -> None:
    if args.attention not in ("mlra", "gqa"):
        raise ValueError(
            f"--qk-clip with --attention {args.attention}: queries or keys of its heads share"
            " weights; use --log-max-attention-logit, or --attention mlra"
        )
    if not args.qk_clip_threshold > 0:
        raise ValueError(f"--qk-clip-threshold is {args.qk_clip_threshold:g}; use e.g. 100")
    if not 0 < args.qk_clip_alpha < 1:
        raise ValueError(
            f"--qk-clip-alpha is {args.qk_clip_alpha:g}; use a share between 0 and 1, e.g. 0.5"
        )
    for name, why in _OTHER_COPIES.items():
        if getattr(args, name, None):
            raise ValueError(f"{flag(name)} {why}, which --qk-clip does not scale; leave it out")


_OTHER_COPIES = {
    "use_precision_aware_optimizer": "keeps weights within the optimizer",
    "optimizer_cpu_offload": "keeps weights in host memory",
    "fp8_param_gather": "keeps weights in FP8 with scales",
    "fp4_param_gather": "keeps weights in FP4 with scales",
    "use_megatron_fsdp": "cuts weights within layers",
    "use_torch_fsdp2": "cuts weights within layers",
    "overlap_param_gather_with_optimizer_step": "sends weights before the step ends",
}
"""Flags under which a weight has other copies than its float32 copy."""
