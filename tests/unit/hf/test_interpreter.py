"""Exported models decoding with the Triton kernels, under Triton's interpreter on the CPU.

Triton fixes at import whether it interprets, so this file runs itself in a child process.
"""

import pytest
import torch

from support.interpreted import INTERPRETING, run_interpreted

if not INTERPRETING:

    def test_kernels_decode_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert "2 passed" in printed

else:
    from megatron_mlra.hf import paged_cache_mlra
    from support.hf_models import build, prompts

    @pytest.mark.parametrize("variant", ["MLA", "MLRA-2"])
    @torch.no_grad()
    def test_decoding_equals_full_forward(variant, monkeypatch):
        # The interpreter takes CPU tensors in float32, which the kernels refuse on a GPU.
        monkeypatch.setattr(paged_cache_mlra, "_unsupported", lambda config, embeds: None)
        model = build(variant, decode_backend="mlra_kernels")
        tokens, mask = prompts(66, 5, 30)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        full = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, found = None, []
        for start, stop in ((0, 61), (61, 62), (62, 66)):
            out = model(
                tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found[1:], 1), full[:, 61:], rtol=0, atol=1e-4)
