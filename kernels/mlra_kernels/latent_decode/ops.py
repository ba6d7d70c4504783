"""Public operations, registered with torch.library: torch.compile and CUDA graphs see one op.

Letters: b sequences, q query tokens per sequence, L latent heads in the cache, n branches,
G = L / n head groups, j heads per latent head, D latent dim, R RoPE dim.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from mlra_kernels import checks
from mlra_kernels.latent_decode import reference, validation
from mlra_kernels.latent_decode.append_kernel import latent_cache_append_kernel
from mlra_kernels.latent_decode.combine_kernel import combine_kernel, merge_states_kernel
from mlra_kernels.latent_decode.configs import CombineConfig, DecodeConfig
from mlra_kernels.latent_decode.decode_kernel import latent_decode_kernel
from mlra_kernels.latent_decode.descriptors import scale_descriptor, tile_descriptor
from mlra_kernels.latent_decode.hopper_kernel import latent_decode_hopper_kernel
from mlra_kernels.latent_decode.metadata import DecodeMetadata, decode_metadata


def latent_decode(
    q_absorbed: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    *,
    num_branches: int,
    cache_scale: Tensor | None = None,
    metadata: DecodeMetadata | None = None,
    backend: str = "mlra_kernels",
) -> tuple[Tensor, Tensor]:
    """Attend from q new tokens per sequence to every latent head of a paged cache.

    For query token i of a sequence of length s, latent l, head j, over the tokens t <= s - q + i:
        p_t = softmax_t(softmax_scale * (q_absorbed . c_t,l + q_rope . k_t)),  out = sum_t p_t c_t,l

    Args:
        q_absorbed: `[b, q, L, j, D]` bf16 or fp16 ("torch": fp32 too); q from 1 to 8, D one of 64,
            128, 256, 512.
        q_rope: `[b, q, G * j, R]`, rotated, same dtype; R 32 or 64. Head i of latent l uses row
            (l mod G) * j + i.
        cache: `[pages, page_size, L * D + R]`, a row being `[c_0 ... c_{L-1} | k_rope]`, in q's
            dtype; or FP8 (e4m3), `[pages, page_size, L * D + 2 * R]`, the last 2 R bytes of a row
            holding R bf16 numbers.
        block_table: `[b, max_pages]` int32, the pages of each sequence; entries past the sequence's
            length are not read.
        cache_seqlens: `[b]` int32 lengths, the q new tokens included; 0 is allowed. A length that
            exceeds the table, or that `metadata` was not made for, gives NaN ("torch" raises).
        softmax_scale: factor of the scores, usually (qk_nope_head_dim + qk_rope_head_dim) ** -0.5.
        num_branches: n; divides L.
        cache_scale: `[pages, L, page_size]` fp32, the factor of each FP8 latent; FP8 only.
        metadata: schedule from `decode_metadata` for these lengths; None: computed here.
        backend: "mlra_kernels" (CUDA) or "torch" (the reference, any device).

    Returns:
        out `[b, q, L, j, D]` in q's dtype and the natural log-sum-exp `[b, q, L, j]` fp32; a row
        that sees no token gives 0 and -inf.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    arguments = (
        q_absorbed, q_rope, cache, block_table, cache_seqlens, softmax_scale, num_branches,
        cache_scale,
    )  # fmt: skip
    validation.check_decode(*arguments)
    if checks.resolve_backend(backend, q_absorbed, half=True) == "torch":
        return torch.ops.mlra_kernels.latent_decode_reference(*arguments)
    # Within a sequence's queries and within a page, the kernels count in 32 bits.
    checks.check_reach("a sequence of q_absorbed", q_absorbed, 1)
    checks.check_reach("a sequence of q_rope", q_rope, 1)
    checks.check_reach("a page of cache", cache, 1)
    shapes = {
        "q_len": q_absorbed.shape[1],
        "num_latents": q_absorbed.shape[2],
        "heads_per_latent": q_absorbed.shape[3],
        "latent_dim": q_absorbed.shape[4],
        "page_size": cache.shape[1],
        "cache_dtype": cache.dtype,
    }
    if metadata is None:
        metadata = decode_metadata(cache_seqlens, **shapes)
    elif isinstance(metadata, DecodeMetadata):
        metadata.check_serves(q_absorbed, shapes)
    else:
        raise ValueError(f"metadata is a {type(metadata).__name__}: give what decode_metadata made")
    config, combine = metadata.config, metadata.combine
    if config.hopper and cache.shape[1] % config.block_n:
        raise ValueError(
            f"page size is {cache.shape[1]}, which tiles of {config.block_n} tokens do not divide: "
            "let decode_metadata choose the config, or pass one with hopper=False"
        )
    return torch.ops.mlra_kernels.latent_decode(
        *arguments,
        metadata.schedule,
        metadata.splits,
        metadata.planned,
        config.to_list(),
        combine.to_list(),
    )


def merge_states(
    outs: Tensor, lses: Tensor, *, backend: str = "mlra_kernels"
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of tokens (context-parallel ranks, a shared prefix).

    lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s

    Args:
        outs: `[S, ..., d]` results of S sets of tokens, any float dtype; d from 1 to 4096.
        lses: `[S, ...]` fp32, their natural log-sum-exps; -inf marks an empty set.
        backend: "mlra_kernels" (CUDA) or "torch".

    Returns:
        out `[..., d]` in the dtype of `outs` and lse `[...]` fp32; 0 and -inf if all are empty.

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    validation.check_merge(outs, lses)
    if checks.resolve_backend(backend, outs) == "torch":
        return reference.merge_states_reference(outs, lses)
    return torch.ops.mlra_kernels.merge_states(outs.contiguous(), lses.contiguous())


def latent_cache_append(
    kv_down: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    *,
    latent_scale: float,
    norm_eps: float,
    cache_scale: Tensor | None = None,
    backend: str = "mlra_kernels",
) -> None:
    """Write new tokens to the paged cache, in place, from the raw output of the down projection.

    c_l = RMSNorm_l(x_l) * latent_scale;  k = half-split RoPE of the last R columns.

    Args:
        kv_down: `[tokens, L * D + R]`, not yet normed or rotated, any float dtype.
        norm_weight: `[L, D]`, the RMSNorm weight of every latent head.
        cos, sin: `[positions, R / 2]` fp32, from `rope_tables` or a model's own.
        positions: `[tokens]` int32 or int64, each token's row of cos and sin; a position outside
            the tables gives a RoPE key of NaN.
        slot_mapping: `[tokens]` int32 or int64, page * page_size + offset; a token whose slot is
            negative, or behind the cache, is skipped.
        cache: as in `latent_decode`; written in place.
        latent_scale: factor after the norm, sqrt(hidden / latent dim) for variance scaling, else 1.
        norm_eps: epsilon of the RMSNorm.
        cache_scale: `[pages, L, page_size]` fp32, written in place for an FP8 cache (amax / 448).
        backend: "mlra_kernels" (CUDA) or "torch".

    Raises:
        ValueError: an argument does not fit; the message names the value and the fix.
    """
    arguments = (
        kv_down, norm_weight, cos, sin, positions, slot_mapping, cache, cache_scale, latent_scale,
        norm_eps,
    )  # fmt: skip
    validation.check_append(*arguments)
    run = torch.ops.mlra_kernels.latent_cache_append
    if checks.resolve_backend(backend, slot_mapping) == "torch":
        run = torch.ops.mlra_kernels.latent_cache_append_reference
    run(*arguments)


def _on_its_device(run: Callable) -> Callable:
    """Make the GPU of the first argument current while `run` launches; no change for a CPU."""

    @functools.wraps(run)
    def guarded(first: Tensor, *args, **kwargs):
        with torch.cuda.device_of(first):
            return run(first, *args, **kwargs)

    return guarded


def _decode_outputs(q_absorbed: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate out and lse of a decode call."""
    out = torch.empty(q_absorbed.shape, dtype=q_absorbed.dtype, device=q_absorbed.device)
    return out, torch.empty(q_absorbed.shape[:-1], dtype=torch.float32, device=q_absorbed.device)


def _programmatic_launch(x: Tensor) -> tuple[bool, dict[str, bool]]:
    """Whether kernels on x's device may start before the kernel in front has ended, and the option
    of such a launch."""
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return pdl, {"launch_pdl": True} if pdl else {}


@torch.library.custom_op("mlra_kernels::latent_decode", mutates_args=())
@_on_its_device
def _latent_decode_op(
    q_absorbed: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    num_branches: int,
    cache_scale: Tensor | None,
    schedule: Tensor,
    splits: Tensor,
    planned: Tensor,
    config: list[int],
    combine: list[int],
) -> tuple[Tensor, Tensor]:
    batch, q_len, latents, heads, dim = q_absorbed.shape
    cfg, rows, programs = DecodeConfig.from_list(config), q_len * heads, schedule.shape[0]
    latent_view, rope_view = reference.split_cache(cache, q_rope.shape[-1])
    fp8 = cache_scale is not None
    scale = cache_scale if fp8 else splits  # any tensor: the kernel reads it for FP8 only
    out, lse = _decode_outputs(q_absorbed)
    if batch == 0:
        return out, lse
    slots = programs + batch
    part_out = q_absorbed.new_empty((slots, latents, rows, dim), dtype=torch.float32)
    part_lse = q_absorbed.new_empty((slots, latents, rows), dtype=torch.float32)
    pdl, launch = _programmatic_launch(q_absorbed)
    grid = (cfg.row_blocks(rows) * latents, programs)
    common = {
        "Q_LEN": q_len, "HEADS": heads, "LATENTS": latents, "GROUPS": latents // num_branches,
        "M": cfg.block_m, "N": cfg.block_n, "D": dim, "R": q_rope.shape[-1],
        "PAGE": cache.shape[1], "FP8": fp8, "STAGES": cfg.num_stages, "num_warps": cfg.num_warps,
        **launch,
    }  # fmt: skip
    scale_log2 = softmax_scale * math.log2(math.e)
    table_sizes = (
        block_table.stride(0),
        -(-block_table.shape[1] * cache.shape[1] // cfg.block_n),
    )
    q_strides = (*q_absorbed.stride()[:4], *q_rope.stride()[:3])
    if cfg.hopper:
        c_desc = tile_descriptor(latent_view, cfg.block_n, dim)
        r_desc = tile_descriptor(rope_view, cfg.block_n, q_rope.shape[-1])
        s_desc = scale_descriptor(scale, cfg.block_n) if fp8 else r_desc
        latent_decode_hopper_kernel[grid](
            q_absorbed, q_rope, c_desc, r_desc, s_desc, block_table, planned, schedule,
            out, lse, part_out, part_lse, scale_log2, *q_strides, *table_sizes,
            WARPS_N=cfg.warps_n, W=cfg.consumers, CONSUMER_REGS=cfg.consumer_registers,
            maxnreg=cfg.max_registers, **common,
        )  # fmt: skip
    else:
        latent_decode_kernel[grid](
            q_absorbed, q_rope, latent_view, rope_view, scale, block_table, planned, schedule,
            out, lse, part_out, part_lse, scale_log2, *q_strides, *latent_view.stride()[:2],
            *rope_view.stride()[:2], *(scale.stride()[:2] if fp8 else (0, 0)),
            *table_sizes, block_table.shape[1], cache.shape[0],
            PRECISION="ieee" if q_absorbed.dtype == torch.float32 else "tf32", PDL=pdl,
            **common,
        )  # fmt: skip
    com = CombineConfig(*combine)
    combine_kernel[(dim // com.columns, -(-latents * rows // com.rows), batch)](
        part_out, part_lse, splits, planned, cache_seqlens, out, lse,
        block_table.shape[1] * cache.shape[1],
        Q_LEN=q_len, HEADS=heads, LATENTS=latents, D=dim,
        X=com.rows, S=com.parts, DB=com.columns, PDL=pdl, num_warps=4, **launch,
    )  # fmt: skip
    return out, lse


_latent_decode_reference_op = torch.library.custom_op(
    "mlra_kernels::latent_decode_reference", reference.latent_decode_reference, mutates_args=()
)


@_latent_decode_op.register_fake
@_latent_decode_reference_op.register_fake
def _latent_decode_fake(q_absorbed: Tensor, *args) -> tuple[Tensor, Tensor]:
    return _decode_outputs(q_absorbed)


def _merge(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, states: int, rows: int) -> None:
    """Launch: row r of `out` becomes the merged rows r, r + rows, ..., `states` of them at most."""
    columns = triton.next_power_of_2(outs.shape[-1])
    few = rows < 512 and states > 4
    merge_states_kernel[(rows if few else -(-rows // 4),)](
        outs, lses, out, lse, states, rows, lses.numel(), D=outs.shape[-1], DB=columns,
        X=1 if few else 4, S=max(4, min(32, 4096 // columns)) if few else 4, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("mlra_kernels::merge_states", mutates_args=())
@_on_its_device
def _merge_states_op(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    states, rows = outs.shape[0], lses[0].numel()
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    if rows == 0:
        return out, lse
    # One loop over many parts waits for memory as often, so they are merged in groups first.
    if states > 16:
        groups = math.isqrt(states - 1) + 1
        part = outs.new_empty((groups, *outs.shape[1:]), dtype=torch.float32)
        part_lse = lses.new_empty((groups, *lses.shape[1:]))
        _merge(outs, lses, part, part_lse, -(-states // groups), groups * rows)
        outs, lses, states = part, part_lse, groups
    _merge(outs, lses, out, lse, states, rows)
    return out, lse


@_merge_states_op.register_fake
def _merge_states_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


@torch.library.custom_op("mlra_kernels::latent_cache_append", mutates_args=("cache", "cache_scale"))
@_on_its_device
def _latent_cache_append_op(
    kv_down: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    cache_scale: Tensor | None,
    latent_scale: float,
    norm_eps: float,
) -> None:
    latents, dim = norm_weight.shape
    rope = kv_down.shape[1] - latents * dim
    latent_view, rope_view = reference.split_cache(cache, rope)
    fp8 = cache_scale is not None
    scale = cache_scale if fp8 else cos  # any tensor: the kernel writes it for FP8 only
    if kv_down.shape[0] == 0:
        return
    pdl, launch = _programmatic_launch(kv_down)
    latent_cache_append_kernel[(kv_down.shape[0], latents + 1)](
        kv_down, norm_weight, cos, sin, positions, slot_mapping, latent_view, rope_view, scale,
        latent_scale, norm_eps, kv_down.stride(0), *latent_view.stride()[:2],
        *rope_view.stride()[:2], *(scale.stride()[:2] if fp8 else (0, 0)),
        cache.shape[0] * cache.shape[1], cos.shape[0],
        L=latents, D=dim, H=rope // 2, PAGE=cache.shape[1], FP8=fp8, PDL=pdl, num_warps=1,
        **launch,
    )  # fmt: skip


_latent_cache_append_reference_op = torch.library.custom_op(
    "mlra_kernels::latent_cache_append_reference",
    reference.latent_cache_append_reference,
    mutates_args=("cache", "cache_scale"),
)


@_latent_cache_append_op.register_fake
@_latent_cache_append_reference_op.register_fake
def _latent_cache_append_fake(*args) -> None:
    return None
