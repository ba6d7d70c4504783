"""Exported models generating: caches, padding, beams, sampling, on both cache layouts."""

from __future__ import annotations

import copy
import io
import json
import sys
from logging import StreamHandler

import accelerate
import pytest
import torch
from transformers import DynamicCache

from megatron_mlra.hf import configuration_mlra
from megatron_mlra.hf.modeling_mlra import MLRAForCausalLM
from megatron_mlra.hf.paged_cache_mlra import PAGE_SIZE, PagedLatentLayer
from support.hf_models import VARIANTS, build, prompts

NEW = 6


@pytest.fixture(params=[False, True], ids=["torch", "pages"])
def pages(request):
    """transformers' cache layout, and the pages that the kernels read (in plain torch here)."""
    return request.param


@pytest.fixture(params=VARIANTS)
def model(request, pages):
    """Every variant on both layouts."""
    return build(request.param, decode_backend="torch", decode_pages=pages)


@torch.no_grad()
def test_cached_decoding_equals_full_forward(model, pages):
    tokens, _ = prompts(150, 150)
    full = model(tokens, use_cache=False).logits
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in (1, 1, 62, 1, 8, 9, 4, 1, 60, 3):
        parts.append(model(tokens[:, start : start + size], past_key_values=cache).logits)
        start += size
    assert start == 150
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-4)
    paged = pages
    assert all(isinstance(layer, PagedLatentLayer) == paged for layer in cache.layers)


@torch.no_grad()
def test_cache_holds_latents_and_one_rope_key(model, pages):
    config, (tokens, _) = model.config, prompts(70, 70, 70)
    layer = model(tokens, use_cache=True).past_key_values.layers[0]
    stored = 2 * PAGE_SIZE if pages else 70
    assert layer.values.numel() == 0
    assert layer.keys.numel() == 3 * stored * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert layer.get_seq_length() == 70


def test_padded_batch_generates_what_each_prompt_does_alone(model):
    tokens, mask = prompts(11, 70, 1, 64)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW}
    batch = model.generate(**inputs, do_sample=False)
    for row, length in enumerate(mask.sum(-1)):
        alone = model.generate(
            tokens[row : row + 1, -length:], max_new_tokens=NEW, do_sample=False, use_cache=False
        )
        assert torch.equal(batch[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_beams_and_samples_are_those_without_a_cache(pages, options):
    model = build(decode_backend="torch", decode_pages=pages)
    tokens, mask = prompts(9, 66, 63)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW}
    inputs |= {"do_sample": False} | options
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(**inputs, use_cache=use_cache))
    assert torch.equal(*found)
    assert len(found[0]) == 3 * options.get("num_return_sequences", 1)
    if options.get("do_sample"):
        torch.manual_seed(4)
        assert not torch.equal(model.generate(**inputs), found[0])


def test_assisted_generation_crops_the_cache(model):
    tokens, _ = prompts(12)
    tokens[0, 6:] = tokens[0, :6].clone()
    plain = model.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=False)
    looked_up = model.generate(
        tokens, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
    )
    assistant = copy.deepcopy(model)
    assisted = model.generate(tokens, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, looked_up)
    assert torch.equal(plain, assisted)


def test_a_returned_cache_continues(model):
    tokens, mask = prompts(11, 70)
    inputs = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, **inputs)
    whole = torch.cat((mask, mask.new_ones(2, NEW)), dim=1)
    again = model.generate(
        first.sequences,
        attention_mask=whole,
        past_key_values=first.past_key_values,
        max_new_tokens=NEW,
        **inputs,
    )
    straight = model.generate(
        tokens, attention_mask=mask, max_new_tokens=2 * NEW, do_sample=False, use_cache=False
    )
    assert torch.equal(again.sequences, straight)


def test_prefill_in_pieces(model):
    tokens, mask = prompts(70, 62, 55)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW}
    pieces = model.generate(**inputs, do_sample=False, prefill_chunk_size=20)
    assert torch.equal(pieces, model.generate(**inputs, do_sample=False, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_the_cache_move_with_their_padding(pages, change, rows):
    model, (tokens, mask) = build(decode_backend="torch", decode_pages=pages), prompts(66, 5, 30)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def run(part, **options):
        inputs = {"attention_mask": mask[rows, : part.stop], "position_ids": positions[rows, part]}
        return model(tokens[rows, part], **inputs, **options).logits[:, -1]

    past, step = slice(0, 65), slice(65, 66)
    cache = model(
        tokens[:, past], attention_mask=mask[:, past], position_ids=positions[:, past]
    ).past_key_values
    change(cache)
    expected = run(slice(0, 66), use_cache=False)
    torch.testing.assert_close(run(step, past_key_values=cache), expected, rtol=0, atol=1e-4)


def test_static_cache():
    model = build("MLA")
    tokens, mask = prompts(9, 30)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW}
    static = model.generate(
        **inputs, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, model.generate(**inputs, do_sample=False, use_cache=False))


@torch.no_grad()
def test_bfloat16(pages):
    model, (tokens, mask) = build(decode_backend="torch", decode_pages=pages), prompts(66, 66)
    exact = model(tokens).logits[:, -1]
    model = model.bfloat16()
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    step = model(tokens[:, -1:], past_key_values=cache).logits[:, -1]
    assert step.dtype == cache.layers[0].keys.dtype == torch.bfloat16
    assert (step - exact).abs().mean() < 0.05 * exact.std()
    assert model.generate(tokens, attention_mask=mask, max_new_tokens=3).shape == (2, 69)


@torch.no_grad()
def test_attention_implementations_agree():
    tokens, mask = prompts(5, 20)
    for variant in ("MLA", "MLRA-4"):
        model = build(variant)
        sdpa = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        eager = model(
            tokens, attention_mask=mask, output_attentions=True, output_hidden_states=True
        )
        real = mask.bool()
        torch.testing.assert_close(eager.logits[real], sdpa[real], rtol=0, atol=1e-4)
        pairs = model.config.num_branches * model.config.num_attention_heads
        assert [tuple(w.shape) for w in eager.attentions] == [(2, pairs, 20, 20)] * 2
        assert len(eager.hidden_states) == 3


def test_gradient_checkpointing_changes_nothing():
    model, (tokens, _) = build().train(), prompts(20, 20)
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


def test_saved_again_it_loads_again(tmp_path):
    model = build("MLRA-8", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    again = MLRAForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="decode_backend is 'fast'; use one of auto, torch"):
        MLRAForCausalLM.from_pretrained(tmp_path, decode_backend="fast")
    assert {"attention_mlra.py", "configuration_mlra.py", "modeling_mlra.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    tokens, _ = prompts(10)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_pages_take_left_padding_only():
    model, (tokens, mask) = build(decode_backend="torch", decode_pages=True), prompts(5, 9)
    for wrong, said in (
        (mask.flip(-1), "the attention mask has zeros behind a token"),
        (torch.ones(2, 1, 9, 9, dtype=torch.bool), r"pages take attention masks \[batch, tokens\]"),
    ):
        with pytest.raises(ValueError, match=said):
            model(tokens, attention_mask=wrong, use_cache=True)
    with pytest.raises(ValueError, match="must end within the first call"):
        model.generate(tokens, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=3)
    cut = model.generate(tokens, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=5)
    assert torch.equal(cut, model.generate(tokens, attention_mask=mask, max_new_tokens=2))
    # Left to itself, the choice follows the mask.
    automatic = build(decode_backend="auto")
    out = automatic(tokens, attention_mask=mask.flip(-1), use_cache=True)
    assert not isinstance(out.past_key_values.layers[0], PagedLatentLayer)


def test_kernels_asked_for_and_missing_are_an_error(monkeypatch):
    tokens, _ = prompts(5)
    with pytest.raises(ValueError, match="the kernels need a CUDA GPU, this model is on cpu"):
        build(decode_backend="mlra_kernels").generate(tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"kernels take latent dims .* this model has 32"):
        build(decode_backend="mlra_kernels", kv_lora_rank=128).generate(tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match="decode_backend is 'fast'; use one of auto, torch"):
        build(decode_backend="fast")
    filled = build(decode_backend="torch")(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache was filled by another backend"):
        build(decode_backend="torch", decode_pages=True)(tokens, past_key_values=filled)
    monkeypatch.setitem(sys.modules, "mlra_kernels", None)
    with pytest.raises(ValueError, match="mlra_kernels is not installed; use decode_pages"):
        build(decode_backend="torch", decode_pages=True).generate(tokens, max_new_tokens=2)
    assert build().generate(tokens, max_new_tokens=2).shape == (1, 7)


def test_the_name_of_an_earlier_version_is_understood_with_a_line(tmp_path):
    line = "decode_backend reference is now called torch with pages: use decode_backend torch and"
    said = _said_by(lambda: build(decode_backend="reference"))
    assert line in said and said.count("\n") == 1
    model = build(decode_backend="torch", decode_pages=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["decode_backend"] == "torch"
    (tmp_path / "config.json").write_text(json.dumps(config | {"decode_backend": "reference"}))
    again = MLRAForCausalLM.from_pretrained(tmp_path)
    tokens, _ = prompts(9)
    assert torch.equal(
        again.generate(tokens, max_new_tokens=2), model.generate(tokens, max_new_tokens=2)
    )
    assert isinstance(again(tokens, use_cache=True).past_key_values.layers[0], PagedLatentLayer)
    again.config.decode_backend = "reference"
    again(tokens, use_cache=True)
    assert again.config.decode_backend == "torch"


def _said_by(work) -> str:
    """What transformers' logger says meanwhile."""
    said = io.StringIO()
    handler = StreamHandler(said)
    configuration_mlra.logger.warning_once.cache_clear()
    configuration_mlra.logger.addHandler(handler)
    try:
        work()
    finally:
        configuration_mlra.logger.removeHandler(handler)
    return said.getvalue()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_lora_rank": 250}, "num_latent_heads 4 does not divide kv_lora_rank 250"),
        ({"num_branches": 3}, "num_branches 3 must divide num_latent_heads 4"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear'; use default or"),
        (
            {"rope_parameters": {"rope_type": "yarn"}, "qk_rope_head_dim": 0},
            "rope_type yarn stretches RoPE, qk_rope_head_dim is 0; use default",
        ),
    ],
)
def test_configurations_that_cannot_work(changes, said):
    with pytest.raises(ValueError, match=said):
        build(**changes)


def test_weights_that_are_in_place_only_while_their_module_runs(model):
    tokens, mask = prompts(11, 70)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW}
    expected = model.generate(**inputs, do_sample=False)
    hidden = model(tokens[:, :9], use_cache=False).logits
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.model.layers[0].self_attn.kv_b_proj.weight.is_meta
    assert torch.equal(model.generate(**inputs, do_sample=False), expected)
    assert torch.equal(model(tokens[:, :9], use_cache=False).logits, hidden)


def test_weights_on_disk(pages, tmp_path):
    """`device_map` with every layer on the disk, as for a model larger than the memory."""
    model = build("MLRA-4 experts", decode_backend="torch", decode_pages=pages)
    tokens, mask = prompts(66, 5, 30)
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": NEW}
    expected = model.generate(**inputs, do_sample=False)
    logits = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    loaded = MLRAForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places | {f"model.layers.{i}": "disk" for i in range(2)},
        offload_folder=tmp_path / "offloaded",
    )
    layers = list(loaded.model.layers.parameters())
    assert layers and all(weight.is_meta for weight in layers)
    assert torch.equal(loaded.generate(**inputs, do_sample=False), expected)
    assert torch.equal(loaded(tokens).logits, logits)


def test_every_linear_is_one(pages):
    """Adapters and quantizers replace modules of this class, whatever they are called."""
    model = build("MLRA-4 experts", decode_backend="torch", decode_pages=pages)
    seen = []

    def is_linear(module, inputs, output):
        assert output.shape == (*inputs[0].shape[:-1], module.out_features)
        seen.append(module)

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for module in linears:
        module.register_forward_hook(is_linear)
    model(prompts(50)[0])
    assert set(seen) == set(linears)
