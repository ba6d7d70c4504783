"""Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) on the matrices of the method.

Muon replaces a matrix's update by the nearest semi-orthogonal one, so it matters which matrix it
is told. Megatron's takes each two-dimensional weight as one matrix and leaves the others to Adam:
the up-projection `[N, h, d_h + d_v, d_l]` of the latents among them, and every head's query as one
with its neighbours'. Here a weight's `matrices` (sharding/matrices.py) say what it is made of; its
grouped-query twin's `linear_qkv` is cut by heads in the same way. Most matrices lie on one rank
whole. Those that do not (latent down-projections) are gathered, as `--muon-tp-mode duplicated` does
for other weights, so that the update is that of one rank at any tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.optimizer import layer_wise_optimizer
from megatron.core.optimizer.emerging_optimizers import (
    HAVE_EMERGING_OPTIMIZERS,
    TensorParallelMuon,
    get_supported_coefficient_types,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import Tensor

from megatron_mlra.command_line.parser import say
from megatron_mlra.sharding.matrices import Rows, grouped_query_matrices

KNOWN = ("adam", "sgd", "muon", "lion")
"""Optimizers that treat every weight of the attention as their own definition says."""


class OptimizerRefused(ValueError):
    """What an optimizer says of its flags while it is built; starting again would not help."""


class MatrixMuon(TensorParallelMuon):
    """Megatron's Muon, which sees a weight's `matrices` where it has some."""

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The update of `p` from its momentum `grad`: each of its matrices orthogonalised and
        scaled by its own size."""
        rows: tuple[Rows, ...] | None = getattr(p, "matrices", None)
        if rows is None:
            return super().orthogonalize(p, grad, **kwargs)
        groups = grad.reshape(-1, sum(r.count for r in rows), grad.shape[-1])
        runs = groups.split([r.count for r in rows], dim=1)
        done = [self._run(run, each) for run, each in zip(runs, rows, strict=True)]
        return torch.cat(done, dim=1).view(grad.shape)

    def _run(self, run: Tensor, rows: Rows) -> Tensor:
        """`[groups, count, columns]` -> the same, each matrix orthogonalised."""
        whole, group = run, None
        if rows.gathered and self.pg_collection and self.tp_mode != "blockwise":
            group = self.pg_collection.tp
            parts = [torch.empty_like(run) for _ in range(group.size())]
            torch.distributed.all_gather(parts, run.contiguous(), group)
            whole = torch.cat(parts, dim=1)
        # A matrix of which this rank has a part alone, and which is not gathered, is that part.
        height = min(rows.matrix, whole.shape[1])
        matrices = whole.reshape(-1, height, whole.shape[-1])
        done = self.scaled_orthogonalize_fn(matrices, None, None).view(whole.shape)
        return done if group is None else done.chunk(group.size(), dim=1)[group.rank()]


def is_for_adam(param: Tensor) -> bool:
    """Whether Muon leaves a weight to Adam: embeddings, norms, biases."""
    if getattr(param, "is_embedding_or_output_parameter", False):
        return True
    return param.dim() != 2 and getattr(param, "matrices", None) is None


def is_for_muon(param: Tensor) -> bool:
    """Whether Muon takes a weight."""
    return not is_for_adam(param)


def register(optimizers: dict[str, Any]) -> dict[str, Any]:
    """Put Muon on the method's matrices into Megatron's table of optimizers; returns the table."""
    by_name = ParamKey(predicate=ParamPredicate(name="nonlinear_or_embedding", fn=is_for_adam))
    for name, entry in optimizers.items():
        changed: dict[str, Any] = {"default_param_overrides": {by_name: {"optimizer": "adam"}}}
        if name == "muon":
            changed["optimizer_cls"] = MatrixMuon
        optimizers[name] = dataclasses.replace(entry, **changed)
    return optimizers


def know_matrices(attributes: dict[str, Any]) -> dict[str, Any]:
    """Have Megatron copy `matrices` from a weight to the float32 copy that its optimizer holds."""
    attributes["matrices"] = None
    return attributes


def cut_grouped_queries(chunks: Iterable[torch.nn.Module]) -> None:
    """Tell Megatron's own `linear_qkv` weights their matrices: one per head and kind."""
    for chunk in chunks:
        config = chunk.config
        for name, param in chunk.named_parameters():
            if not name.endswith("linear_qkv.weight"):
                continue
            rows = grouped_query_matrices(
                config.num_attention_heads,
                config.num_query_groups,
                config.kv_channels,
                bool(getattr(config, "attention_output_gate", False)),
            )
            if param.shape[0] % sum(r.count for r in rows) == 0:
                param.matrices = rows


def owns_whole_matrices(args: Namespace) -> bool:
    """Whether each data-parallel rank owns whole matrices, for which buffers must be laid out."""
    return args.use_layer_wise_distributed_optimizer and args.use_layer_wise_param_layout


def with_whole_matrices(wrap: Callable[..., Any], args: Namespace) -> Callable[..., Any]:
    """Wrap the step that gives model chunks their gradient buffers, so that it lays them out."""

    @functools.wraps(wrap)
    def wrapped(model, data_parallel_random_init, ddp_config, *more, **named) -> Any:
        if owns_whole_matrices(args):
            layer_wise_optimizer.tag_params_for_buffer_routing(model)
            ddp_config.use_distributed_optimizer = True
        return wrap(model, data_parallel_random_init, ddp_config, *more, **named)

    return wrapped


def layout_of(optimizer: type, args: Namespace) -> type:
    """The optimizer that lays out buffers: Megatron's, or that of whole matrices."""
    whole = layer_wise_optimizer.LayerWiseDistributedOptimizer
    return whole if owns_whole_matrices(args) else optimizer


def around_optimizer(build: Callable[..., Any], args: Namespace) -> Callable[..., Any]:
    """Wrap `get_megatron_optimizer`: matrices are known before it sorts the weights, and with
    `--verbose-optimizer` it is printed what goes where."""

    def wrapped(config: Any, model_chunks: Any, *more: Any, **named: Any) -> Any:
        if config.optimizer in ("muon", "dist_muon") and config.muon_split_qkv:
            cut_grouped_queries(model_chunks)
        try:
            optimizer = build(config, model_chunks, *more, **named)
        except (ValueError, AssertionError) as error:
            raise OptimizerRefused(f"--optimizer {config.optimizer}: {error}") from error
        if args.verbose_optimizer and args.rank == 0:
            say(table(config.optimizer, model_chunks))
        return optimizer

    return wrapped


def table(optimizer: str, chunks: Iterable[torch.nn.Module]) -> str:
    """Which optimizer takes which weights of this rank, layers of one shape in one line."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                short = re.sub(r"\.layers\.\d+\.", ".layers.*.", name.removeprefix("module."))
                shape = " x ".join(map(str, param.shape))
                found[short, f"[{shape}]", _taken(optimizer, param)] += 1
    wide = [max(len(row[i]) for row in found) for i in range(2)]
    lines = [f"optimizer {optimizer}, weights of this rank:"]
    for (name, shape, taken), count in found.items():
        times = f" ({count} weights)" if count > 1 else ""
        lines.append(f"  {name:<{wide[0]}}  {shape:<{wide[1]}}  {taken}{times}")
    return "\n".join(lines)


def _taken(optimizer: str, param: Tensor) -> str:
    if optimizer in ("adam", "sgd"):
        return optimizer
    if is_for_adam(param):
        return "adam"
    rows = getattr(param, "matrices", None)
    if optimizer != "muon" or rows is None:
        return optimizer
    groups = param.numel() // param.shape[-1] // sum(r.count for r in rows)
    kinds = []
    for r in rows:
        cut = " (gathered)" if r.gathered else ""
        number = groups * max(1, r.count // r.matrix)
        kinds.append(f"{number} of [{r.matrix} x {param.shape[-1]}], {r.name}{cut}")
    return f"{optimizer}: {'; '.join(kinds)}"


def check(args: Namespace) -> None:
    """Refuse what an optimizer cannot do.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    name = args.optimizer.removeprefix("dist_")
    if name in ("adam", "sgd"):
        return
    if not HAVE_EMERGING_OPTIMIZERS:
        raise ValueError(
            f"--optimizer {args.optimizer} needs the package emerging-optimizers; install the extra"
            " megatron-mlra[muon], or use --optimizer adam"
        )
    if name in ("muon", "adaptive_muon"):
        # Sets of one's own have no flag.
        known = [each for each in get_supported_coefficient_types() if each != "custom"]
        if args.muon_coefficient_type not in known:
            raise ValueError(
                f"--muon-coefficient-type is {args.muon_coefficient_type}; use one of"
                f" {', '.join(known)}"
            )
    if args.fp16:
        raise ValueError(f"--optimizer {args.optimizer} has no loss scaling; use --bf16")
    if args.use_distributed_optimizer and not args.bf16:
        raise ValueError(
            f"--use-distributed-optimizer with --optimizer {args.optimizer} holds float32 copies of"
            " bf16 weights, and nothing else; add --bf16, or leave it out"
        )
    if args.attention == "mlra" and name not in KNOWN:
        raise ValueError(
            f"--optimizer {args.optimizer} takes each weight as one matrix, and linear_kv_up_proj"
            " is many; use --optimizer muon or adam"
        )
