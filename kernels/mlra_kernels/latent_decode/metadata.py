"""The schedule of a decoding step: computed once on the GPU, reused by every layer.

Letters: b sequences, P programs (token ranges), N tokens of a tile.

All tiles of all sequences form one line, cut into P equal ranges; a sequence that crosses a cut is
merged from its parts afterwards. With `deterministic` each sequence is cut by its own length alone,
so its result does not depend on the rest of the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlra_kernels.latent_decode.configs import (
    CombineConfig,
    DecodeConfig,
    combine_config,
    default_config,
)

DETERMINISTIC_SPLITS = 32  # parts at most a sequence has in deterministic mode


@triton.jit
def schedule_kernel(
    seqlens_ptr,  # [b] int32
    schedule_ptr,  # [P, 4] int32: first sequence, first tile, number of tiles, length
    splits_ptr,  # [b, 2] int32: first slot of the parts, number of parts
    batch,
    num_programs,
    N: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    MIN_TILES: tl.constexpr,
    FIXED_SPLITS: tl.constexpr,
):
    """Program i writes row i of `schedule` and of `splits`; a part's slot is program + sequence."""
    i = tl.program_id(0)
    seq = tl.arange(0, BATCH_BLOCK)
    tiles = tl.cdiv(tl.load(seqlens_ptr + seq, mask=seq < batch, other=0), N)
    if FIXED_SPLITS > 0:
        b = i // FIXED_SPLITS
        own = tl.sum(tl.where(seq == b, tiles, 0), 0)
        size = tl.maximum(tl.cdiv(own, FIXED_SPLITS), MIN_TILES)
        begin = i % FIXED_SPLITS * size
        count = tl.maximum(tl.minimum(own - begin, size), 0)
        own = tl.sum(tl.where(seq == i, tiles, 0), 0)
        first = i * FIXED_SPLITS + i
        parts = tl.cdiv(own, tl.maximum(tl.cdiv(own, FIXED_SPLITS), MIN_TILES))
    else:
        ends = tl.cumsum(tiles, 0)
        total = tl.sum(tiles, 0)
        size = tl.maximum(tl.cdiv(total, num_programs), MIN_TILES)
        # Equal lengths: where it costs under 5 %, move the cuts to the ends of sequences.
        longest = tl.max(tiles, 0)
        aligned = tl.cdiv(longest, tl.maximum(longest // size, 1))
        if (
            (batch > 1)
            & (total == longest * batch)
            & (aligned >= size)
            & (aligned * 20 <= size * 21)
        ):
            size = aligned
        start = i * size
        b = tl.sum(tl.where((ends <= start) & (seq < batch), 1, 0), 0)
        begin = start - tl.sum(tl.where(seq < b, tiles, 0), 0)
        count = tl.maximum(tl.minimum(total - start, size), 0)
        own_begin = tl.sum(tl.where(seq < i, tiles, 0), 0)
        own_end = own_begin + tl.sum(tl.where(seq == i, tiles, 0), 0)
        first = own_begin // size + i
        parts = tl.where(own_end > own_begin, (own_end - 1) // size - own_begin // size + 1, 0)
    if i < num_programs:
        tl.store(schedule_ptr + i * 4, b)
        tl.store(schedule_ptr + i * 4 + 1, begin)
        tl.store(schedule_ptr + i * 4 + 2, count)
        tl.store(schedule_ptr + i * 4 + 3, tl.load(seqlens_ptr + tl.minimum(b, batch - 1)))
    if i < batch:
        tl.store(splits_ptr + i * 2, first)
        tl.store(splits_ptr + i * 2 + 1, parts)


@torch.library.custom_op("mlra_kernels::decode_schedule", mutates_args=("schedule", "splits"))
def _decode_schedule(
    cache_seqlens: Tensor,
    schedule: Tensor,
    splits: Tensor,
    block_n: int,
    min_tiles: int,
    fixed_splits: int,
) -> None:
    batch, programs = splits.shape[0], schedule.shape[0]
    with torch.cuda.device_of(cache_seqlens):
        schedule_kernel[(max(batch, programs),)](
            cache_seqlens,
            schedule,
            splits,
            batch,
            programs,
            N=block_n,
            BATCH_BLOCK=triton.next_power_of_2(batch),
            MIN_TILES=min_tiles,
            FIXED_SPLITS=fixed_splits,
        )


@dataclass
class DecodeMetadata:
    """Schedule of one decoding step; its buffers keep their addresses, as CUDA graphs need."""

    schedule: Tensor
    """`[P, 4]` int32: first sequence, first tile, number of tiles, length of that sequence."""
    splits: Tensor
    """`[b, 2]` int32: first slot and number of parts of every sequence."""
    config: DecodeConfig
    """Tile shapes that the schedule was made for."""
    combine: CombineConfig
    """How the parts of a sequence are merged."""
    deterministic: bool
    """Whether a sequence's cuts depend on its own length alone."""

    def update(self, cache_seqlens: Tensor) -> None:
        """Recompute the schedule in place for new lengths `[b]` int32; no host synchronisation."""
        batch = self.splits.shape[0]
        if cache_seqlens.shape != (batch,):
            raise ValueError(
                f"cache_seqlens has shape {tuple(cache_seqlens.shape)}, this metadata was made for "
                f"({batch},): call decode_metadata again for another batch size"
            )
        torch.ops.mlra_kernels.decode_schedule(
            cache_seqlens,
            self.schedule,
            self.splits,
            self.config.block_n,
            self.config.min_tiles,
            DETERMINISTIC_SPLITS if self.deterministic else 0,
        )


def sm_count(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; 4 for the interpreter's CPU tensors."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """Return whether `device` is a Hopper GPU, which the TMA kernel is written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def decode_metadata(
    cache_seqlens: Tensor,
    *,
    q_len: int,
    num_latents: int,
    heads_per_latent: int,
    latent_dim: int,
    cache_dtype: torch.dtype,
    page_size: int,
    deterministic: bool = False,
    config: DecodeConfig | None = None,
) -> DecodeMetadata:
    """Schedule a decoding step for `cache_seqlens` `[b]` int32 (the q_len new tokens included).

    The other arguments are the shapes of the `latent_decode` calls that will use it; one schedule
    serves all layers of a step. `deterministic=True` cuts each sequence by its own length alone:
    its result is then bitwise the same in any batch, at up to 32 parts a sequence. (Without it,
    results still repeat bitwise for the same lengths.) `config` overrides the tile shapes.
    """
    rows = q_len * heads_per_latent
    batch, device = cache_seqlens.shape[0], cache_seqlens.device
    config = config or default_config(
        rows, latent_dim, cache_dtype.itemsize, page_size, is_hopper(device)
    )
    if deterministic:
        programs = batch * DETERMINISTIC_SPLITS
        combine = combine_config(DETERMINISTIC_SPLITS, 1, latent_dim)
    else:
        programs = config.num_programs(rows, num_latents, sm_count(device))
        combine = combine_config(programs, batch, latent_dim)
    metadata = DecodeMetadata(
        schedule=torch.empty(programs, 4, dtype=torch.int32, device=device),
        splits=torch.empty(batch, 2, dtype=torch.int32, device=device),
        config=config,
        combine=combine,
        deterministic=deterministic,
    )
    metadata.update(cache_seqlens)
    return metadata
