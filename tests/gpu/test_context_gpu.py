"""Cores over a token plan on a GPU, chunk by chunk of each context-parallel rank, packed and not:
output and gradients against attention in float32.

python -m pytest -m gpu tests/gpu/test_context_gpu.py
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_mlra.maths.attention import attend
from megatron_mlra.sharding.token_plan import TokenPlan, plan_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("world")]

DEVICE = "cuda"
BF16_TOLERANCE = 3e-2
"""Relative difference of norms between bf16 kernels and float32."""
TOKENS = 512
# Sizes of the paper's shape: one head a latent keeps the materialized form small.
SIZES = {"num_attention_heads": 4, "kv_lora_rank": 512, "qk_head_dim": 128, "v_head_dim": 128}
SIZES |= {"qk_pos_emb_head_dim": 64, "hidden_size": 256}
ODD, EVEN = (0, 1, 130, 301, TOKENS), (0, 64, 128, TOKENS)


def plan_of(cp: int, rank: int, bounds: tuple[int, ...] | None, cut_documents: bool) -> TokenPlan:
    packed = None
    if bounds is not None:
        lengths = torch.tensor(bounds, dtype=torch.int32)
        padded = lengths if cut_documents else None
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_q_padded=padded)
    return plan_tokens(TOKENS // cp, cp, rank, packed, torch.device(DEVICE))


def core_of(backend: str, form: str) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mlra.layers.specs import mlra_attention_spec
    from support.tiny import Layout, make_config

    config = make_config(Layout(), core_backend=backend, core_form=form, bf16=True, **SIZES)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    return mlra_attention_spec(config).submodules.core_attention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=config.softmax_scale,
        pg_collection=groups,
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize(
    ("cp", "bounds", "cut_documents"),
    [
        (2, None, False),
        (4, None, False),
        (1, ODD, False),
        (2, ODD, False),
        (2, EVEN, True),
    ],
    ids=["cp2", "cp4", "packed", "packed cp2", "documents cut cp2"],
)
@pytest.mark.parametrize(
    ("backend", "form"),
    [
        ("te", "absorbed"),
        ("te", "materialized"),
        ("torch", "absorbed"),
        ("torch", "materialized"),
        ("mlra_kernels", "absorbed"),
    ],
)
def test_core_over_a_plan(backend, form, cp, bounds, cut_documents) -> None:
    core = core_of(backend, form)
    batch, heads = 1 if bounds else 2, 16
    kv_heads = 4 if form == "absorbed" else heads
    torch.manual_seed(0)

    def draw(tokens: int, count: int, width: int) -> torch.Tensor:
        x = torch.randn(tokens, batch, count, width, device=DEVICE, dtype=torch.bfloat16)
        return x.requires_grad_()

    for rank in range(cp):
        plan = plan_of(cp, rank, bounds, cut_documents)
        q, k = draw(TOKENS // cp, heads, 192), draw(TOKENS, kv_heads, 192)
        # The latent core's values are part of its keys.
        leaves = [q, k] if backend == "mlra_kernels" else [q, k, draw(TOKENS, kv_heads, 128)]
        out = core(q, k, leaves[2] if len(leaves) == 3 else k[..., :128], None, plan=plan)
        upstream = torch.randn_like(out)
        found = (out, *torch.autograd.grad(out, leaves, upstream))

        wide = [x.detach().float().requires_grad_() for x in leaves]
        v = wide[2] if len(wide) == 3 else wide[1][..., :128]
        parts = [
            attend(wide[0][a:b], wide[1][start:stop], v[start:stop], 192**-0.5)
            for a, b, start, stop in plan.spans
        ]
        expected = torch.cat(parts).flatten(2)
        wanted = (expected, *torch.autograd.grad(expected, wide, upstream.float()))
        for name, ours, theirs in zip(["out", *"qkv"[: len(wide)]], found, wanted, strict=True):
            assert difference(ours, theirs) <= BF16_TOLERANCE, f"{name} on rank {rank} of {cp}"
