"""Other libraries at the shape of the absorbed core: few key heads, and values narrower than keys.

A provider's `build(core)` returns `Passes`, whose calls take the core's tensors in the library's
own layout, made before the measurement. The libraries are Transformer Engine 2.20 (its fused
attention is cuDNN's), cuDNN's frontend 1.32 by its torch operators, and FlashAttention 4
(4.0.0b36).

Letters: t query tokens per sequence, s sequences, P query heads, G key heads, D columns of values
and R further columns of keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlra_kernels.benchmarks.providers import Provider, without, without_flash_attention_4
from mlra_kernels.latent_attention import latent_attention

Span = tuple[int, int, int, int]
"""See `latent_attention.key_ranges`."""


@dataclass(frozen=True)
class Core:
    """Inputs of one workload.

    Attributes:
        query: `[t, s, P, D + R]`, a leaf that needs a gradient.
        key: `[u, s, G, D + R]`, likewise; its first D columns are the values.
        grad: the output's gradient, `[t, s, P, D]`.
        spans: which queries read which keys; several spans have s = 1.
        reads: how `latent_attention` is told the spans.
        scale: factor of the scores.
    """

    query: Tensor
    key: Tensor
    grad: Tensor
    spans: list[Span]
    reads: dict[str, Tensor]
    scale: float

    @property
    def latent(self) -> int:
        """D."""
        return self.grad.shape[-1]

    @property
    def is_whole(self) -> bool:
        """Whether every sequence is one causal square."""
        return self.spans == [(0, len(self.query), 0, len(self.key))]

    @property
    def starts(self) -> Tensor:
        """First token of each document, and the end: int32 `[documents + 1]`."""
        ends = [0, *(b for _, b, _, _ in self.spans)]
        return torch.tensor(ends, dtype=torch.int32, device=self.query.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(b - a for a, b, _, _ in self.spans)


@dataclass(frozen=True)
class Passes:
    """The calls of one provider.

    Attributes:
        forward: returns the output `[t, s, P, D]`.
        both: forward and backward; returns the query's gradient `[t, s, P, D + R]` first.
        ahead: the forward pass within `both`, if it is not `forward`.
    """

    forward: Callable[[], Tensor]
    both: Callable[[], tuple[Tensor, ...]]
    ahead: Callable[[], object] | None = None


def own(core: Core) -> Passes:
    """This project's kernels."""

    def forward() -> Tensor:
        return latent_attention(core.query, core.key, core.latent, core.scale, **core.reads)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (core.query, core.key), core.grad)

    return Passes(forward, both)


def transformer_engine(core: Core) -> Passes:
    """Transformer Engine's attention, held to its fused kernels: cuDNN's."""
    os.environ |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1", "NVTE_UNFUSED_ATTN": "0"}
    from transformer_engine.pytorch import DotProductAttention

    width = core.query.shape[-1]
    layer = DotProductAttention(
        core.query.shape[2], (width, core.latent), num_gqa_groups=core.key.shape[2],
        attention_dropout=0.0, softmax_scale=core.scale,
        qkv_format="sbhd" if core.is_whole else "thd",
        attn_mask_type="causal" if core.is_whole else "padding_causal",
    )  # fmt: skip
    more = {}
    if not core.is_whole:
        more = {
            "cu_seqlens_q": core.starts, "cu_seqlens_kv": core.starts,
            "max_seqlen_q": core.longest, "max_seqlen_kv": core.longest,
        }  # fmt: skip
    query, key, grad = (_flat(x, core.is_whole) for x in (core.query, core.key, core.grad))
    leaves = _leaves(query, key, key[..., : core.latent])

    def forward() -> Tensor:
        return layer(*leaves, None, **more).view(core.grad.shape)

    def both() -> tuple[Tensor, ...]:
        out = layer(*leaves, None, **more)
        found = torch.autograd.grad(out, leaves, grad.reshape(out.shape))
        return found[0].view(core.query.shape), *found[1:]

    return Passes(forward, both)


def cudnn_frontend(core: Core) -> Passes:
    """cuDNN by the torch operators of its frontend, which chooses among cuDNN's kernels and own."""
    import cudnn.sdpa.fwd.torch_op  # noqa: F401  registers the operators

    ops = torch.ops.cudnn
    query, key, grad = (x.detach().permute(1, 2, 0, 3) for x in (core.query, core.key, core.grad))
    value = key[..., : core.latent].clone(memory_format=torch.preserve_format)

    def ahead() -> tuple[Tensor, Tensor]:
        return ops.sdpa_fwd(query, key, value, core.scale, is_causal=True)

    def both() -> tuple[Tensor, ...]:
        out, lse = ahead()
        found = ops.sdpa_bwd(grad, query, key, value, out, lse, core.scale, is_causal=True)
        return found[0].permute(2, 0, 1, 3), *found[1:]

    return Passes(lambda: ahead()[0].permute(2, 0, 1, 3), both)


def flash_attention_4(core: Core) -> Passes:
    """FlashAttention 4. Its backward pass on Hopper takes narrower values for equally many heads
    only, so keys are repeated in front of it; repeating and adding up are not measured."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    def laid(x: Tensor) -> Tensor:
        x = x.detach()
        return (x.transpose(0, 1) if core.is_whole else x[:, 0]).contiguous()

    def back(x: Tensor) -> Tensor:
        return x.transpose(0, 1) if core.is_whole else x[:, None]

    more = {"causal": True, "softmax_scale": core.scale}
    run = flash_attn_func
    if not core.is_whole:
        run = flash_attn_varlen_func
        more |= {
            "cu_seqlens_q": core.starts, "cu_seqlens_k": core.starts,
            "max_seqlen_q": core.longest, "max_seqlen_k": core.longest,
        }  # fmt: skip
    query, key, grad = (laid(x) for x in (core.query, core.key, core.grad))
    few = query, key, key[..., : core.latent].contiguous()
    times = query.shape[-2] // key.shape[-2]
    many = _leaves(query, *(x.repeat_interleave(times, dim=-2) for x in few[1:]))

    def output(tensors: tuple[Tensor, ...]) -> Tensor:
        found = run(*tensors, **more)
        return found[0] if isinstance(found, tuple) else found

    def both() -> tuple[Tensor, ...]:
        found = torch.autograd.grad(output(many), many, grad)
        return back(found[0]), *found[1:]

    return Passes(lambda: back(output(few)), both, lambda: output(many))


def _flat(x: Tensor, whole: bool) -> Tensor:
    """The tensor itself, or `[t, heads, columns]` of packed documents."""
    return x.detach() if whole else x.detach()[:, 0]


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().contiguous().requires_grad_() for x in tensors)


def reads_itself(core: Core) -> bool:
    """Whether the queries of every span read the span's own tokens as keys."""
    return all((a, b) == (start, stop) for a, b, start, stop in core.spans)


PROVIDERS = [
    Provider("mlra_kernels", lambda core: True, own),
    Provider(
        "Transformer Engine, cuDNN", reads_itself, transformer_engine,
        without("transformer_engine.pytorch", "pip install 'transformer-engine[pytorch]'"),
    ),
    Provider(
        "cuDNN frontend", lambda core: core.is_whole, cudnn_frontend,
        without("cudnn.sdpa.fwd.torch_op", "pip install nvidia-cudnn-frontend"),
    ),
    Provider("FlashAttention-4", reads_itself, flash_attention_4, without_flash_attention_4),
]  # fmt: skip
