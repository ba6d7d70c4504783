"""The attention backend: metadata of a step, layout of the cache, computation of a step.

Letters: T tokens, b sequences, q query tokens per sequence, h heads of the rank's core, L its
latent heads, n its branches, l latent dim, r RoPE dim, d_h and d_v sizes of a head's key (without
RoPE) and value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from mlra_kernels.absorption import absorb_queries, sum_branches
from mlra_kernels.latent_decode import (
    DecodeMetadata,
    decode_metadata,
    latent_cache_append,
    latent_decode,
)
from mlra_kernels.prefill import prefill_latent
from mlra_kernels.products import ops as products
from mlra_kernels.products.configs import few
from mlra_kernels.prompts import EVERY_BUILD, Bundle, PromptChunk, plan_prompts
from mlra_vllm.checks import PAGE_MULTIPLE

HOPPER_PAGE = 64
"""Hopper's fast kernel needs pages of a multiple of this many tokens."""


class LatentBackend(AttentionBackend):
    """Pages of latents and one RoPE key, read in place by the project's kernels."""

    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "MLRA_LATENT"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        # vLLM takes this on a GPU if the user gives no block size.
        return HOPPER_PAGE

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, head_size)


@dataclass
class LatentMetadata:
    """Metadata of a step: decoding sequences first, then chunks of prompts."""

    decodes: int
    decode_tokens: int
    block_table: Tensor
    """`[b, max_pages]` int32 of the decoding sequences."""
    lengths: Tensor
    """`[b]` int32 of the decoding sequences, the new tokens included."""
    schedule: DecodeMetadata | None
    """The kernels' schedule, made by the first layer; None for the reference."""
    prompts: tuple[Bundle, ...]
    """Bundles of the rows after those of the decoding sequences."""
    prompt_tokens: int


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds a step's metadata. Buffers of captured steps keep their addresses."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        context = vllm_config.compilation_config.static_forward_context
        self.layer = context[layer_names[0]]
        self.page_size = kv_cache_spec.block_size
        self.speculative = vllm_config.speculative_config is not None
        self._schedules: dict[tuple[int, int], DecodeMetadata] = {}

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        common = common_attn_metadata
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, self.reorder_batch_threshold, require_uniform=True
        )
        lengths = common.seq_lens[:decodes]
        chunks = self._chunks(common, decodes) if prefills else []
        return LatentMetadata(
            decodes=decodes,
            decode_tokens=decode_tokens,
            block_table=common.block_table_tensor[:decodes],
            lengths=lengths,
            schedule=self._schedule(lengths, decode_tokens),
            prompts=plan_prompts(chunks, self.page_size, self.layer.prompt_keys),
            prompt_tokens=sum(chunk.tokens for chunk in chunks),
        )

    def _chunks(self, common: CommonAttentionMetadata, decodes: int) -> list[PromptChunk]:
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound  # exact for prompts
        if lengths is None or self.speculative:
            # Sequences with different numbers of speculative tokens are prompts here too, and
            # their upper bound may be too high.
            lengths = common.seq_lens.cpu()
        lengths = lengths.tolist()
        chunks = []
        for i in range(decodes, common.num_reqs):
            tokens = starts[i + 1] - starts[i]
            if tokens:
                pages = common.block_table_tensor[i, : -(-lengths[i] // self.page_size)]
                chunks.append(PromptChunk(tokens, lengths[i] - tokens, pages))
        return chunks

    def _schedule(self, lengths: Tensor, tokens: int) -> DecodeMetadata | None:
        """The schedule of a batch size, which the first layer updates in place: see `_decode`."""
        batch = lengths.size(0)
        if not batch or not lengths.is_cuda:
            return None
        key = (batch, tokens // batch)
        if key not in self._schedules:
            shard, layer = self.layer.shard, self.layer
            self._schedules[key] = decode_metadata(
                lengths,
                q_len=key[1],
                num_latents=shard.latents,
                heads_per_latent=shard.heads // shard.groups,
                latent_dim=layer.latent_dim,
                cache_dtype=layer.cache_dtype,
                page_size=self.page_size,
            )
        return self._schedules[key]


class LatentImpl:
    """The two operations that vLLM calls for an attention layer: the cache write and the attention.

    Has no state: all sizes and weights come from the layer (`layer.LatentAttention`).
    """

    @staticmethod
    def do_kv_cache_update(
        layer, kv_down: Tensor, positions: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        """Normalise, rotate and cache new tokens.

        Args:
            kv_down: `[T, L l + r]`, the raw down-projection.
            positions: `[T]` int64.
            slots: `[tokens]` int64, page * page_size + offset; -1 for padding, which is not
                written. (A boolean mask would break the capture of CUDA graphs.)
        """
        rows, scales = layer.cache_views(kv_cache)
        latent_cache_append(
            kv_down[: slots.size(0)],
            layer.kv_norm,
            layer.cos,
            layer.sin,
            positions[: slots.size(0)],
            slots,
            rows,
            latent_scale=layer.kv_scale,
            norm_eps=layer.eps,
            cache_scale=scales,
            backend=layer.operators,
        )

    @staticmethod
    def forward(
        layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LatentMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> None:
        """Attention of queries `[T, h, d_h + r]` to the cache, summed over branches and written
        into `output` `[T, h, d_v]`."""
        if attn_metadata is None:
            output.zero_()
            # Without a cache vLLM measures memory; with one it captures the parts between
            # attentions.
            if layer.leads and not kv_cache.numel():
                _reserve(layer, query)
            return
        cache, end = layer.cache_views(kv_cache), attn_metadata.decode_tokens
        if attn_metadata.decodes:
            _decode(layer, query[:end], cache, attn_metadata, output[:end])
        if attn_metadata.prompts:
            rows = slice(end, end + attn_metadata.prompt_tokens)
            output[rows] = _prefill(layer, query[rows], cache, attn_metadata.prompts)


def _decode(
    layer,
    q: Tensor,
    cache: tuple[Tensor, Tensor | None],
    step: LatentMetadata,
    output: Tensor,
) -> None:
    """Queries `[b q, h, d_h + r]` -> `[b q, h, d_v]`, written into output."""
    shard, rows, scales = layer.shard, *cache
    if layer.leads and step.schedule is not None:
        # Here and not in the builder: a captured step then makes it on the GPU at every replay, and
        # the host, which bounds short steps, does nothing. A drafter's steps change the lengths.
        step.schedule.update(step.lengths)
    nope = q.size(-1) - layer.rope_dim
    absorb, add_up = absorb_queries, sum_branches
    if layer.few and few(q.size(0)):
        absorb = functools.partial(products.absorb_queries, early=True)
        add_up = functools.partial(products.sum_branches, early=True)
    head = absorb(q[..., :nope], layer.w_uk, shard.branches)  # [b q, n, h, l]
    head = head.reshape(step.decodes, -1, shard.latents, shard.heads // shard.groups, head.size(-1))
    z, _ = latent_decode(
        head,
        q[..., nope:].unflatten(0, (step.decodes, -1)),
        rows,
        step.block_table,
        step.lengths,
        layer.softmax_scale,
        num_branches=shard.branches,
        cache_scale=scales,
        metadata=step.schedule,
        backend=layer.operators,
    )
    add_up(z.view(q.size(0), shard.branches, shard.heads, -1), layer.w_uv, out=output)


def _prefill(
    layer, q: Tensor, cache: tuple[Tensor, Tensor | None], prompts: tuple[Bundle, ...]
) -> Tensor:
    """Queries `[T, h, d_h + r]` of the prompts' tokens -> `[T, h, d_v]`."""
    return prefill_latent(
        q,
        cache,
        prompts,
        w_uk=layer.w_uk,
        w_uv=layer.w_uv,
        rope_dim=layer.rope_dim,
        branches=layer.shard.branches,
        softmax_scale=layer.softmax_scale,
    )


def _reserve(layer, q: Tensor) -> None:
    """Allocate as much as the largest prompt step does, for vLLM's measurement of free memory.

    vLLM measures a step without metadata, and gives the remaining memory to the cache. The largest
    step is a single chunk with a history that needs a second launch and a merge, or that is as long
    as a sequence can be. All its pages are one and the same page.
    """
    page_size, limit = HOPPER_PAGE, layer.prompt_keys
    tokens = min(q.size(0), layer.max_positions)
    start = min(limit + max(limit - tokens, 0), layer.max_positions - tokens)
    page = torch.zeros(page_size * layer.row_bytes, dtype=torch.uint8, device=q.device)
    cache = layer.cache_views(page.view(layer.stored_dtype).view(1, page_size, -1))
    pages = torch.zeros(-(-(start + tokens) // page_size), dtype=torch.int64, device=q.device)
    chunk = PromptChunk(tokens, start, pages)
    _prefill(layer, q[:tokens], cache, plan_prompts([chunk], page_size, limit))
    # Several prompts in one launch need other builds of the kernel, which are compiled here, before
    # requests come.
    for length in EVERY_BUILD:
        some = [PromptChunk(length, 0, pages[: -(-length // page_size)])] * 2
        if 2 * length <= tokens:
            _prefill(layer, q[: 2 * length], cache, plan_prompts(some, page_size, limit))
