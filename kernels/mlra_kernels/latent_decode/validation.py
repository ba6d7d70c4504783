"""Checks of user input: each message names the value and says what to change."""

import torch
from torch import Tensor

from mlra_kernels import checks
from mlra_kernels.checks import FLOAT_DTYPES, INDEX_DTYPES
from mlra_kernels.latent_decode.configs import DecodeConfig
from mlra_kernels.latent_decode.reference import FP8_DTYPE

LATENT_DIMS = (64, 128, 256, 512)
ROPE_DIMS = (32, 64)
MAX_Q_LEN = 8
MAX_MERGED_DIM = 4096


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_cache(cache: Tensor, cache_scale: Tensor | None, num_latents: int, dim: int, rope: int):
    """Raise ValueError unless cache rows hold `num_latents` latents of `dim` and a RoPE key."""
    fp8 = cache.dtype == FP8_DTYPE
    _require(cache.dim() == 3, f"cache has {cache.dim()} dims: give [num_pages, page_size, width]")
    _require(cache.shape[0] > 0, "cache has no page: give at least one")
    width = num_latents * dim + rope * (2 if fp8 else 1)
    _require(
        cache.shape[2] == width,
        f"cache rows hold {cache.shape[2]} elements: {num_latents} latents of {dim} and a "
        f"{'bf16 ' if fp8 else ''}RoPE key of {rope} need {width}",
    )
    _require(
        cache.shape[1] % 16 == 0 and cache.shape[1] > 0,
        f"page size is {cache.shape[1]}: make it a multiple of 16",
    )
    _require(cache.stride(2) == 1, "cache rows are not contiguous: make the last dim contiguous")
    _require(dim in LATENT_DIMS, f"latent dim is {dim}: the kernels take {LATENT_DIMS}")
    _require(rope in ROPE_DIMS, f"RoPE dim is {rope}: the kernels take {ROPE_DIMS}")
    if fp8:
        _require(cache_scale is not None, "an FP8 cache needs cache_scale: pass [pages, L, page]")
        shape = (cache.shape[0], num_latents, cache.shape[1])
        checks.check_tensors(cache=cache, cache_scale=cache_scale)
        _require(cache_scale.is_contiguous(), "cache_scale is not contiguous: call .contiguous()")
        _require(
            cache_scale.shape == shape and cache_scale.dtype == torch.float32,
            f"cache_scale is {tuple(cache_scale.shape)} {cache_scale.dtype}: make it {shape} "
            "float32",
        )
    else:
        _require(
            cache_scale is None, f"cache_scale is given for a {cache.dtype} cache: leave it out"
        )
        _require(
            cache.dtype in FLOAT_DTYPES,
            f"cache dtype is {cache.dtype}: use {FLOAT_DTYPES} or {FP8_DTYPE}",
        )


def check_decode(
    q_absorbed: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    num_branches: int,
    cache_scale: Tensor | None,
) -> None:
    """Raise ValueError for any argument of `latent_decode` that does not fit the others."""
    checks.check_tensors(
        q_absorbed=q_absorbed,
        q_rope=q_rope,
        cache=cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
    )
    checks.check_integer("num_branches", num_branches, 1)
    checks.check_number("softmax_scale", softmax_scale, positive=True)
    _require(
        q_absorbed.dim() == 5 and q_rope.dim() == 4,
        f"q_absorbed and q_rope have {q_absorbed.dim()} and {q_rope.dim()} dims: give "
        "[batch, q_len, L, heads_per_latent, d_l] and [batch, q_len, heads, d_r]",
    )
    batch, q_len, latents, heads, dim = q_absorbed.shape
    checks.check_sizes(latents=latents, heads_per_latent=heads)
    _require(
        latents % num_branches == 0,
        f"num_branches is {num_branches}: it must divide the {latents} latents of q_absorbed",
    )
    shape = (batch, q_len, latents // num_branches * heads)
    _require(
        q_rope.shape[:3] == shape,
        f"q_rope is {tuple(q_rope.shape)}: with {latents} latents, {num_branches} branches and "
        f"{heads} heads a latent it must be {(*shape, q_rope.shape[3])}",
    )
    _require(1 <= q_len <= MAX_Q_LEN, f"q_len is {q_len}: decode 1 to {MAX_Q_LEN} tokens a call")
    _require(
        q_absorbed.stride(-1) == 1 and q_rope.stride(-1) == 1,
        "q_absorbed and q_rope need a contiguous last dim: call .contiguous()",
    )
    check_cache(cache, cache_scale, latents, dim, q_rope.shape[3])
    _require(
        q_absorbed.dtype == q_rope.dtype and q_absorbed.dtype in FLOAT_DTYPES,
        f"q_absorbed is {q_absorbed.dtype}, q_rope {q_rope.dtype}: give both one of {FLOAT_DTYPES}",
    )
    _require(
        cache.dtype in (q_absorbed.dtype, FP8_DTYPE),
        f"cache is {cache.dtype} and queries are {q_absorbed.dtype}: cast one to the other",
    )
    checks.check_paging(block_table, cache_seqlens, batch)


def check_metadata(
    cache_seqlens: Tensor,
    config: DecodeConfig | None,
    sizes: dict[str, int],
    cache_dtype: torch.dtype,
    hopper: bool,
    most: int,
) -> None:
    """Raise ValueError for any argument of `decode_metadata` that no decoding call could use."""
    checks.check_tensors(cache_seqlens=cache_seqlens)
    checks.check_device("cache_seqlens", cache_seqlens)
    _require(
        cache_seqlens.dim() == 1 and cache_seqlens.dtype == torch.int32,
        f"cache_seqlens is {tuple(cache_seqlens.shape)} {cache_seqlens.dtype}: give [b] int32",
    )
    checks.check_contiguous(cache_seqlens=cache_seqlens)
    checks.check_batch(cache_seqlens.shape[0], most)
    for name, value in sizes.items():
        checks.check_integer(name, value, 1, MAX_Q_LEN if name == "q_len" else 2**20)
    dim, page = sizes["latent_dim"], sizes["page_size"]
    _require(dim in LATENT_DIMS, f"latent dim is {dim}: the kernels take {LATENT_DIMS}")
    _require(page % 16 == 0, f"page size is {page}: make it a multiple of 16")
    _require(
        cache_dtype in (*FLOAT_DTYPES, FP8_DTYPE),
        f"cache_dtype is {cache_dtype}: use {FLOAT_DTYPES} or {FP8_DTYPE}",
    )
    _require(
        config is None or isinstance(config, DecodeConfig),
        f"config is a {type(config).__name__}: give a DecodeConfig or leave it out",
    )
    if config is not None and config.hopper:
        _require(
            hopper and cache_dtype != torch.float32,
            f"config has hopper=True for a {cache_dtype} cache on {cache_seqlens.device}: that "
            "kernel takes 16-bit and FP8 caches on Hopper GPUs; pass hopper=False",
        )


def check_append(
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
    """Raise ValueError for any argument of `latent_cache_append` that does not fit the others."""
    checks.check_tensors(
        kv_down=kv_down,
        norm_weight=norm_weight,
        cos=cos,
        sin=sin,
        positions=positions,
        slot_mapping=slot_mapping,
        cache=cache,
    )
    checks.check_number("latent_scale", latent_scale)
    checks.check_number("norm_eps", norm_eps)
    _require(norm_eps >= 0, f"norm_eps is {norm_eps}: give 0 or more")
    checks.check_dtype("kv_down", kv_down, FLOAT_DTYPES)
    checks.check_dtype("norm_weight", norm_weight, FLOAT_DTYPES)
    _require(
        kv_down.dim() == 2 and norm_weight.dim() == 2,
        f"kv_down and norm_weight have {kv_down.dim()} and {norm_weight.dim()} dims: give "
        "[tokens, L * d_l + d_r] and [L, d_l]",
    )
    latents, dim = norm_weight.shape
    checks.check_sizes(latents=latents)
    rope = kv_down.shape[1] - latents * dim
    _require(
        rope > 0,
        f"kv_down has {kv_down.shape[1]} columns: {latents} latents of {dim} leave no RoPE key",
    )
    check_cache(cache, cache_scale, latents, dim, rope)
    _require(kv_down.stride(1) == 1, "kv_down needs a contiguous last dim: call .contiguous()")
    _require(norm_weight.is_contiguous(), "norm_weight is not contiguous: call .contiguous()")
    checks.check_rope_tables(cos, sin, rope // 2, "positions")
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        _require(
            index.shape == kv_down.shape[:1] and index.dtype in INDEX_DTYPES,
            f"{name} is {tuple(index.shape)} {index.dtype}: give [{kv_down.shape[0]}] int32 or "
            "int64",
        )
        _require(index.is_contiguous(), f"{name} is not contiguous: call .contiguous()")


def check_merge(outs: Tensor, lses: Tensor) -> None:
    """Raise ValueError unless outs is `[S, ..., d]` and lses `[S, ...]` fp32."""
    checks.check_tensors(outs=outs, lses=lses)
    checks.check_dtype("outs", outs, FLOAT_DTYPES)
    _require(
        outs.dim() >= 2 and lses.shape == outs.shape[:-1] and lses.dtype == torch.float32,
        f"outs is {tuple(outs.shape)} and lses {tuple(lses.shape)} {lses.dtype}: give [S, ..., d] "
        "and [S, ...] float32",
    )
    checks.check_sizes(sets_of_tokens=outs.shape[0])
    _require(
        1 <= outs.shape[-1] <= MAX_MERGED_DIM,
        f"d is {outs.shape[-1]}: give 1 to {MAX_MERGED_DIM}",
    )
