"""YaRN's two factors, of the angles' cosines and of the softmax, as others compute them."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.models.common.embeddings import YarnRotaryEmbedding, _yarn_get_mscale
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.maths.rope import rotary_tables

FACTOR, ORIGINAL, D_H, D_R = 4.0, 64, 16, 32


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 0.0), (1.0, 1.0), (0.707, 0.707)])
@pytest.mark.parametrize("latents, branches", [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_yarn_is_that_of_transformers_and_megatron(monkeypatch, mscale, all_dim, latents, branches):
    monkeypatch.setattr("torch.cuda.current_device", lambda: torch.device("cpu"))
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "qk_head_dim": D_H, "v_head_dim": 16}
    ours = from_megatron_args(
        sizes
        | {"num_layers": 1, "ffn_hidden_size": 64, "vocab_size": 8, "kv_lora_rank": 64}
        | {"num_latent_heads": latents, "num_branches": branches, "qk_pos_emb_head_dim": D_R}
        | {"rope_type": "yarn", "rotary_scaling_factor": FACTOR, "mscale": mscale}
        | {"original_max_position_embeddings": ORIGINAL, "mscale_all_dim": all_dim}
    )
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": FACTOR, "mscale": mscale}
    rope |= {"original_max_position_embeddings": ORIGINAL, "mscale_all_dim": all_dim}
    theirs = DeepseekV3Config(
        num_attention_heads=4,
        hidden_size=64,
        qk_nope_head_dim=D_H,
        qk_rope_head_dim=D_R,
        v_head_dim=16,
        kv_lora_rank=64,
        q_lora_rank=None,
        max_position_embeddings=int(FACTOR * ORIGINAL),
        rope_parameters=rope,
    )
    cos, sin = rotary_tables(ours, 256)
    positions = torch.arange(256)[None]
    found = DeepseekV3RotaryEmbedding(theirs)(torch.zeros(1), positions)
    megatron = YarnRotaryEmbedding(
        D_R,
        scaling_factor=FACTOR,
        original_max_position_embeddings=ORIGINAL,
        mscale=mscale,
        mscale_all_dim=all_dim,
        use_cpu_initialization=True,
    )
    angles, concentration = megatron(256, packed_seq=True)
    angles = angles.view(256, -1)[:, : D_R // 2].float()
    for mine, hf, mcore in zip((cos, sin), found, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(mine, hf[0, :, : D_R // 2], atol=2e-5, rtol=0)
        torch.testing.assert_close(mine, mcore * concentration, atol=2e-5, rtol=0)
    # In every branch the same temperature: equation 22 where all dims have it, else 1.
    temperature = (0.1 * all_dim * math.log(FACTOR) + 1) ** 2
    scale = temperature / math.sqrt(D_H + D_R)
    assert ours.softmax_scale == pytest.approx(scale)
    assert DeepseekV3Attention(theirs, 0).scaling == pytest.approx(scale)
    assert _yarn_get_mscale(FACTOR, all_dim) ** 2 == pytest.approx(temperature)
