"""Providers: this project's decoding kernels and other libraries, on the same paged cache.

A provider's `build(workload)` returns one call per block table, ready to be timed. Each call
returns (out, lse) in the layout of this project's kernel, or (out, None).

The other libraries are FlashInfer 0.6 and 0.7, FlashAttention 3, and FlashAttention 4 (4.0.0b36).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlra_kernels.benchmarks import report
from mlra_kernels.benchmarks.workload import Workload
from mlra_kernels.latent_decode import decode_metadata, latent_decode

Calls = list[Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]
SDPA_MAX_BYTES = 4 << 30
"""Most bytes of gathered caches for torch SDPA."""
WORKSPACE_BYTES = 128 << 20
"""Workspace that FlashInfer asks for."""
FLASHINFER_VERSIONS = ("0.6.", "0.7.")
FLASH_MAX_DIM = 256
"""FlashAttention 4's largest head dim on Hopper."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload."""

    name: str
    fits: Callable[[Any], bool]
    """Whether the provider can compute a workload."""
    build: Callable[[Any], Calls]
    missing: Callable[[], str | None] = lambda: None
    """Returns why the provider cannot be used here, and the fix, in one line; None if it can."""


def parse(
    flags: argparse.ArgumentParser, providers: Sequence[Provider]
) -> tuple[argparse.Namespace, list[Provider]]:
    """The parsed flags, with `--providers` added, and the providers to measure."""
    names = [provider.name for provider in providers]
    flags.add_argument("--providers", nargs="+", choices=names, help="default: all that run here")
    args = report.parse(flags)
    try:
        return args, chosen(providers, args.providers)
    except ValueError as error:
        sys.exit(f"error: {error}")


def chosen(providers: Sequence[Provider], names: Sequence[str] | None) -> list[Provider]:
    """The providers of these names, or all that can be used here; prints which cannot.

    Raises:
        ValueError: a named provider cannot be used here.
    """
    if names is None:
        for provider in providers:
            if said := provider.missing():
                print(f"without {provider.name}: {said}", flush=True)
        return [provider for provider in providers if not provider.missing()]
    found = [provider for provider in providers if provider.name in names]
    for provider in found:
        if said := provider.missing():
            raise ValueError(f"--providers {provider.name!r}: {said}")
    return found


def left_out(label: str, provider: Provider, problem: Exception) -> None:
    """Print in one line that, and why, another library has no result.

    Raises:
        SystemExit: the library broke this process's use of the GPU, so nothing can follow.
    """
    said = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
    print(f"{label:26} {provider.name:22} left out: {said}", flush=True)
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        sys.exit(
            f"error: {provider.name} at {label} broke this process's use of the GPU; measure"
            " without it: name the others behind --providers"
        )


def without(module: str, way: str) -> Callable[[], str | None]:
    """A function that says why a module cannot be imported, and the way to get it, or None."""

    def missing() -> str | None:
        try:
            found = importlib.util.find_spec(module)  # imports the packages around the module
        except Exception as error:  # of whatever those packages need
            around = isinstance(error, ModuleNotFoundError) and error.name
            if not around or not f"{module}.".startswith(f"{around}."):
                said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                return f"{module} cannot be imported ({said}); {way}"
            found = None
        return None if found else f"{module} is not installed; {way}"

    return missing


def without_flashinfer() -> str | None:
    """Why FlashInfer's wrappers cannot be called, or None."""
    if said := without("flashinfer", "pip install flashinfer-python")():
        return said
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    if not version.startswith(FLASHINFER_VERSIONS):
        return f"flashinfer is {version}; install 0.6 or 0.7 (pip install 'flashinfer-python<0.8')"
    return None


without_flash_attention_3 = without(
    "flash_attn_interface", "build the hopper folder of flash-attention"
)
without_flash_attention_4 = without("flash_attn.cute", "pip install --pre flash-attn-4")


def mlra_calls(w: Workload) -> Calls:
    """This project's kernel: all latents of the rank in one launch, one schedule for all calls."""
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
    """torch SDPA on a gathered cache (the gathering is not timed), with heads as query rows."""
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


def _as_grouped(w: Workload) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[b, q, j, D + R]`, keys and values `[pages, page_size, 1, ...]` of one latent."""
    query = torch.cat([w.q_absorbed[:, :, 0], w.q_rope], dim=-1)
    return query, w.cache[:, :, None], w.cache[:, :, None, : w.shape.latent_dim]


def flash_attention_3(query, keys, values, table, seqlens, scale) -> torch.Tensor:
    """FlashAttention 3: `[b, q, h, e]` on keys and values `[pages, page_size, k, ...]`."""
    from flash_attn_interface import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        query, keys, values, cache_seqlens=seqlens, page_table=table, softmax_scale=scale,
        causal=True,
    )  # fmt: skip


def flash_attention_4(query, keys, values, table, seqlens, scale) -> torch.Tensor:
    """FlashAttention 4, arguments as above. On Hopper it cannot split a sequence over programs."""
    from flash_attn.cute import flash_attn_varlen_func

    hopper = torch.cuda.get_device_capability(query.device)[0] == 9
    out = flash_attn_varlen_func(
        query, keys, values, seqused_k=seqlens, page_table=table, softmax_scale=scale,
        causal=query.shape[1] > 1, num_splits=1 if hopper else 0,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


def flash_calls(run: Callable[..., torch.Tensor]) -> Callable[[Workload], Calls]:
    """The function `build` for one latent by a FlashAttention: the heads are queries of one key
    head."""

    def build(w: Workload) -> Calls:
        query, keys, values = _as_grouped(w)

        def call(table: torch.Tensor):
            out = run(query, keys, values, table, w.cache_seqlens, w.softmax_scale)
            return out[:, :, None], None

        return [lambda table=table: call(table) for table in w.tables]

    return build


def page_lists(tables: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(Start of each sequence's pages `[b + 1]` int32, all pages of a block table)."""
    starts = torch.arange(batch + 1, dtype=torch.int32, device=tables.device) * tables.shape[1]
    return starts, tables.flatten().contiguous()


def flashinfer_mla_calls(w: Workload, backend: str = "auto") -> Calls:
    """FlashInfer's MLA wrapper, planned once per block table (not timed).

    Args:
        backend: "auto" (on Hopper its kernels for Hopper) or "fa2" (its portable kernels).
    """
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    s, device = w.shape, w.cache.device
    parts = {
        "q_nope": w.q_absorbed[:, :, 0].flatten(0, 1).contiguous(),  # [b q, j, D]
        "q_pe": w.q_rope.flatten(0, 1).contiguous(),
        "ckv_cache": w.cache[..., : s.latent_dim],
        "kpe_cache": w.cache[..., s.latent_dim :],
    }
    queries = torch.arange(s.batch + 1, dtype=torch.int32, device=device) * s.q_len
    calls: Calls = []
    for table in w.tables:
        starts, pages = page_lists(table, s.batch)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = BatchMLAPagedAttentionWrapper(workspace, backend=backend)
        wrapper.plan(
            qo_indptr=queries, kv_indptr=starts, kv_indices=pages, kv_len_arr=w.cache_seqlens,
            num_heads=s.heads, head_dim_ckv=s.latent_dim, head_dim_kpe=s.rope_dim,
            page_size=s.page_size, causal=s.q_len > 1, sm_scale=w.softmax_scale,
            q_data_type=w.cache.dtype, kv_data_type=w.cache.dtype,
        )  # fmt: skip

        def call(wrapper=wrapper):
            return wrapper.run(**parts).view(s.batch, s.q_len, 1, s.heads, s.latent_dim), None

        calls.append(call)
    return calls


def has_one_plain_latent(w: Workload) -> bool:
    """Whether a provider without latent heads and FP8 scales can compute the workload."""
    return w.shape.num_latents == 1 and not w.shape.fp8


def has_wide_plain_latent(w: Workload) -> bool:
    """As above, with the latent dim that FlashInfer's kernels for Hopper are made for: with 128,
    0.6.13 ended in an illegal memory access on one H200."""
    return has_one_plain_latent(w) and w.shape.latent_dim == 512


def has_small_plain_latent(w: Workload) -> bool:
    """With a smaller latent dim."""
    return has_one_plain_latent(w) and w.shape.latent_dim < 512


def fits_sdpa(w: Workload) -> bool:
    """Whether the gathered cache is small enough to copy."""
    copies = len(w.tables) * w.shape.cache_bytes
    return has_one_plain_latent(w) and w.shape.q_len == 1 and copies <= SDPA_MAX_BYTES


def fits_flash_attention_4(w: Workload) -> bool:
    """Whether a latent with its RoPE key fits the largest head dim of FlashAttention 4."""
    return has_one_plain_latent(w) and w.shape.latent_dim + w.shape.rope_dim <= FLASH_MAX_DIM


PROVIDERS = [
    Provider("mlra_kernels", lambda w: True, mlra_calls),
    Provider("torch SDPA, gathered", fits_sdpa, sdpa_calls),
    Provider(
        "FlashInfer MLA", has_wide_plain_latent, flashinfer_mla_calls, without_flashinfer
    ),
    Provider(
        "FlashAttention-3", has_one_plain_latent, flash_calls(flash_attention_3),
        without_flash_attention_3,
    ),
    Provider(
        "FlashAttention-4", fits_flash_attention_4, flash_calls(flash_attention_4),
        without_flash_attention_4,
    ),
    Provider(
        "FlashInfer MLA, fa2", has_small_plain_latent,
        lambda w: flashinfer_mla_calls(w, "fa2"), without_flashinfer,
    ),
]  # fmt: skip
