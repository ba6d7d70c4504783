"""Modules that Megatron lacks: sharded norms and the up-projection of each latent."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_mlra.layers.config import MLRAConfig, resolve_latent_kernels
from megatron_mlra.maths import attention
from megatron_mlra.sharding.partition import LatentShard
from megatron_mlra.sharding.placement import local_shape, placements, training_share


def latent_functions(config: MLRAConfig) -> ModuleType:
    """The module that `latent_kernels` chooses: each has the functions `rms_norm`,
    `rotate_absorb`, `join_keys` and `sum_branches`."""
    # Baselines use the norm too, but their configs have no `latent_kernels`.
    kernels = getattr(config, "latent_kernels", "torch")
    rope_dim = getattr(config, "qk_pos_emb_head_dim", None) if kernels != "torch" else None
    if resolve_latent_kernels(kernels, config.transformer_impl, rope_dim) == "torch":
        return attention
    from mlra_kernels import latent_projections

    return latent_projections


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm of a replicated hidden state, statistics in float32.

    Unlike the weight of torch's RMSNorm, this weight carries the mark by which Megatron sums its
    gradient over ranks under sequence parallel.

    Args:
        config: supplies `sequence_parallel` and `params_dtype`.
        hidden_size: the normalised last dim.
        eps: added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(_allocate((hidden_size,), config).fill_(1.0))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` -> the same shape and dtype."""
        return torch.nn.functional.rms_norm(
            x.float(), self.weight.shape, self.weight.float(), self.eps
        ).to(x.dtype)


class ShardedRMSNorm(MegatronModule):
    """RMSNorm of `num_norms` equal parts of a vector whose columns are split over ranks.

    Rank r holds columns `[r w, (r + 1) w)`, w = size / tp, and their weights. Where w is a whole
    number of parts (`is_local`), `forward` norms them. Else the columns are gathered with their
    weights, and `whole` norms them.

    Args:
        size: columns over all ranks (d_q, or d_c).
        num_norms: parts normalised on their own (1, or L).
        scale: factor of the result (variance scaling).
    """

    def __init__(
        self, config: MLRAConfig, size: int, num_norms: int, scale: float, tp_group
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.eps = config.layernorm_epsilon
        self.scale = scale
        self.num_norms = num_norms
        self.part = size // num_norms
        self.width = size // tp_group.size()
        self.is_local = self.width % self.part == 0
        self.latent_functions = latent_functions(config)
        self.weight = torch.nn.Parameter(_allocate((self.width,), config).fill_(1.0))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., w]` of whole parts -> `[..., w]`, the same dtype; statistics in float32."""
        return self.whole(x, self.weight)

    def whole(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same of columns that were gathered, `[..., size]`, with their weights `[size]`."""
        parts, weight = x.unflatten(-1, (-1, self.part)), weight.view(-1, self.part)
        return self.latent_functions.rms_norm(parts, weight, self.eps, self.scale).reshape(x.shape)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """`weight`, sharded along its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class LatentUpProjection(MegatronModule):
    """W_UK and W_UV of the rank's (branch, head) pairs: one weight, `[n, h_c, d_h + d_v, d_l]`.

    The global weight is `[N, h, d_h + d_v, d_l]` in either layout. Each pair has d_h key rows, then
    d_v value rows.
    """

    def __init__(
        self,
        config: MLRAConfig,
        shard: LatentShard,
        tp_group,
        init_method: Callable[[Tensor], None],
    ) -> None:
        super().__init__(config)
        self.shard = shard
        self.tp_group = tp_group
        placed = placements(config)["linear_kv_up_proj"]
        share = training_share(config, shard)
        self.global_shape, (self.box,) = placed.shape, placed.boxes(share)
        self.weight = torch.nn.Parameter(_allocate(local_shape(placed, share), config))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.weight.allreduce = True
        if config.perform_initialization:
            self._initialize(init_method)

    @torch.no_grad()
    def _initialize(self, init_method: Callable[[Tensor], None]) -> None:
        if not self.config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork():
                init_method(self.weight)
            return
        # As Megatron initialises on a CPU: every rank draws the global weight and keeps its part.
        whole = torch.empty(self.global_shape, dtype=torch.float32, device=self.weight.device)
        init_method(whole)
        self.weight.copy_(whole[self.box])

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """`weight` as a rectangle of the global weight, the same key and shape in both layouts."""
        axis = len(sharded_offsets)
        key = f"{prefix}weight"
        cut = [
            (axis + i, part.start // size, whole // size)
            for i, (part, size, whole) in enumerate(
                zip(self.box, self.weight.shape, self.global_shape, strict=False)
            )
        ]
        tensor = ShardedTensor.from_rank_offsets(
            key,
            self.weight,
            *sharded_offsets,
            *cut,
            replica_id=(0, 0, get_pg_rank(metadata["dp_cp_group"])),
            prepend_axis_num=axis,
        )
        return {key: tensor}


class LatentColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear that leaves its input's communication to LatentParallel.

    Every rank holds the whole input. The gradient of the input is a partial sum. LatentParallel
    completes the sum in backward, so that several projections share one collective.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, disable_grad_reduce=True, **kwargs)
        self.sequence_parallel = False


def split_rows_factory(
    sharded: ShardedTensor, blocks: tuple[int, ...], offsets
) -> ShardedTensorFactory:
    """Checkpoint a column-parallel weight whose local rows are blocks, each sharded on its own.

    The local weight is `[sum(blocks), in]`; globally block i of all ranks forms rows
    `[tp * sum(blocks[:i]), tp * sum(blocks[:i + 1]))`, so the stored weight does not depend on tp.

    Args:
        sharded: the weight as Megatron shards it (rows split evenly over ranks).
        blocks: local rows of each block, in order.
        offsets: the `sharded_offsets` of layers in front of the weight's own axes.
    """
    axis = len(offsets)
    tp = sharded.axis_fragmentations[axis]
    rank = sharded.global_offset[axis] // sharded.local_shape[0]
    # from_rank_offsets counts offsets in pieces of equal size, so every block is cut into pieces of
    # the blocks' greatest common divisor.
    unit = math.gcd(*blocks)
    total = tp * sum(blocks) // unit

    @torch.no_grad()
    def build(key, weight, replica_id, flattened_range):
        assert flattened_range is None, "flattened optimizer states are not stored by factories"
        pieces, start = [], 0
        for block, rows in zip(weight.split(blocks), blocks, strict=True):
            first = (start * tp + rank * rows) // unit
            for i, piece in enumerate(block.split(unit)):
                pieces.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        piece,
                        *offsets,
                        (axis, first + i, total),
                        replica_id=replica_id,
                        prepend_axis_num=axis,
                    )
                )
            start += rows
        return pieces

    return ShardedTensorFactory(
        sharded.key, sharded.data, build, lambda pieces: torch.cat(pieces), sharded.replica_id
    )


def _allocate(shape: tuple[int, ...], config) -> Tensor:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    if config.init_model_with_meta_device:
        device = "meta"
    return torch.empty(shape, dtype=config.params_dtype, device=device)
