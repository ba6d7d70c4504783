"""Attention of MLA, GLA and MLRA models, which caches latents and one RoPE key per token.

Method: Liu, Peng, Zhang, Chen, Guo, "Multi-Head Low-Rank Attention", arXiv 2603.02188. Letters: b
batch, s new tokens, t all tokens, d hidden size, h heads, n branches, g head groups, L = n g latent
heads, l latent dim, r RoPE dim, d_h NoPE dim, d_v value dim of a head. Latent head
`branch * g + group` serves heads `[group * h / g, (group + 1) * h / g)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mlra import MLRAConfig
from .paged_cache_mlra import PagedStep


class MLRARMSNorm(nn.Module):
    """RMSNorm of each of `parts` equal parts of the last dim, times `scale`, in float32."""

    def __init__(self, size: int, eps: float, parts: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.parts, self.scale = eps, parts, scale

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> the same shape and dtype."""
        wide = x.float().unflatten(-1, (self.parts, -1))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide.flatten(-2) * (self.weight.float() * self.scale)).to(x.dtype)


def rope_cos_sin(config: MLRAConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[b, s, r / 2]` float32 of positions `[b, s]`, times YaRN's factor, if any."""
    rope, device = config.rope_parameters, position_ids.device
    if rope["rope_type"] == "yarn":
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, device)
    else:
        exponent = torch.arange(0, config.qk_rope_head_dim, 2, device=device).float()
        frequencies = 1.0 / (rope["rope_theta"] ** (exponent / config.qk_rope_head_dim))
        factor = 1.0
    angle = position_ids[..., None].float() * frequencies.float()
    return angle.cos() * factor, angle.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r / 2) of x `[b, s, ..., r]` by cos, sin `[b, s, r / 2]`.

    Returns:
        the rotated x, of the same shape and dtype.
    """
    shape = (*cos.shape[:2], *(1,) * (x.dim() - 3), cos.size(-1))
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """softmax(scaling q k^T) v with grouped queries, in plain torch.

    Args:
        query: `[b, heads, s, e]`.
        key: `[b, kv_heads, t, e]`.
        value: `[b, kv_heads, t, d_v]`.
        attention_mask: None, or added to the scores `[b, heads, s, t]`.

    Returns:
        outputs `[b, s, heads, d_v]` and weights `[b, heads, s, t]`, in the dtype of the queries.
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionCore(nn.Module):
    """softmax(softmax_scale q k^T) v by the attention implementation that the config names.

    Args:
        groups: query heads per key head.
    """

    is_causal = True

    def __init__(self, config: MLRAConfig, layer_idx: int, groups: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.num_key_value_groups = config, layer_idx, groups

    def forward(self, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Query `[b, heads, s, e]`, key and value `[b, kv_heads, t, e]` -> outputs
        `[b, s, heads, e]`, and weights if the implementation returns them."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        return attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.config.softmax_scale,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )


class LatentUpProjection(nn.Module):
    """W_UK and W_UV of every (branch, head) pair: `weight` `[n, h, d_h + d_v, l]`, keys first.

    Other modules call this one and never read `weight`: libraries that offload or shard weights
    (accelerate's device_map, FSDP, ZeRO-3) have a weight in place during `forward` alone.
    """

    def __init__(self, config: MLRAConfig) -> None:
        super().__init__()
        self.sizes = (config.qk_nope_head_dim, config.v_head_dim)
        shape = (config.num_branches, config.num_attention_heads, sum(self.sizes))
        self.weight = nn.Parameter(torch.empty(*shape, config.latent_dim))

    def forward(self, x: Tensor, use: str) -> Tensor:
        """One of three products, chosen by `use`.

        - "absorb": queries `[b, s, h, d_h]` -> queries in latent space `[b, s, n, h, l]`
        - "sum": attended latents `[b, s, n, h, l]` -> values summed over branches `[b, s, h, d_v]`
        - "expand": latents `[b, t, n, g, l]` -> keys and values of every branch and head
          `[b, t, n, h, d_h + d_v]`
        """
        if use == "expand":
            weight = self.weight.unflatten(1, (x.size(3), -1))  # [n, g, h / g, d_h + d_v, l]
            return torch.einsum("btngl,ngjel->btngje", x, weight).flatten(3, 4)
        keys, values = self.weight.split(self.sizes, dim=2)  # [n, h, d_h, l], [n, h, d_v, l]
        if use == "absorb":
            return torch.einsum("bshd,nhdl->bsnhl", x, keys)
        return torch.einsum("bsnhl,nhvl->bshv", x, values)


class MLRAAttention(nn.Module):
    """Multi-head low-rank attention; caches L * l + r numbers per token: latents and a RoPE key.

    Attention to the cache runs in latent space, as grouped-query attention with L key heads: the
    key of a latent head is `[latent | RoPE key]`, and the value is the latent. A forward without
    past expands keys and values instead where expanding is cheaper, i.e. where l > d_h.
    """

    def __init__(self, config: MLRAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.rotates = config.layer_rotates(layer_idx)
        d, h, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        query_size = h * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(d, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=False)
            self.q_a_layernorm = MLRARMSNorm(config.q_lora_rank, eps, scale=config.q_scale)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        if config.query_head_norm:
            self.query_head_norm = MLRARMSNorm(query_size, eps, parts=h)
        row = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(d, row, bias=False)
        self.kv_a_layernorm = MLRARMSNorm(
            config.kv_lora_rank, eps, config.num_latent_heads, config.kv_scale
        )
        self.kv_b_proj = LatentUpProjection(config)
        if config.output_gate:
            self.g_proj = nn.Linear(d, h * config.v_head_dim, bias=False)
        self.o_proj = nn.Linear(h * config.v_head_dim, d, bias=False)
        self.absorbed_core = AttentionCore(config, layer_idx, h // config.num_head_groups)
        self.expanded_core = AttentionCore(config, layer_idx, 1)

    def forward(
        self,
        hidden_states: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        step: PagedStep | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """`[b, s, d]` -> the same shape, and the attention weights.

        Args:
            cos_sin: of `rope_cos_sin`.
            attention_mask: as the attention implementation takes it; unused where `step` runs in
                the kernels.
            past_key_values: transformers' cache, extended in place; None for no cache.
            step: the step over a paged cache, used instead of `past_key_values`; None without one.

        Returns:
            outputs `[b, s, d]`; weights `[b, n h, s, t]` of the eager implementation, else None.
        """
        q_nope, q_rope, rows = self.compress(hidden_states, cos_sin)
        weights = None
        if step is not None:
            rows = step.append(rows, self.layer_idx)
        elif past_key_values is not None:
            # The cache's keys are the rows. Values are parts of the rows, so none are stored.
            empty = rows.new_empty(*rows.shape[:2], 0).unsqueeze(1)
            rows, _ = past_key_values.update(rows.unsqueeze(1), empty, self.layer_idx)
            rows = rows.squeeze(1)
        if rows is None:
            out = self._attend_pages(q_nope, q_rope, step)
        else:
            no_past = rows.size(1) == q_nope.size(1)
            expand = no_past and self.config.latent_dim > self.config.qk_nope_head_dim
            attend = self._expanded if expand else self._absorbed
            out, weights = attend(q_nope, q_rope, rows, attention_mask, **kwargs)
        out = (out * self.config.branch_scale).flatten(2)  # [b, s, h * d_v]
        if self.config.output_gate:
            out = out * torch.sigmoid(self.g_proj(hidden_states).float()).to(out.dtype)
        return self.o_proj(out), weights

    def compress(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """NoPE queries `[b, s, h, d_h]`, RoPE queries `[b, s, h, r]` and cache rows
        `[b, s, L * l + r]` of hidden states `[b, s, d]`."""
        config = self.config
        if not self.rotates:
            cos_sin = torch.ones_like(cos_sin[0]), torch.zeros_like(cos_sin[1])
        if config.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        if config.query_head_norm:
            q = self.query_head_norm(q)
        q = q.unflatten(-1, (config.num_attention_heads, -1))
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        q_nope, q_rope = q.split((nope, rope), dim=-1)
        latents, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, rope), dim=-1)
        rows = torch.cat((self.kv_a_layernorm(latents), apply_rope(k_rope, *cos_sin)), dim=-1)
        return q_nope, apply_rope(q_rope, *cos_sin), rows

    def split_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[b, t, n, g, l]` and RoPE keys `[b, t, r]` of cache rows."""
        config = self.config
        latents, k_rope = rows.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        return latents.unflatten(-1, (config.num_branches, config.num_head_groups, -1)), k_rope

    def _absorb(self, q_nope: Tensor) -> Tensor:
        """Queries in latent space, `[b, s, n, h, l]`."""
        return self.kv_b_proj(q_nope, "absorb")

    def _sum_branches(self, z: Tensor) -> Tensor:
        """sum_n z_n W_UV_n: `[b, s, n, h, l]` -> `[b, s, h, d_v]`."""
        return self.kv_b_proj(z, "sum")

    def _attend_pages(self, q_nope: Tensor, q_rope: Tensor, step: PagedStep) -> Tensor:
        """Absorbed attention to the paged cache by the kernels."""
        q = self._absorb(q_nope)
        z = step.attend(
            q.reshape(*q.shape[:2], self.config.num_latent_heads, -1, q.size(-1)),
            q_rope,
            self.layer_idx,
        )
        return self._sum_branches(z.reshape(q.shape))

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        q = self._absorb(q_nope)
        q_rope = q_rope.unsqueeze(2).expand(-1, -1, q.size(2), -1, -1)
        query = torch.cat((q, q_rope), dim=-1).flatten(2, 3).transpose(1, 2)  # [b, n h, s, l + r]
        latents, k_rope = self.split_rows(rows)
        k_rope = k_rope[:, :, None, None].expand(*latents.shape[:-1], -1)
        key = torch.cat((latents, k_rope), dim=-1).flatten(2, 3).transpose(1, 2)  # [b, L, t, l + r]
        # The values are the latents. Fused kernels need keys and values of one width, so whole rows
        # are passed as values, and the RoPE part of the result is dropped.
        z, weights = self.absorbed_core(query, key, key, mask, **kwargs)
        z = z[..., : q.size(-1)].unflatten(2, q.shape[2:4])
        return self._sum_branches(z), weights

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        latents, k_rope = self.split_rows(rows)
        n = latents.size(2)
        expanded = self.kv_b_proj(latents, "expand")
        k_nope, value = expanded.split(self.kv_b_proj.sizes, dim=-1)  # [b, t, n, h, .]
        k_rope = k_rope[:, :, None, None].expand(*k_nope.shape[:-1], -1)
        key = torch.cat((k_nope, k_rope), dim=-1)
        query = torch.cat((q_nope, q_rope), dim=-1).unsqueeze(2).expand(-1, -1, n, -1, -1)
        width = max(key.size(-1), value.size(-1))  # fused kernels want one width
        query, key, padded = (
            pad(x, (0, width - x.size(-1))).flatten(2, 3).transpose(1, 2)
            for x in (query, key, value)
        )
        out, weights = self.expanded_core(query, key, padded, mask, **kwargs)
        return out[..., : value.size(-1)].unflatten(2, (n, -1)).sum(2), weights
