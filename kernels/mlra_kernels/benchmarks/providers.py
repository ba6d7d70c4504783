"""What the decoding kernel is measured against: each provider is (name, fits?, build).

`build(workload)` returns one call per block table, ready to be timed; each call returns (out, lse)
in the layout of `latent_decode`, or (out, None).
"""

import importlib.util
from collections.abc import Callable

import torch

from mlra_kernels.benchmarks.workload import Workload
from mlra_kernels.latent_decode import decode_metadata, latent_decode

Calls = list[Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]
SDPA_MAX_BYTES = 4 << 30  # gathered copies beyond this are not worth a benchmark's memory


def mlra_calls(w: Workload) -> Calls:
    """All latents of the rank in one launch, one schedule for all calls."""
    s = w.shape
    metadata = decode_metadata(
        w.cache_seqlens, q_len=s.q_len, num_latents=s.num_latents, heads_per_latent=s.heads,
        latent_dim=s.latent_dim, cache_dtype=w.cache.dtype, page_size=s.page_size,
    )  # fmt: skip

    def call(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return latent_decode(
            w.q_absorbed, w.q_rope, w.cache, table, w.cache_seqlens, w.softmax_scale,
            num_branches=s.num_branches, cache_scale=w.cache_scale, metadata=metadata,
        )  # fmt: skip

    return [lambda table=table: call(table) for table in w.tables]


def sdpa_calls(w: Workload) -> Calls:
    """torch SDPA on a cache gathered beforehand (not timed), heads as query rows."""
    s = w.shape
    calls: Calls = []
    for table in w.tables:
        rows = w.cache[table.long()].flatten(1, 2)[:, None, : s.length]  # [b, 1, t, D + R]
        value = rows[..., : s.latent_dim].contiguous()
        query = torch.cat([w.q_absorbed[:, 0, 0], w.q_rope[:, 0]], dim=-1)[:, None]

        def call(query=query, rows=rows, value=value):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, rows, value, scale=w.softmax_scale
            )
            return out.view(s.batch, 1, 1, s.heads, s.latent_dim), None

        calls.append(call)
    return calls


def flash_attention_calls(w: Workload) -> Calls:
    """FlashAttention-3 (`flash_attn_interface`) on the same paged cache, one latent."""
    from flash_attn_interface import flash_attn_with_kvcache

    s = w.shape
    keys, values = w.cache[:, :, None], w.cache[:, :, None, : s.latent_dim]
    query = torch.cat([w.q_absorbed[:, :, 0], w.q_rope], dim=-1)  # [b, q, j, D + R]

    def call(table: torch.Tensor):
        out = flash_attn_with_kvcache(
            query, keys, values, cache_seqlens=w.cache_seqlens, page_table=table,
            softmax_scale=w.softmax_scale, causal=True,
        )  # fmt: skip
        return out[:, :, None], None

    return [lambda table=table: call(table) for table in w.tables]


def has_one_plain_latent(w: Workload) -> bool:
    """Whether a provider that knows neither latents nor FP8 scales can run the workload."""
    return w.shape.num_latents == 1 and not w.shape.fp8


def fits_sdpa(w: Workload) -> bool:
    """Whether the gathered cache is small enough to copy."""
    copies = len(w.tables) * w.shape.cache_bytes
    return has_one_plain_latent(w) and w.shape.q_len == 1 and copies <= SDPA_MAX_BYTES


PROVIDERS: list[tuple[str, Callable[[Workload], bool], Callable[[Workload], Calls]]] = [
    ("mlra_kernels", lambda w: True, mlra_calls),
    ("torch SDPA, gathered", fits_sdpa, sdpa_calls),
]
if importlib.util.find_spec("flash_attn_interface"):
    PROVIDERS.append(("FlashAttention-3", has_one_plain_latent, flash_attention_calls))
