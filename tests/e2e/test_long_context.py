"""A trained model's context made four times as long, by YaRN and by a larger RoPE base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.evaluation.token_stream import read_stream, windows
from megatron_mlra.hf.modeling_mlra import MLRAForCausalLM
from megatron_mlra.inference.cli import main as generate

L = 64
SHORT = ("--seq-length", L, "--max-position-embeddings", L, "--vocab-size", 272)
LONG = ("--seq-length", 4 * L, "--max-position-embeddings", 4 * L, "--vocab-size", 272)
QUICK = ("--lr", "4e-3", "--eval-iters", 0, "--save-interval", 10000, "--log-interval", 50)
WAYS = {
    "base": ("--rotary-base", 160000),
    "yarn": (
        *("--rope-type", "yarn", "--rotary-scaling-factor", 4),
        *("--yarn-original-max-position-embeddings", L, "--mscale", 0.707),
        *("--mscale-all-dim", 0.707),
    ),
}
SAID = {
    "base": "rotary base 10000 -> 160000, sequence length 64 -> 256, positions 64 -> 256, as asked",
    "yarn": "rope type rope -> yarn, rotary scaling factor 4, original max position embeddings 64,"
    " beta fast 32, beta slow 1, mscale 0.707, mscale all dim 0.707, sequence length 64 -> 256,"
    " positions 64 -> 256, as asked",
}

LOST = {
    "base": "rotary_base is 160000 there, 10000 here (--rotary-base 160000 goes on with it,"
    " --rotary-base 10000 changes it)",
    "yarn": "rope_type is yarn there, rope here (--rope-type yarn goes on with it, --rope-type rope"
    " changes it)",
}


@pytest.fixture(scope="module")
def trained(entry, preset, tmp_path_factory) -> Path:
    """The `--save` of a run at the short length."""
    folder = tmp_path_factory.mktemp("short")
    argv = ["--config", preset, *SHORT, *QUICK, "--train-iters", 300, "--global-batch-size", 16]
    argv += ["--micro-batch-size", 16, "--save", folder / "save"]
    run = entry.run(folder, *argv)
    assert run.code == 0, run.err
    return folder / "save"


def exported(save: Path, folder: Path) -> MLRAForCausalLM:
    """The model that users of transformers get."""
    assert convert(["export-hf", str(save), str(folder), "--tokenizer", "byte", "--quiet"]) == 0
    return MLRAForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def token_losses(model: MLRAForCausalLM, corpus: Path) -> list[torch.Tensor]:
    """Nats of every token of the corpus, in rows of windows of 4 L, the last one shorter."""
    rows = [
        tuple(torch.from_numpy(part.astype(np.int64)) for part in row)
        for row in windows(read_stream(str(corpus)), 256, 4 * L)
    ]
    found = []
    for some in (rows[:100], rows[100:-1], rows[-1:]):
        inputs, labels = (torch.stack(part) for part in zip(*some, strict=True))
        logits = model(inputs).logits.float()
        found += F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return found


@pytest.fixture(scope="module")
def before(trained, corpus, tmp_path_factory) -> torch.Tensor:
    """Mean loss of the short model by position, also where it was never trained."""
    model = exported(trained, tmp_path_factory.mktemp("before") / "hf")
    return torch.stack(token_losses(model, corpus)[:-1]).mean(0)


@pytest.mark.parametrize("way", WAYS)
def test_four_times_the_context(entry, preset, corpus, trained, before, tmp_path, way):
    save, hf = tmp_path / "save", tmp_path / "hf"
    argv = ["--config", preset, *LONG, *QUICK, *WAYS[way]]
    tuning = [*argv, "--lr", "1e-3", "--train-iters", 80, "--global-batch-size", 8]
    tuning += ["--load", trained, "--finetune", "--save", save, "--held-out", f"text={corpus}"]
    run = entry.run(tmp_path / "tuning", *tuning)
    assert run.code == 0, run.err
    assert f"{trained}/iter_0000300: {SAID[way]}\n" in run.out
    model = exported(save, hf)
    losses = token_losses(model, corpus)
    # The exported model has Megatron's logits, and continues as the engine does.
    held_out = json.loads((save / "held_out.json").read_text())["sets"]["text"]["loss"]
    assert torch.cat(losses).mean().item() == pytest.approx(held_out, abs=2e-5)
    assert convert(["verify", str(save), str(hf), "--quiet"]) == 0
    prompt = bytes(read_stream(str(corpus))[: 3 * L].astype(np.uint8)).decode("ascii", "replace")
    ids = torch.tensor([list(prompt.encode())])
    wanted = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.size(1) :].tolist()
    argv = ["--prompt", prompt, "--max-new-tokens", "16", "--output", str(tmp_path / "out.jsonl")]
    assert generate([str(save), *argv]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["tokens"] == wanted
    after = torch.stack(losses[:-1]).mean(0)
    assert after[:L].mean() < 1.02 * before[:L].mean()
    assert after[3 * L :].mean() < 1.02 * before[:L].mean() < 0.9 * before[3 * L :].mean()
    # What the weights were trained with comes along, and is not lost where nobody names it.
    back = ["import-hf", str(hf), str(tmp_path / "back"), "--padded-vocab-size", "272", "--quiet"]
    assert convert(back) == 0
    again = ["--config", preset, *LONG, *QUICK, "--load", tmp_path / "back", "--exit-interval", 1]
    run = entry.run(tmp_path / "unsaid", *again)
    assert run.code == 2 and LOST[way] in run.err
    run = entry.run(tmp_path / "again", *again, *WAYS[way])
    assert run.code == 0 and "as asked" not in run.out, run.err
