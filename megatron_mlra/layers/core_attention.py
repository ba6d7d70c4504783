"""Backends of the core attention: torch's, and this project's on Hopper. Transformer Engine's is in
transformer_engine.py.

Each backend takes query `[s, b, heads, d_k]`, key `[t, b, kv_heads, d_k]` and value
`[t, b, kv_heads, d_v]` (grouped queries) and returns `[s, b, heads * d_v]`. A TokenPlan says which
of the t keys each of the s queries attends to; without a plan, s = t and attention is causal.
specs.py alone chooses the backend. `largest` keeps each query head's largest logit if the training
asks for it (logits.py).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.layers.logits import LargestLogits
from megatron_mlra.maths.logits import largest_logits
from megatron_mlra.sharding.token_plan import TokenPlan


class _CoreAttention(MegatronModule):
    """The constructor that Megatron expects of a core attention."""

    def __init__(
        self,
        config: MLRAConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.largest = LargestLogits()


class SDPACoreAttention(_CoreAttention):
    """Causal attention by torch, on CPU and CUDA.

    Raises:
        ValueError: for packed sequences and attention biases, which need another backend.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        plan: TokenPlan | None = None,
    ) -> Tensor:
        """See the module's docstring. `attention_mask` `[b or 1, 1, s, t]` bool, True where not
        attended to, replaces the plan (reset attention masks)."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError(
                "core_backend torch takes neither packed sequences nor attention biases"
            )
        allowed = None if attention_mask is None else ~attention_mask
        if self.largest.wanted_of(self):
            # torch's fused kernels do not report the largest logit.
            spans = None if plan is None else plan.spans
            self.largest.add(largest_logits(query, key, self.softmax_scale, spans, allowed))
        d_v = value.size(-1)
        # torch's fused kernels want one head dim for query, key and value; on a CPU they take no
        # grouped queries either.
        width = max(key.size(-1), d_v)
        query, key, value = (
            x if x.size(-1) == width else pad(x, (0, width - x.size(-1)))
            for x in (query, key, value)
        )
        if not query.is_cuda:
            repeats = query.size(2) // key.size(2)
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if plan is None or plan.is_whole or attention_mask is not None:
            out = self._attend(q, k, v, allowed)
        else:
            parts = []
            for a, b, start, stop in plan.spans:
                keys = (x[:, :, start:stop] for x in (k, v))
                parts.append(self._attend(q[:, :, a:b], *keys))
            out = torch.cat(parts, dim=2)
        return out[..., :d_v].permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
        """q `[b, heads, s, .]`, k and v `[b, kv_heads, t, .]`. Causal, with the last query at the
        last key, unless `allowed` says which keys are attended to."""
        s, t = q.size(2), k.size(2)
        if allowed is None and s != t:
            # is_causal puts the first query at the first key.
            allowed = causal_lower_right(s, t) if q.is_cuda else _lower_right(s, t, q.device)
        dropout = self.config.attention_dropout if self.training else 0.0
        with _dropout_rng(dropout, self.config.sequence_parallel):
            return scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=allowed is None,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            )


class LatentCoreAttention(_CoreAttention):
    """The absorbed core on Hopper GPUs, by `mlra_kernels.latent_attention`.

    The values are the first columns of the keys, so the gradient of `key` covers both. The kernel
    sums that gradient by atomic additions, so its last bits differ from run to run.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: None = None,
        plan: TokenPlan | None = None,
    ) -> Tensor:
        """See the module's docstring; `value` is the first columns of `key`. No mask is taken."""
        from mlra_kernels.latent_attention import latent_attention, latent_attention_with_top

        reads = {} if plan is None or plan.is_whole else plan.latent_reads
        arguments = (query, key, value.size(-1), self.softmax_scale)
        if not self.largest.wanted_of(self):
            return latent_attention(*arguments, **reads).flatten(2)
        out, largest = latent_attention_with_top(*arguments, **reads)
        self.largest.add(largest)
        return out.flatten(2)


def _lower_right(s: int, t: int, device: torch.device) -> Tensor:
    """`[s, t]`, True where query i of s may read key j of t: j <= i + t - s."""
    return torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)


def _dropout_rng(dropout: float, sequence_parallel: bool):
    """The random state that Megatron's own core attention draws dropout from: that of the TP rank,
    but the common one under sequence parallel."""
    if dropout == 0.0 or sequence_parallel:
        return nullcontext()
    return get_cuda_rng_tracker().fork()
