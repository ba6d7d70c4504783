"""The schedule of a decoding step: computed once on the GPU, reused by every layer.

Letters: b sequences, P programs (token ranges), N tokens per tile.

The tiles of all sequences form one line, which is cut into P equal ranges. The combine kernel
merges the parts of a sequence that crosses a cut. With `deterministic` each sequence is cut by its
own length alone, so its result does not depend on the rest of the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlra_kernels import checks
from mlra_kernels.latent_decode.configs import (
    CombineConfig,
    DecodeConfig,
    combine_config,
    default_config,
)
from mlra_kernels.latent_decode.validation import check_metadata

DETERMINISTIC_SPLITS = 32  # most parts per sequence in deterministic mode
MAX_TILES = 2**30  # most tiles of all sequences together: sums stay within int32


# One build serves every batch of up to 64 sequences: a server meets batches of all sizes, and would
# wait for each build.
@triton.jit(do_not_specialize=["batch", "num_programs"])
def schedule_kernel(
    seqlens_ptr,  # [b] int32
    schedule_ptr,  # [P, 4] int32: first sequence, first tile, number of tiles, sequence length
    splits_ptr,  # [b, 2] int32: first slot of the parts, number of parts
    planned_ptr,  # [b] int32: the lengths that the schedule holds for
    batch,
    num_programs,
    N: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    MIN_TILES: tl.constexpr,
    FIXED_SPLITS: tl.constexpr,
    MAX_TILES: tl.constexpr,
):
    """Program i writes row i of `schedule` and of `splits`; a part's slot is program + sequence.

    Impossible lengths are clamped. The combine kernel sees that the planned length differs.
    """
    i = tl.program_id(0)
    seq = tl.arange(0, BATCH_BLOCK)
    lengths = tl.maximum(tl.load(seqlens_ptr + seq, mask=seq < batch, other=0), 0)
    # At most 2^31 - 1 - N tokens, so that rounding up to whole tiles stays within int32.
    lengths = tl.minimum(lengths, tl.minimum(MAX_TILES // batch, (2**31 - 1) // N - 1) * N)
    tiles = tl.cdiv(lengths, N)
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
        # Equal lengths: move the cuts to the ends of sequences if ranges grow by at most 5 %.
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
        tl.store(schedule_ptr + i * 4 + 3, tl.sum(tl.where(seq == b, lengths, 0), 0))
    if i < batch:
        tl.store(splits_ptr + i * 2, first)
        tl.store(splits_ptr + i * 2 + 1, parts)
        tl.store(planned_ptr + i, tl.sum(tl.where(seq == i, lengths, 0), 0))


@torch.library.custom_op(
    "mlra_kernels::decode_schedule", mutates_args=("schedule", "splits", "planned")
)
def _decode_schedule(
    cache_seqlens: Tensor,
    schedule: Tensor,
    splits: Tensor,
    planned: Tensor,
    block_n: int,
    min_tiles: int,
    fixed_splits: int,
) -> None:
    batch, programs = splits.shape[0], schedule.shape[0]
    if batch == 0:
        return
    with torch.cuda.device_of(cache_seqlens):
        schedule_kernel[(max(batch, programs),)](
            cache_seqlens,
            schedule,
            splits,
            planned,
            batch,
            programs,
            N=block_n,
            BATCH_BLOCK=max(64, triton.next_power_of_2(batch)),
            MIN_TILES=min_tiles,
            FIXED_SPLITS=fixed_splits,
            MAX_TILES=MAX_TILES,
        )


@dataclass
class DecodeMetadata:
    """Schedule of one decoding step; its buffers keep their addresses, as CUDA graphs need."""

    schedule: Tensor
    """`[P, 4]` int32: first sequence, first tile, number of tiles, length of the sequence."""
    splits: Tensor
    """`[b, 2]` int32: first slot and number of parts of each sequence."""
    planned: Tensor
    """`[b]` int32: the lengths that the schedule was made for."""
    config: DecodeConfig
    """Tile shapes that the schedule was made for."""
    combine: CombineConfig
    """How the parts of a sequence are merged."""
    deterministic: bool
    """Whether a sequence's cuts depend on its own length alone."""
    made_for: dict[str, int | torch.dtype]
    """Sizes and cache dtype of the `latent_decode` calls that the schedule serves."""

    def update(self, cache_seqlens: Tensor) -> None:
        """Recompute the schedule in place for new lengths `[b]` int32; no host synchronisation.

        Raises:
            ValueError: `cache_seqlens` has another shape, dtype or device, or is not contiguous.
        """
        checks.check_tensors(cache_seqlens=cache_seqlens, metadata=self.splits)
        checks.check_contiguous(cache_seqlens=cache_seqlens)
        checks.check_dtype("cache_seqlens", cache_seqlens, (torch.int32,))
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
            self.planned,
            self.config.block_n,
            self.config.min_tiles,
            DETERMINISTIC_SPLITS if self.deterministic else 0,
        )

    def check_serves(self, q_absorbed: Tensor, shapes: dict[str, int | torch.dtype]) -> None:
        """Raise ValueError unless batch, device and shapes are those of the decoding call."""
        checks.check_tensors(q_absorbed=q_absorbed, metadata=self.splits)
        if self.splits.shape[0] != q_absorbed.shape[0]:
            raise ValueError(
                f"metadata was made for {self.splits.shape[0]} sequences, the batch has "
                f"{q_absorbed.shape[0]}: call decode_metadata for this batch"
            )
        for name, value in shapes.items():
            if self.made_for[name] != value:
                raise ValueError(
                    f"metadata was made for {name} {self.made_for[name]}, this call has {value}: "
                    "call decode_metadata for these shapes"
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

    The other arguments are the shapes of the `latent_decode` calls that will use the schedule; one
    schedule serves all layers of a step. `deterministic=True` cuts each sequence by its own length
    alone, into up to 32 parts: the sequence's result is then bitwise the same in any batch. (With
    False, results still repeat bitwise for the same lengths.) `config` overrides the tile shapes.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    sizes = {
        "q_len": q_len,
        "num_latents": num_latents,
        "heads_per_latent": heads_per_latent,
        "latent_dim": latent_dim,
        "page_size": page_size,
    }
    hopper = isinstance(cache_seqlens, Tensor) and is_hopper(cache_seqlens.device)
    most = checks.MAX_GRID // (DETERMINISTIC_SPLITS if deterministic else 1)
    check_metadata(cache_seqlens, config, sizes, cache_dtype, hopper, most)
    rows = q_len * heads_per_latent
    batch, device = cache_seqlens.shape[0], cache_seqlens.device
    config = config or default_config(rows, latent_dim, cache_dtype.itemsize, page_size, hopper)
    if deterministic:
        programs = batch * DETERMINISTIC_SPLITS
        combine = combine_config(DETERMINISTIC_SPLITS, 1, latent_dim)
    else:
        programs = config.num_programs(rows, num_latents, sm_count(device))
        combine = combine_config(programs, batch, latent_dim)
    metadata = DecodeMetadata(
        schedule=torch.empty(programs, 4, dtype=torch.int32, device=device),
        splits=torch.empty(batch, 2, dtype=torch.int32, device=device),
        planned=torch.empty(batch, dtype=torch.int32, device=device),
        config=config,
        combine=combine,
        deterministic=bool(deterministic),
        made_for={**sizes, "cache_dtype": cache_dtype},
    )
    metadata.update(cache_seqlens)
    return metadata
