"""What an exported folder says of the model, and what servers read of it."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import tokenizers

from megatron_mlra.checkpoint.huggingface import card as cards
from megatron_mlra.checkpoint.huggingface.chat_template import read_template
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from mlra_kernels.latent_decode.validation import LATENT_DIMS, ROPE_DIMS
from support import ENV
from support.random_checkpoint import RandomFolder, grouped, latent

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def exported(tmp_path, source, **options):
    """Names and texts of the files of an export."""
    folder = tmp_path / "my model"
    said = []
    write_huggingface(source, folder, progress=False, say=said.append, **options)
    return {path.name: path for path in folder.iterdir()}, said


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer's folder, of a model that chats."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = tokenizers.models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<end>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    return folder


def test_a_card_names_variant_parameters_cache_and_how_to_run(tmp_path):
    sizes = {"kv_lora_rank": 256, "qk_rope_head_dim": 32}
    files, _ = exported(tmp_path, RandomFolder(latent(4, 4, **sizes)), tokenizer="byte")
    card = files["README.md"].read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "custom_code" in card
    assert "# my_model\n" in card and "MLRA-4 attention, " in card
    # Two layers; four latents of 64 and a RoPE key of 32, two bytes each; one latent from TP4 on.
    assert f"| {2 * 288 * 2:,} | {2 * 96 * 2} | {2 * 96 * 2} |" in card
    assert 'from_pretrained("my_model", trust_remote_code=True' in card
    assert "vllm serve my_model" in card and "/v1/completions" in card
    assert "no chat template" in card and "Not recorded in the checkpoint" in card


def test_a_norm_of_query_heads_is_named(tmp_path):
    source = RandomFolder(latent(4, 4, query_head_norm=True))
    files, _ = exported(tmp_path, source, tokenizer="byte")
    said = "MLRA-4 attention (RMSNorm of query heads), "
    assert said in files["README.md"].read_text()
    assert json.loads(files["config.json"].read_text())["query_head_norm"] is True


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"no_rope_pattern": (0, 1)}, "the plugin's attention has RoPE in every layer."),
        ({"qk_rope_head_dim": 0}, "the plugin's attention has RoPE in every layer."),
        ({}, "the plugin takes latents of 64, 128, 256, 512 numbers, not 16."),
        ({"kv_lora_rank": 256}, "the plugin takes RoPE keys of 32, 64 numbers, not 8."),
    ],
)
def test_a_card_says_what_vllm_does_not_serve(changes, said, tmp_path):
    files, _ = exported(tmp_path, RandomFolder(latent(4, 4, **changes)), tokenizer="byte")
    card = files["README.md"].read_text()
    assert f"vLLM does not serve it: {said}" in card
    assert "vllm serve" not in card


def test_the_plugin_takes_what_the_kernels_take():
    assert (cards.LATENT_DIMS, cards.ROPE_DIMS) == (LATENT_DIMS, ROPE_DIMS)


def test_without_a_tokenizer_token_ids_are_continued(tmp_path, tokenizer):
    """Even with a chat template, which needs one."""
    files, _ = exported(
        tmp_path,
        RandomFolder(grouped(2, eod_token_id=None)),
        chat_template=str(tokenizer / "chat_template.jinja"),
    )
    assert "tokenizer.json" not in files
    card = files["README.md"].read_text()
    assert "AutoTokenizer" not in card and "chat/completions" not in card
    assert "a folder without a tokenizer: it continues lists of token ids." in card
    assert "vllm serve my_model --skip-tokenizer-init\n" in card
    assert '"prompt": [1, 2, 3]' in card
    python = card.partition("```python\n")[2].partition("```")[0]
    code = python.replace("my_model", str(files["README.md"].parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.stdout.startswith("[1, 2, 3, "), done.stderr


def test_a_llama_needs_no_plugin(tmp_path):
    files, _ = exported(tmp_path, RandomFolder(grouped(2)), tokenizer="byte")
    card = files["README.md"].read_text()
    assert "as a Llama, without a plugin" in card
    assert not any(word in card for word in ("trust_remote_code", "custom_code", "./kernels"))


def test_training_is_told_by_numbers_and_last_names_alone(tmp_path):
    metadata = {"version": 1, "documents": 593, "tokens": 9_700_001}
    metadata |= {"tokenizer": {"type": "byte", "model": "/home/me/secret"}, "note": "private"}
    (tmp_path / "books`|.json").write_text(json.dumps(metadata))
    source = RandomFolder(latent(4, 4), tmp_path)
    source.iteration = 1200
    source.args = Namespace(
        data_path=["0.5", str(tmp_path / "books`|"), "0.5", "/gone/web"],
        consumed_train_samples=3000,
        seq_length=2048,
    )
    files, _ = exported(tmp_path, source)
    card = files["README.md"].read_text()
    assert "Step 1,200, 6,144,000 tokens, in sequences of 2,048." in card
    assert "| books__ | 593 | 9,700,001 | byte |" in card and "| web | ? | ? | ? |" in card
    assert not any(word in card for word in ("secret", "private", "/gone", str(tmp_path)))


def test_the_chat_template_of_a_tokenizer_is_not_the_models(tmp_path, tokenizer):
    source = RandomFolder(latent(4, 4))
    files, said = exported(tmp_path, source, tokenizer=str(tokenizer))
    assert "chat_template.jinja" not in files
    assert json.loads(files["tokenizer_config.json"].read_text()) == {
        "eos_token": {"content": "<end>"}
    }
    assert any("without its chat_template" in line for line in said)
    assert json.loads(files["generation_config.json"].read_text()) == {
        "eos_token_id": 256,
        "pad_token_id": 256,
    }


def test_a_chat_template_that_is_named_is_the_models(tmp_path, tokenizer):
    template = tokenizer / "chat_template.jinja"
    files, _ = exported(
        tmp_path, RandomFolder(grouped(2)), tokenizer="byte", chat_template=str(template)
    )
    assert files["chat_template.jinja"].read_text() == TEMPLATE
    assert "/v1/chat/completions" in files["README.md"].read_text()


def test_files_beside_the_weights_are_the_models(tmp_path, tokenizer):
    files, _ = exported(tmp_path, RandomFolder(latent(4, 4), tokenizer))
    assert files["chat_template.jinja"].read_text() == TEMPLATE
    assert "It has a chat template." in files["README.md"].read_text()
    # The end of the model's documents is one of its ends; the rest is as it was.
    generation = json.loads(files["generation_config.json"].read_text())
    assert generation == {"eos_token_id": [7, 256], "temperature": 0.6, "pad_token_id": 256}


def test_without_an_id_of_its_own_a_model_ends_where_its_tokenizer_does(tmp_path, tokenizer):
    source = RandomFolder(latent(4, 4, eod_token_id=None))
    files, _ = exported(tmp_path, source, tokenizer=str(tokenizer))
    assert json.loads(files["generation_config.json"].read_text())["eos_token_id"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", " is empty; give a template, or leave it out"),
        ("a\n{{ messages", ", line 2: unexpected end of template, expected 'end of print"),
        ("{% for m in messages %}{{ m }}", ", line 1: Unexpected end of template. Jinja was lo"),
        ("{% chat %}", ", line 1: Encountered unknown tag 'chat'"),
    ],
)
def test_a_chat_template_that_is_none_is_refused_before_weights_are_written(text, said, tmp_path):
    (tmp_path / "a.jinja").write_text(text)
    with pytest.raises(ValueError) as refused:
        write_huggingface(
            RandomFolder(latent(4, 4)),
            tmp_path / "out",
            tokenizer="byte",
            chat_template=str(tmp_path / "a.jinja"),
            progress=False,
        )
    assert str(refused.value).startswith(f"--chat-template {tmp_path}/a.jinja{said}")
    assert not (tmp_path / "out").exists()


def test_tags_of_transformers_are_part_of_a_template(tmp_path):
    text = (
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    )
    (tmp_path / "a.jinja").write_text(text)
    assert read_template(tmp_path / "a.jinja") == text
