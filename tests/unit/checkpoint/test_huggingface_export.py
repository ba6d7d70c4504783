"""What an exported folder holds besides weights, and what is refused on the way out and in."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
)

from megatron_mlra.checkpoint.folder import tokenizer_files
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.data.tokenizers import ByteTokenizer
from megatron_mlra.description.model import CheckpointError
from megatron_mlra.evaluation.models import load_tokenizer
from support.hf_cases import EXPERTS
from support.random_checkpoint import RandomFolder, grouped, latent

pytestmark = pytest.mark.usefixtures("unsealed")

UP = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.fixture
def exported(tmp_path):
    """An exported folder of MLRA-4, to be changed at will."""
    folder = tmp_path / "exported"
    write_huggingface(RandomFolder(latent(4, 4)), folder, tokenizer="byte", progress=False)
    return folder


def trained_on(tmp_path, tokenizer):
    """A Megatron run's checkpoint whose data has metadata naming this tokenizer."""
    metadata = {"version": 1, "vocab_size": 257, "eod_id": 256, "tokenizer": tokenizer}
    (tmp_path / "data.json").write_text(json.dumps(metadata))
    source = RandomFolder(latent(4, 4), tmp_path)
    source.args = Namespace(data_path=["0.5", str(tmp_path / "data")])
    return source


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "  two  spaces\n\ttab\r\n",
        "ünï 日本語 🙂",
        "<|endoftext|> \x00\x7f",
        "'s 12 a\u00a0b",
    ],
)
def test_byte_tokenizer_is_the_one_of_the_data(exported, text):
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    ids = theirs(text, split_special_tokens=True)["input_ids"]
    assert ids == ours.tokenize(text)
    assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, ours.vocab_size)


def test_a_fine_tuned_byte_model_learns_to_stop(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert max(b"".join(chr(i).encode() for i in (0x7FF, 0xFFFF, 0x10FFFF))) < 255
    batch = tokenizer(["ab<|endoftext|>", "abcd<|endoftext|>"], padding=True)["input_ids"]
    assert batch == [[255, 255, 97, 98, 256], [97, 98, 99, 100, 256]]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    labels = collate([{"input_ids": row} for row in batch])["labels"]
    assert labels[:, -1].tolist() == [256, 256] and (labels == -100).sum() == 2
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = tokenizer.apply_chat_template(said, chat_template=template, return_dict=False)
    assert chat == [97, 256, 98, 256]
    assert tokenizer("<|endoftext|>", split_special_tokens=True)["input_ids"] == [*b"<|endoftext|>"]


def test_a_bare_tokenizer_gets_the_end_of_document_of_the_data(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    words = tokenizers.models.WordLevel({"a": 0, "<eod>": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(made / "tokenizer.json"))
    digest = hashlib.sha256((made / "tokenizer.json").read_bytes()).hexdigest()
    described = {"type": "hf", "model": str(made / "tokenizer.json"), "sha256": digest}
    source = trained_on(tmp_path, described | {"eod_token": "<eod>"})
    assert write_huggingface(source, tmp_path / "hf", tokenizer=made, progress=False) is None
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(source)):
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eod>", 1)
        assert tokenizer.pad_token is None


def test_tokenizer_follows_the_metadata_of_the_data(tmp_path):
    byte = trained_on(tmp_path, {"type": "byte"})
    assert write_huggingface(byte, tmp_path / "byte", progress=False) is None
    assert (tmp_path / "byte" / "tokenizer.json").is_file()

    made = tmp_path / "made by me"
    made.mkdir()
    words = tokenizers.models.WordLevel({"a": 0, "<eod>": 1}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text('{"eos_token": "<eod>"}')
    digest = hashlib.sha256((made / "tokenizer.json").read_bytes()).hexdigest()
    described = {"type": "hf", "model": str(made / "tokenizer.json"), "sha256": digest}
    source = trained_on(tmp_path, described)
    # The metadata's path is the checkpoint's choice: evaluation reads it, an export leaves it.
    problem = write_huggingface(source, tmp_path / "unnamed", progress=False)
    assert problem.endswith(f"is not copied unless you name it: --tokenizer '{made}'")
    assert not (tmp_path / "unnamed" / "tokenizer.json").exists()
    assert load_tokenizer(source).eos_token == "<eod>"
    assert write_huggingface(source, tmp_path / "hf", tokenizer=made, progress=False) is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (made / name).read_bytes()

    for i, (tokenizer, said) in enumerate(
        [
            (described | {"sha256": "0"}, "is gone or is not the file the data was made with"),
            ({"type": "tiktoken", "model": "gpt2"}, "no tokenizer: tiktoken gpt2 has no tokenizer"),
        ]
    ):
        source = trained_on(tmp_path, tokenizer)
        problem = write_huggingface(source, tmp_path / f"none{i}", progress=False)
        assert said in problem and "\n" not in problem
        assert not (tmp_path / f"none{i}" / "tokenizer.json").exists()
    problem = write_huggingface(RandomFolder(latent(4, 4)), tmp_path / "bare", progress=False)
    assert problem.startswith("no tokenizer: no files beside the weights, and no metadata of")
    assert problem.endswith("name one by --tokenizer byte or FOLDER")


def test_configuration(exported):
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    assert (config.model_type, config.eos_token_id, config.dtype) == ("mlra", 256, torch.float32)
    assert config.softmax_scale == pytest.approx((16 + 8) ** -0.5)
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.eos_token_id, generation.pad_token_id) == (256, 256)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (grouped(2, output_gate=True), "Llama has no output gate; use export-official"),
        (grouped(2, softmax_scale=0.1), "softmax_scale is 0.1, and Llama's is head_dim^-1/2"),
        (grouped(2, hidden_size=60), "hidden_size 60 is no multiple of num_attention_heads 8"),
    ],
)
def test_what_transformers_has_not_is_refused(description, said, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        write_huggingface(RandomFolder(description), tmp_path / "out", progress=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("description", "tokenizer", "said"),
    [
        (latent(4, 4, vocab_size=256, eod_token_id=None), "byte", "has 256 with end of document"),
        (latent(4, 4, vocab_size=300, eod_token_id=299), "byte", "ends documents with id 256"),
        (latent(4, 4), "nowhere", "tokenizer nowhere is neither 'byte' nor a folder"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(description, tokenizer, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        write_huggingface(
            RandomFolder(description), tmp_path / "out", tokenizer=tokenizer, progress=False
        )
    assert list(tmp_path.iterdir()) == []


class Beside(RandomFolder):
    """A folder with tokenizer files beside the weights."""

    def __init__(self, description, folder):
        super().__init__(description)
        self.beside = tokenizer_files(folder)

    def tokenizer_files(self):
        return self.beside


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", None, "/tokenizer.json has 257 tokens and the model 256; give the fol"),
        ("tokenizer.json", '{"a":', "/tokenizer.json is not a tokenizer.json: expected"),
        ("generation_config.json", "[]", "/generation_config.json is not a JSON object"),
        ("generation_config.json", '{"a": NaN}', "/generation_config.json is not JSON"),
        *(
            ("generation_config.json", f'{{"eos_token_id": {ids}}}', "the model's tokens are 0 to")
            for ids in ('"x"', "256", "-1", "true", "[1, 99999]", "1.0")
        ),
    ],
)
def test_tokenizer_files_that_do_not_fit_are_refused(name, text, said, named, tmp_path):
    """By the name of the file that was found, since its copy is gone after the refusal."""
    found = tmp_path / "found"
    found.mkdir()
    words = {"a": 0, "<eod>": 256 if text is None else 255}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.save(str(found / "tokenizer.json"))
    if text is not None:
        (found / name).write_text(text)
    model = latent(4, 4, vocab_size=256, eod_token_id=255)
    source = RandomFolder(model) if named else Beside(model, found)
    given = {"tokenizer": str(found)} if named else {}
    if named and name == "generation_config.json":  # that of another model is not copied
        assert write_huggingface(source, tmp_path / "out", **given, progress=False) is None
        return
    with pytest.raises(CheckpointError) as refused:
        write_huggingface(source, tmp_path / "out", **given, progress=False)
    assert said in str(refused.value) and str(found / name) in str(refused.value)
    assert ".partial" not in str(refused.value) and "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ["found"]


@pytest.mark.parametrize(("ids", "first"), [([], None), ([5, 7], 5), (None, None), (9, 9)])
def test_the_end_of_a_document_is_the_first_that_a_config_names(ids, first, exported):
    config = json.loads((exported / "config.json").read_text()) | {"eos_token_id": ids}
    (exported / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(exported).description.eod_token_id == first


def removed(weights):
    del weights[UP]


def renamed(weights):
    weights[UP.replace("kv_b", "kv_c")] = weights.pop(UP)


def reshaped(weights):
    weights[UP] = weights[UP][:, :-1].contiguous()


def of_another_variant(weights):
    weights[UP] = weights[UP].view(2, 16, 40, 16)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (removed, [f"missing {UP}"]),
        (renamed, [f"missing {UP}", "unknown model.layers.1.self_attn.kv_c_proj.weight"]),
        (reshaped, [f"{UP} is [4, 7, 40, 16], not [4, 8, 40, 16]"]),
        (of_another_variant, [f"{UP} is [2, 16, 40, 16], not [4, 8, 40, 16]"]),
    ],
)
def test_damaged_weights_are_refused_by_name(exported, damage, said):
    weights = load_file(exported / "model.safetensors")
    damage(weights)
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(exported)
    assert all(part in str(refused.value) for part in said)


def test_truncated_weights_are_refused(exported):
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read, truncated\?"):
        open_checkpoint(exported)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_branches": None}, "num_branches is None; it must be a whole number"),
        ({"num_branches": 3}, "num_branches 3 does not divide num_latent_heads 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' has no counterpart; only 'silu' has"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type 'llama3' has no counterpart"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters name no factor, original_max",
        ),
        ({"rms_norm_eps": ...}, "config.json names no rms_norm_eps"),
        ({"model_type": "gpt2"}, "config.json is of model_type 'gpt2'"),
    ],
)
def test_wrong_configurations_are_refused(exported, changes, said):
    config = json.loads((exported / "config.json").read_text())
    for name, value in changes.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    (exported / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(exported)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_saved_again_by_transformers_it_is_still_read(exported, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    first, again = open_checkpoint(exported), open_checkpoint(tmp_path / "again")
    assert again.description == first.description
    assert all(torch.equal(first.tensor(name), again.tensor(name)) for name in first.names())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


AHEAD = {
    "two layers": latent(4, 4, mtp_num_layers=2),
    "one for three tokens, experts": latent(
        2, 1, mtp_num_layers=3, mtp_use_repeated_layer=True, tie_embeddings=False, **EXPERTS
    ),
}
"""Models with layers of multi-token prediction."""


@pytest.mark.parametrize("name", AHEAD)
def test_multi_token_prediction_comes_along_and_back(name, tmp_path):
    source = RandomFolder(AHEAD[name])
    write_huggingface(source, tmp_path / "hf", tokenizer="byte", progress=False)
    exported = open_checkpoint(tmp_path / "hf")
    assert "mtp.layers.0.transformer_layer.input_layernorm.weight" in exported.names()
    write_megatron(exported, tmp_path / "back", progress=False)
    back = open_checkpoint(tmp_path / "back")
    for opened in (exported, back):
        assert opened.names() == source.names()
        assert all(torch.equal(opened.tensor(name), source.tensor(name)) for name in source.names())
        for field in ("mtp_num_layers", "mtp_use_repeated_layer"):
            assert getattr(opened.description, field) == getattr(source.description, field)
    # Numbered behind the decoder's layers, as DeepSeek-V3's are, without copies of the embedding.
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    last = {key.removeprefix("model.layers.1.") for key in stored if ".layers.1." in key}
    last |= {f"{part}.weight" for part in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    layers = range(2, 2 + source.description.draft_layers)
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_nextn_predict_layers"] == len(
        layers
    )
    for i in layers:
        found = {key for key in stored if key.startswith(f"model.layers.{i}.")}
        assert found == {f"model.layers.{i}.{name}" for name in last}


def test_transformers_leaves_multi_token_prediction_alone(exported, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "ahead"
    write_huggingface(RandomFolder(AHEAD["two layers"]), folder, tokenizer="byte", progress=False)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    plain = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    # What it saves has no such layers, and says so.
    model.save_pretrained(tmp_path / "again")
    again = open_checkpoint(tmp_path / "again").description
    assert again == open_checkpoint(exported).description and not again.mtp_num_layers


def test_llama_has_no_multi_token_prediction(tmp_path):
    said = []
    source = RandomFolder(grouped(2, mtp_num_layers=1))
    write_huggingface(source, tmp_path / "hf", tokenizer="byte", progress=False, say=said.append)
    assert said[0] == (
        "random: multi-token prediction (1 token ahead) is left out, which Llama has not"
    )
    assert open_checkpoint(tmp_path / "hf").description == grouped(2).replace(tokenizer_type=None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_nextn_predict_layers": 3}, "missing model.layers.4.enorm.weight"),
        ({"num_nextn_predict_layers": 1}, "unknown model.layers.3.eh_proj.weight [64, 128]"),
        ({"num_nextn_predict_layers": ...}, "unknown model.layers.2.eh_proj.weight [64, 128]"),
        ({"num_nextn_predict_layers": 9999}, "num_nextn_predict_layers is 9999, and the weights"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; it must be a whole"),
        ({"num_nextn_predict_layers": "2"}, "num_nextn_predict_layers is '2'; it must be a whole"),
        ({"num_nextn_predict_depths": 2}, "depths is 2, which needs num_nextn_predict_layers 1"),
        ({"hidden_size": 128}, "model.layers.2.eh_proj.weight is [64, 128], not [128, 256]"),
    ],
)
def test_wrong_multi_token_prediction_is_refused(changes, said, tmp_path):
    folder = tmp_path / "ahead"
    write_huggingface(RandomFolder(AHEAD["two layers"]), folder, tokenizer="byte", progress=False)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(folder)
    assert said in str(refused.value) and "\n" not in str(refused.value)
