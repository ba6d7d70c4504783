"""Exported models on a GPU: the decoding kernels behind `generate` against the torch attention.

Needs torch, triton and transformers; run with `pytest -m gpu tests/gpu/test_hf_gpu.py`.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")

from megatron_mlra.hf.configuration_mlra import MLRAConfig
from megatron_mlra.hf.modeling_mlra import MLRAForCausalLM
from megatron_mlra.hf.paged_cache_mlra import PagedLatentLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VARIANTS = {"MLA": (1, 1), "GLA-2": (2, 1), "GLA-4": (4, 1), "MLRA-2": (4, 2), "MLRA-4": (4, 4)}
PAD = 0


def build(latents, branches, dtype=torch.bfloat16, **changes):
    """A two-layer model with random weights, large enough for attention to be uneven."""
    torch.manual_seed(0)
    config = MLRAConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_latent_heads=latents,
        num_branches=branches,
        q_lora_rank=256,
        initializer_range=0.05,
        pad_token_id=PAD,
        **changes,
    )
    return MLRAForCausalLM(config).to("cuda", dtype).eval()


def with_backend(model, backend, dtype=None):
    """A copy of a model that decodes otherwise."""
    other = copy.deepcopy(model)
    other.config.decode_backend = backend
    return other if dtype is None else other.to(dtype)


def batch(lengths, seed=1):
    """Left-padded random prompts of these lengths and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    tokens = torch.randint(1, 512, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return (tokens * mask).cuda(), mask.cuda()


@torch.no_grad()
def stepwise(model, tokens, mask, prompt, steps):
    """Logits behind `prompt` tokens, computed in cached steps of these sizes; and the cache."""
    out = model(tokens[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True,
                position_ids=positions(mask)[:, :prompt])  # fmt: skip
    cache, logits, at = out.past_key_values, [], prompt
    for n in steps:
        here = slice(at, at + n)
        out = model(tokens[:, here], attention_mask=mask[:, : at + n], past_key_values=cache,
                    position_ids=positions(mask)[:, here])  # fmt: skip
        logits.append(out.logits.float())
        at += n
    return torch.cat(logits, dim=1), cache


def positions(mask):
    """RoPE positions of left-padded rows."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate", [False, True])
def test_kernels_are_as_close_to_float32_as_torch_is(variant, gate):
    model = build(*VARIANTS[variant], output_gate=gate)
    tokens, mask = batch([150, 63, 129])
    case = (tokens, mask, 126, (1, 1, 4, 1, 8, 9))
    exact, _ = stepwise(with_backend(model, "torch", torch.float32), *case)
    plain, _ = stepwise(with_backend(model, "torch"), *case)
    found, cache = stepwise(with_backend(model, "mlra_kernels"), *case)
    assert all(isinstance(layer, PagedLatentLayer) for layer in cache.layers)
    error, usual = ((x - exact).abs().max().item() for x in (found, plain))
    print(f"{variant}: kernels {error:.4f}, torch {usual:.4f}, logits {exact.abs().max():.2f}")
    assert error <= 1.5 * usual + 1e-3 * exact.abs().max().item()


def test_auto_takes_the_kernels_in_half_precision_only():
    tokens, mask = batch([20, 7])
    for dtype, paged in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        _, cache = stepwise(build(4, 4, dtype), tokens, mask, 18, (1, 1))
        assert isinstance(cache.layers[0], PagedLatentLayer) == paged
    with pytest.raises(ValueError, match="the kernels take bfloat16 and float16"):
        stepwise(build(4, 4, torch.float32, decode_backend="mlra_kernels"), tokens, mask, 18, (1,))


@pytest.mark.parametrize("variant", ["MLA", "MLRA-4"])
def test_generate(variant):
    model = build(*VARIANTS[variant])
    tokens, mask = batch([70, 12, 64])
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 12}
    greedy = model.generate(**inputs, do_sample=False)
    assert greedy.shape == (3, 82)
    # Half precision may part ways at a near tie, so greedy choices are judged by their logits.
    whole = torch.cat((mask, torch.ones_like(greedy[:, 70:])), dim=1)
    with torch.no_grad():
        logits = with_backend(model, "torch", torch.float32)(
            greedy, attention_mask=whole, position_ids=positions(whole)
        ).logits[:, 69:-1]
    chosen = logits.gather(-1, greedy[:, 70:, None]).squeeze(-1)
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()
    beams = model.generate(**inputs, do_sample=False, num_beams=3)
    assert beams.shape == (3, 82)
    torch.manual_seed(7)
    sampled = model.generate(**inputs, do_sample=True, top_k=50)
    torch.manual_seed(7)
    assert torch.equal(sampled, model.generate(**inputs, do_sample=True, top_k=50))
    assert not torch.equal(sampled, greedy)
