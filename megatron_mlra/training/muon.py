"""Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982) on the matrices of the method.

Muon replaces the update of a matrix by the nearest semi-orthogonal matrix, so the update depends on
what counts as one matrix. Megatron's Muon takes each two-dimensional weight as one matrix, with the
queries of all heads in one, and leaves all other weights to Adam, among them the up-projection
`[N, h, d_h + d_v, d_l]` of the latents. Here the attribute `matrices` of a weight
(sharding/matrices.py) lists the matrices that the weight consists of. `linear_qkv` of Megatron's
grouped-query attention is cut by heads in the same way.

Most matrices lie whole on one rank. The others (in down-projections) are gathered, as
`--muon-tp-mode duplicated` does for other weights, so that the update is the same at any
tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import traceback
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

from megatron_mlra.command_line.parser import flag, say
from megatron_mlra.sharding.matrices import Rows, grouped_query_matrices

KNOWN = ("adam", "sgd", "muon", "lion")
"""Optimizers that treat every weight of the attention by their own definition."""


class OptimizerRefused(ValueError):
    """An optimizer refused its flags while it was built. A restart of the run would not help."""


class MatrixMuon(TensorParallelMuon):
    """Megatron's Muon, on the matrices of each weight that has the attribute `matrices`."""

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The update of the weight `p`: each matrix orthogonalised, and scaled by its own size.

        Args:
            grad: the momentum, of the shape of `p`.

        Returns:
            the update, of the same shape.
        """
        rows: tuple[Rows, ...] | None = getattr(p, "matrices", None)
        if rows is None:
            return super().orthogonalize(p, grad, **kwargs)
        if not cuts_a_group(grad, rows):
            return self._by_matrices(grad, rows)
        if self.tp_mode == "blockwise":
            return super().orthogonalize(p, grad, **kwargs)
        return self._of_all_ranks(grad, 0, lambda whole: self._by_matrices(whole, rows))

    def _by_matrices(self, grad: Tensor, rows: tuple[Rows, ...]) -> Tensor:
        """`orthogonalize` of a weight whose rows are whole groups."""
        groups = grad.reshape(-1, sum(r.count for r in rows), grad.shape[-1])
        runs = groups.split([r.count for r in rows], dim=1)
        done = [self._run(run, each) for run, each in zip(runs, rows, strict=True)]
        return torch.cat(done, dim=1).view(grad.shape)

    def _run(self, run: Tensor, rows: Rows) -> Tensor:
        """`[groups, count, columns]` -> the same shape, with each matrix orthogonalised."""

        def orthogonalized(whole: Tensor) -> Tensor:
            # Of a cut matrix that is not gathered (blockwise), this rank's part counts as a matrix.
            height = min(rows.matrix, whole.shape[1])
            matrices = whole.reshape(-1, height, whole.shape[-1])
            return self.scaled_orthogonalize_fn(matrices, None, None).view(whole.shape)

        if rows.gathered and self.tp_mode != "blockwise":
            return self._of_all_ranks(run, 1, orthogonalized)
        return orthogonalized(run)

    def _of_all_ranks(self, part: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """This rank's part, along `dim`, of `function` of all tensor-parallel ranks' parts."""
        if not self.pg_collection:
            return function(part)
        group = self.pg_collection.tp
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group)
        return function(torch.cat(parts, dim=dim)).chunk(group.size(), dim=dim)[group.rank()]


def cuts_a_group(weight: Tensor, rows: tuple[Rows, ...]) -> bool:
    """Whether a rank's part of a weight ends within a group, so that several ranks share a group:
    key/value heads of grouped queries, where they are fewer than ranks."""
    return weight.numel() // weight.shape[-1] % sum(r.count for r in rows) != 0


def is_for_adam(param: Tensor) -> bool:
    """Whether Muon leaves a weight to Adam: embeddings, norms, biases."""
    if getattr(param, "is_embedding_or_output_parameter", False):
        return True
    return param.dim() != 2 and getattr(param, "matrices", None) is None


def is_for_muon(param: Tensor) -> bool:
    """Whether Muon takes a weight."""
    return not is_for_adam(param)


def register(optimizers: dict[str, Any]) -> dict[str, Any]:
    """Put MatrixMuon into Megatron's table of optimizers, in place; returns the table."""
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
    """Set `matrices` of Megatron's own `linear_qkv` weights: one matrix per head and projection."""
    for chunk in chunks:
        config = chunk.config
        for name, param in chunk.named_parameters():
            if not name.endswith("linear_qkv.weight"):
                continue
            param.matrices = grouped_query_matrices(
                config.num_attention_heads,
                config.num_query_groups,
                config.kv_channels,
                bool(getattr(config, "attention_output_gate", False)),
            )


def owns_whole_matrices(args: Namespace) -> bool:
    """Whether each data-parallel rank owns whole matrices, which the buffers then keep together."""
    return args.use_layer_wise_distributed_optimizer and args.use_layer_wise_param_layout


def with_whole_matrices(wrap: Callable[..., Any], args: Namespace) -> Callable[..., Any]:
    """Wrap Megatron's `_ddp_wrap`, so that gradient buffers are laid out for whole matrices."""

    @functools.wraps(wrap)
    def wrapped(model, data_parallel_random_init, ddp_config, *more, **named) -> Any:
        if owns_whole_matrices(args):
            layer_wise_optimizer.tag_params_for_buffer_routing(model)
            ddp_config.use_distributed_optimizer = True
        return wrap(model, data_parallel_random_init, ddp_config, *more, **named)

    return wrapped


def layout_of(optimizer: type, args: Namespace) -> type:
    """The optimizer class that lays out buffers: `optimizer`, or Megatron's for whole matrices."""
    whole = layer_wise_optimizer.LayerWiseDistributedOptimizer
    return whole if owns_whole_matrices(args) else optimizer


def around_optimizer(build: Callable[..., Any], args: Namespace) -> Callable[..., Any]:
    """Wrap `get_megatron_optimizer`.

    Matrices of grouped queries are set before Megatron sorts the weights. With
    `--verbose-optimizer`, a table of optimizers and weights is printed afterwards.

    Raises (when called):
        OptimizerRefused: the optimizer does not accept its flags.
    """

    def wrapped(config: Any, model_chunks: Any, *more: Any, **named: Any) -> Any:
        if config.optimizer in ("muon", "dist_muon") and config.muon_split_qkv:
            cut_grouped_queries(model_chunks)
        try:
            optimizer = build(config, model_chunks, *more, **named)
        except (ValueError, AssertionError) as error:
            # Some of Megatron's assertions have no text.
            failed = traceback.extract_tb(error.__traceback__)[-1].line
            why = str(error) or f"Megatron refuses these arguments: `{failed}`"
            raise OptimizerRefused(f"--optimizer {config.optimizer}: {why}") from error
        if args.verbose_optimizer and args.rank == 0:
            say(table(config.optimizer, model_chunks, config.muon_scalar_optimizer))
        return optimizer

    return wrapped


def table(
    optimizer: str, chunks: Iterable[torch.nn.Module], muon_scalar_optimizer: str = "adam"
) -> str:
    """The optimizer of each weight of this rank, one line for equal weights of several layers.

    Args:
        muon_scalar_optimizer: takes what Muon leaves.
    """
    left_to = muon_scalar_optimizer if optimizer == "muon" else "adam"
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                short = re.sub(r"\.layers\.\d+\.", ".layers.*.", name.removeprefix("module."))
                shape = " x ".join(map(str, param.shape))
                found[short, f"[{shape}]", _taken(optimizer, param, left_to)] += 1
    wide = [max(len(row[i]) for row in found) for i in range(2)]
    lines = [f"optimizer {optimizer}, weights of this rank:"]
    for (name, shape, taken), count in found.items():
        times = f" ({count} weights)" if count > 1 else ""
        lines.append(f"  {name:<{wide[0]}}  {shape:<{wide[1]}}  {taken}{times}")
    return "\n".join(lines)


def _taken(optimizer: str, param: Tensor, left_to: str) -> str:
    if optimizer in ("adam", "sgd"):
        return optimizer
    if is_for_adam(param):
        return left_to
    rows = getattr(param, "matrices", None)
    if optimizer != "muon" or rows is None:
        return optimizer
    groups = max(1, param.numel() // param.shape[-1] // sum(r.count for r in rows))
    kinds = []
    for r in rows:
        cut = " (gathered)" if r.gathered or cuts_a_group(param, rows) else ""
        number = groups * max(1, r.count // r.matrix)
        kinds.append(f"{number} of [{r.matrix} x {param.shape[-1]}], {r.name}{cut}")
    return f"{optimizer}: {'; '.join(kinds)}"


_OF_ADAM = ("use_precision_aware_optimizer", "optimizer_cpu_offload", "use_megatron_fsdp")
"""Flags that need Adam."""


def check(args: Namespace) -> None:
    """Refuse flags that the chosen optimizer does not support.

    Raises:
        ValueError: one line that names the flag and the fix.
    """
    name = args.optimizer.removeprefix("dist_")
    for each in _OF_ADAM if name != "adam" else ():
        if getattr(args, each) and not (name == "sgd" and each == "use_megatron_fsdp"):
            raise ValueError(
                f"{flag(each)} knows Adam alone, and --optimizer is {args.optimizer}; leave it"
                " out, or use --optimizer adam"
            )
    if name in ("adam", "sgd"):
        return
    if not HAVE_EMERGING_OPTIMIZERS:
        raise ValueError(
            f"--optimizer {args.optimizer} needs the package emerging-optimizers; install the extra"
            " megatron-mlra[muon], or use --optimizer adam"
        )
    if name in ("muon", "adaptive_muon"):
        # No flag can give the coefficients of "custom".
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
    if args.optimizer.startswith("dist_") and not args.bf16:
        raise ValueError(
            f"--optimizer {args.optimizer} is {name} with --use-distributed-optimizer, which holds"
            f" float32 copies of bf16 weights; add --bf16, or use --optimizer {name}"
        )
    if args.attention == "mlra" and name not in KNOWN:
        raise ValueError(
            f"--optimizer {args.optimizer} takes each weight as one matrix, and linear_kv_up_proj"
            " is many; use --optimizer muon or adam"
        )
