"""lm-evaluation-harness on an exported folder, against this project's scorer."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.data.pipeline import PreprocessConfig, preprocess
from megatron_mlra.data.tokenizers import TokenizerSpec
from megatron_mlra.evaluation import scoring
from megatron_mlra.evaluation.cli import main, row
from megatron_mlra.evaluation.models import load_model, load_scorer
from megatron_mlra.evaluation.token_stream import read_stream
from support.random_checkpoint import RandomFolder, grouped, latent

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
ITEMS = [
    {"context": "Two and two is", "choices": [" four", " fünf", " a cat's"], "answer": 0},
    {"context": "x" * 90 + " then", "choices": [" y", " zebra crossing"], "answer": 1},
    {"context": "", "choices": ["Empty", "None at all"], "answer": 0},
    {"context": "Ends with a space ", "choices": ["so", "or not"], "answer": 1},
]
TEXTS = ["short", "ünïcode text that is longer than one window of 64 tokens. " * 4, "z" * 64]


@pytest.fixture(scope="module", params=["MLRA-4", "GQA"])
def exported(request, tmp_path_factory):
    """An exported folder of random weights, sharp enough that choices differ."""
    description = latent(4, 4) if request.param == "MLRA-4" else grouped(2)
    folder = tmp_path_factory.mktemp("eval") / request.param
    write_huggingface(RandomFolder(description), folder, tokenizer="byte", progress=False)
    return folder


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Folder of both tasks with their data; nothing of it comes from a network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"choices": ITEMS, "text": [{"text": text} for text in TEXTS]}
    for name, template in (("choices", CHOICES), ("text", ROLLING)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (tmp_path / f"{name}.yaml").write_text(template.format(file=file))
    return tmp_path


def test_harness_gives_the_scorers_log_likelihoods(exported, tasks, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "trust_remote_code": True, "dtype": "float32"},
        tasks=["local_choices", "local_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=3,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = {
        name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        for name in ("local_choices", "local_text")
    }
    theirs = [pair for sample in samples["local_choices"] for pair in sample["resps"]]
    scorer = load_scorer(exported, device="cpu", batch_size=5)
    ours = scorer.continuations(
        [(item["context"], choice) for item in ITEMS for choice in item["choices"]]
    )
    assert len(theirs) == len(ours) == 9
    for (pair,), score in zip(theirs, ours, strict=True):
        assert float(pair[0]) == pytest.approx(score.log_likelihood, abs=1e-4)
        assert str(pair[1]) == str(score.is_greedy)
    monkeypatch.setattr(scoring, "SHARED", 4)  # the choices of an item read their context once
    pairs = [(item["context"], choice) for item in ITEMS for choice in item["choices"]]
    assert [score.log_likelihood for score in scorer.continuations(pairs)] == pytest.approx(
        [score.log_likelihood for score in ours], abs=1e-5
    )
    rolling = [float(sample["resps"][0][0]) for sample in samples["local_text"]]
    mine = [score.log_likelihood for score in scorer.texts(TEXTS)]
    assert rolling == pytest.approx(mine, abs=1e-3)

    code = main(
        [str(exported), "--task", str(tasks / "choices.jsonl"), "--json", str(tasks / "out.json")]
    )
    assert code == 0
    accuracy = json.loads((tasks / "out.json").read_text())["task"][str(tasks / "choices.jsonl")]
    results = found["results"]["local_choices"]
    for name in ("acc", "acc_norm"):
        assert accuracy[name] == pytest.approx(results[f"{name},none"])


def test_perplexity_is_that_of_the_megatron_folder(exported, tmp_path, capsys):
    write_megatron(open_checkpoint(exported), tmp_path / "megatron", progress=False)
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[1])
    for folder, more in ((exported, []), (tmp_path / "megatron", ["--tokenizer", "byte"])):
        out = tmp_path / f"{folder.name}.json"
        assert main([str(folder), "--text", str(text), "--json", str(out), *more]) == 0
    first, second = (
        json.loads((tmp_path / f"{name}.json").read_text())["text"][str(text)]
        for name in (exported.name, "megatron")
    )
    assert first == second
    assert first["tokens"] == first["bytes"] == len(TEXTS[1].encode())
    assert first["perplexity"] == pytest.approx(
        math.exp(first["bits_per_byte"] * math.log(2)), rel=1e-9
    )
    assert "bits per byte" in capsys.readouterr().out


def test_rows_have_one_format():
    said = "a: loss 2.5000 nats per token (perplexity 12.18), 14,373 tokens"
    assert row("a", 2.5, "", 14373) == said
    assert row("a", 2.5, "4.3 bits per byte", 14373) == said.replace(
        ", 14", ", 4.3 bits per byte, 14"
    )
    assert "perplexity inf" in row("a", 1e3, "", 1) and "perplexity nan" in row(
        "a", float("nan"), "", 1
    )


def test_decoded_losses_are_the_models_and_fp8_is_near(exported, tmp_path, capsys):
    """A float32 cache gives the logits of transformers; an FP8 cache gives others nearby."""
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[1] * 3)
    preprocess(PreprocessConfig((str(text),), str(tmp_path / "set"), TokenizerSpec("byte")))
    command = [str(exported), "--data", f"set={tmp_path}/set", "--cache-dtype", "float32"]
    command += ["--max-length", "60", "--windows", "3", "--batch-size", "2", "--json"]
    if exported.name == "GQA":
        assert main([*command, str(tmp_path / "out.json"), "--cache-dtype", "fp8"]) == 2
        assert "an FP8 cache needs latent attention" in capsys.readouterr().err
        assert main([*command, str(tmp_path / "out.json")]) == 0
    else:
        command[4:5] = ["float32", "fp8"]
        assert main([*command, str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["decoded"]["set"]
    rows = [line for line in capsys.readouterr().out.splitlines() if "cache in" in line]
    assert ["logits off float32's" in line for line in rows] == [False, True][: len(found)]

    model = load_model(open_checkpoint(exported), "float32")
    stream = torch.from_numpy(read_stream(tmp_path / "set").astype("int64"))
    losses, last = [], (len(stream) - 1) // 60 - 1
    for start in (0, 60 * round(last / 2), 60 * last):
        window = stream[start : start + 61]
        with torch.no_grad():
            log_probs = model(window[None, :-1]).logits[0].log_softmax(-1)
        losses.append(-log_probs.gather(-1, window[1:, None])[30:].mean().item())
    whole = found["float32"]
    assert whole["tokens"] == 90 and whole["max_logit_error"] == 0
    assert whole["loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    if "fp8" in found:
        assert 0 < found["fp8"]["rms_logit_error"] < found["fp8"]["max_logit_error"] < 0.5
        assert found["fp8"]["loss"] == pytest.approx(whole["loss"], abs=0.05)


def test_windows_of_one_token_and_longer_than_the_model_was_trained_for(exported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((TEXTS[1] * 20)[:300])
    preprocess(PreprocessConfig((str(text),), str(tmp_path / "set"), TokenizerSpec("byte")))
    out = tmp_path / "out.json"
    data = [str(exported), "--data", f"set={tmp_path}/set", "--json", str(out), "--max-length"]
    every = ["--cache-dtype", "float32", "--windows", "1000", "--batch-size", str(10**9)]
    assert main([*data, "1", *every]) == 0
    found = json.loads(out.read_text())["decoded"]["set"]["float32"]
    stream = torch.from_numpy(read_stream(tmp_path / "set").astype("int64"))
    with torch.no_grad():
        logits = load_model(open_checkpoint(exported), "float32")(stream[:-1, None]).logits[:, 0]
    assert found["tokens"] == len(stream) - 1  # a window of one token has no prompt
    loss = torch.nn.functional.cross_entropy(logits, stream[1:]).item()
    assert found["loss"] == pytest.approx(loss, abs=1e-4)
    longest = open_checkpoint(exported).description.max_position_embeddings
    assert longest < 280 and main([*data, "280", *every]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", __file__, "--cache-dtype", "fp8"], "needs --data NAME=PREFIX; leave --text"),
        (["--cache-dtype", "fp8"], "needs --data NAME=PREFIX; leave --text"),
        (
            ["--data", "set", "--cache-dtype", "float32", "--dtype", "float16"],
            "--dtype float16 is of the weights beside an FP8 cache",
        ),
        ([], "nothing to evaluate; give --text, --data or --task"),
        (["--text", "missing.txt"], "missing.txt: No such file or directory"),
        (["--text", __file__, "--tokenizer", "nowhere"], "neither 'byte' nor a folder with"),
        (["--task", __file__], "not JSON"),
        (["--text", __file__, "--json", "/"], "--json / is a folder; name a file in it"),
        (["--text", __file__, "--device", "tpo"], "device is 'tpo'; use cpu, cuda or"),
        (["--task", "mixed.jsonl"], "mixed.jsonl holds items with and without choices"),
        (["--task", "blank.jsonl"], "blank.jsonl holds no items"),
    ],
)
def test_wrong_input_is_one_line(exported, capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    items = ITEMS[0], {"context": "a", "continuation": "b"}
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "blank.jsonl").write_text("\n")
    assert main([str(exported), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ") and error.count("\n") == 1
