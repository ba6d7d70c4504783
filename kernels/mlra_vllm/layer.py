"""The attention layer that is registered with vLLM: attention over a paged cache of latents.

Letters: L latent heads of the rank, n its branches, h heads of its core, l latent dim, r RoPE dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec

from mlra_kernels.latent_decode.reference import FP8_DTYPE
from mlra_kernels.prefill import keys_at_once
from mlra_vllm.backend import LatentBackend, LatentImpl
from mlra_vllm.checks import FP8
from mlra_vllm.config import MLRAConfig
from mlra_vllm.products import kernels_of_few
from mlra_vllm.shard import Shard


class LatentAttention(nn.Module, AttentionLayerBase):
    """Attention of a rank's heads to its latents, with the up-projections.

    Args:
        tables: cos and sin `[positions, r / 2]` float32, one pair for all layers.
        leads: whether this is the first layer of the served model or of a drafter. It makes the
            schedule of a decoding step for all layers, and allocates the memory of the largest step
            when vLLM measures free memory.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        shard: Shard,
        tables: tuple[Tensor, Tensor],
        prefix: str,
        leads: bool,
    ) -> None:
        super().__init__()
        config: MLRAConfig = vllm_config.model_config.hf_config
        self.layer_name, self.shard, self.leads = prefix, shard, leads
        self.impl = LatentImpl()
        self.latent_dim, self.rope_dim = config.latent_dim, config.qk_rope_head_dim
        self.kv_scale, self.eps = config.kv_scale, config.rms_norm_eps
        self.softmax_scale = config.softmax_scale
        self.cos, self.sin = tables
        self.max_positions = self.cos.size(0)
        self.prompt_keys = keys_at_once(config.qk_nope_head_dim, config.latent_dim)
        self.operators = "mlra_kernels" if self.cos.is_cuda else "torch"
        self.few = self.cos.is_cuda and kernels_of_few(vllm_config)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape), requires_grad=False)

        width = shard.branches * config.latent_dim
        self.kv_norm = weight(shard.latents, config.latent_dim)
        self.w_uk = weight(shard.heads, config.qk_nope_head_dim, width)
        self.w_uv = weight(shard.heads, width, config.v_head_dim)

        self.fp8 = vllm_config.cache_config.cache_dtype in FP8
        numbers = shard.latents * config.latent_dim
        if self.fp8:
            # One byte per number of a latent, the RoPE key in bfloat16, a float32 scale per latent.
            self.cache_dtype, self.stored_dtype = FP8_DTYPE, torch.uint8
            self.row_size = numbers + 2 * self.rope_dim + 4 * shard.latents
        else:
            self.cache_dtype = self.stored_dtype = torch.get_default_dtype()
            self.row_size = numbers + self.rope_dim
        self.kv_cache = torch.empty(0, dtype=self.stored_dtype)
        context = vllm_config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"two attention layers are called {prefix}")
        context[prefix] = self

    @property
    def row_bytes(self) -> int:
        """Cached bytes per token in this layer on this rank."""
        return self.row_size * self.stored_dtype.itemsize

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See AttentionLayerBase."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One row per token, with the rank's own latents. Sharding the cache needs no more."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.row_size,
            dtype=self.stored_dtype,
        )

    def cache_views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows `[pages, page_size, width]` and FP8 scales `[pages, L, page_size]` of the layer.

        The kernels need the rows of all pages to be contiguous. An FP8 layer's allocation therefore
        holds all rows, then all scales. Moving a single page would separate rows from scales, so
        that checks.py refuses connectors and offloading.
        """
        if not self.fp8:
            return kv_cache, None
        pages, page_size, width = kv_cache.shape
        row = width - 4 * self.shard.latents
        flat = kv_cache.view(-1)
        rows = flat[: pages * page_size * row].view(FP8_DTYPE).view(pages, page_size, row)
        scales = flat[pages * page_size * row :].view(torch.float32)
        return rows, scales.view(pages, self.shard.latents, page_size)

    def forward(self, query: Tensor, kv_down: Tensor, positions: Tensor) -> Tensor:
        """Attention of new tokens, summed over the rank's branches.

        Args:
            query: `[T, h, d_h + r]`, rotated.
            kv_down: `[T, L l + r]`, the raw down-projection.
            positions: `[T]` int64.

        Returns:
            `[T, h, d_v]`.
        """
        name = _encode_layer_name(self.layer_name)
        written = torch.ops.vllm.unified_kv_cache_update(kv_down, positions, name)
        output = query.new_empty(query.size(0), query.size(1), self.w_uv.size(2))
        torch.ops.vllm.unified_attention_with_output(
            query, kv_down, positions, output, name, kv_cache_dummy_dep=written
        )
        return output
