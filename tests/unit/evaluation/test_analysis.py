"""mlra analyze: its quantities against closed forms and the oracle, its refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.evaluation.analysis import layers
from megatron_mlra.evaluation.analysis.cli import main
from megatron_mlra.evaluation.analysis.layers import LayerSums, Moments, effective_rank, rank
from megatron_mlra.evaluation.analysis.passes import Passes, spread
from megatron_mlra.evaluation.models import load_model
from support.oracle import rms_norm, rotate
from support.random_checkpoint import RandomFolder, grouped, latent

VARIANTS = {
    "MLA": latent(1, 1),
    "GLA-2": latent(2, 1),
    "MLRA-2": latent(4, 2),
    "MLRA-4 gated": latent(4, 4, output_gate=True, query_head_norm=True),
}
WINDOW = (np.arange(40) * 7 % 257, (np.arange(40) * 7 + 7) % 257)


def model_of(description):
    return load_model(RandomFolder(description), "float32")


def measured(model, window=WINDOW, **flags) -> dict:
    """What one window gives, without the command line."""
    passes, steps = Passes(model, "cpu", **flags), []
    passes.add(window, lambda: steps.append(1))
    assert len(steps) == passes.steps()
    return passes.result()


def test_rank_counts_directions():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    # Shares 3/4 and 1/4, by hand.
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert effective_rank(torch.zeros(4)) == rank(torch.zeros(4)) == 0
    moments, draw = Moments(), torch.Generator().manual_seed(1)
    low = torch.randn(300, 3, generator=draw) @ torch.randn(3, 16, generator=draw)
    full = torch.randn(300, 16, generator=draw)
    for part in torch.stack((low, full), 1).split(77):
        moments.add_products(part)
    assert [rank(each) for each in moments.eigenvalues()] == [3, 16]
    numpy = np.linalg.eigvalsh(np.cov(low.double().numpy().T, bias=True))
    assert np.allclose(moments.eigenvalues()[0].numpy(), numpy.clip(0), atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_is_measured_as_the_method_defines_it(name, monkeypatch):
    """Every quantity once more, token by token, head by head and branch by branch."""
    monkeypatch.setattr(layers, "SCORES_AT_ONCE", 8 * 4 * 13 * 3)  # several blocks of queries
    shape, length = VARIANTS[name], 13
    attention = model_of(shape).model.layers[0].self_attn.double()
    x = torch.randn(length, 64, generator=torch.Generator().manual_seed(2)).double()
    from megatron_mlra.hf.attention_mlra import rope_cos_sin

    sums = LayerSums(attention)
    sums.add(x[None], rope_cos_sin(attention.config, torch.arange(length)[None]))
    found = sums.result()

    w = {name: p.detach() for name, p in attention.named_parameters()}
    heads, branches, groups = 8, shape.num_branches, shape.num_latent_heads // shape.num_branches
    size = 64 // shape.num_latent_heads
    c_q = [rms_norm(w["q_a_proj.weight"] @ t, w["q_a_layernorm.weight"], 1e-6) for t in x]
    queries = [(w["q_b_proj.weight"] @ (c * math.sqrt(2))).view(heads, 24) for c in c_q]
    if shape.query_head_norm:
        norm = w["query_head_norm.weight"].view(heads, 24)
        queries = [
            torch.stack([rms_norm(*pair, 1e-6) for pair in zip(q, norm, strict=True)])
            for q in queries
        ]
    down = [w["kv_a_proj_with_mqa.weight"] @ t for t in x]
    scale = math.sqrt(64 / size)
    latents = [
        [
            rms_norm(d[i * size :][:size], w["kv_a_layernorm.weight"][i * size :][:size], 1e-6)
            * scale
            for i in range(shape.num_latent_heads)
        ]
        for d in down
    ]
    rows, outputs, variances = {}, {}, []
    for branch in range(branches):
        for head in range(heads):
            i = branch * groups + head // (heads // groups)
            up = w["kv_b_proj.weight"][branch, head]
            keys = [up[:16] @ latents[t][i] for t in range(length)]
            variances.append(torch.stack(keys).var(0, correction=0).mean())
            for q in range(length):
                turned = rotate(queries[q][head, 16:], q, 10000.0)
                scores = [
                    queries[q][head, :16] @ keys[t] + turned @ rotate(down[t][64:], t, 10000.0)
                    for t in range(q + 1)
                ]
                p = (torch.stack(scores) / math.sqrt(24)).softmax(0)
                rows[branch, head, q] = p
                values = torch.stack([up[16:] @ latents[t][i] for t in range(q + 1)])
                outputs[branch, head, q] = p @ values

    def entropy(p):
        return float(-sum(v * math.log(v) for v in p.tolist() if v))

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    places = [(h, q) for h in range(heads) for q in range(length)]
    for a in range(branches):
        mine = mean(entropy(rows[a, h, q]) for h, q in places)
        assert found["entropy"][a] == pytest.approx(mine, rel=1e-4)
        for b in range(branches):
            cosine = mean(
                float(torch.cosine_similarity(outputs[a, h, q], outputs[b, h, q], 0))
                for h, q in places
            )
            assert found["cosine"][a][b] == pytest.approx(cosine, abs=1e-5)
            jensen_shannon = mean(
                entropy((rows[a, h, q] + rows[b, h, q]) / 2)
                - (entropy(rows[a, h, q]) + entropy(rows[b, h, q])) / 2
                for h, q in places
            )
            assert found["divergence"][a][b] == pytest.approx(jensen_shannon, abs=1e-6)
    assert found["entropy_of_equal_weights"] == pytest.approx(math.lgamma(length + 1) / length)
    rope = torch.stack([d[64:] for d in down]).var(0, correction=0).mean()
    assert found["rope_key_variance"] == pytest.approx(float(rope), rel=1e-6)
    nope = torch.stack(variances).view(branches, heads).mean(1)
    assert found["nope_key_variance"] == pytest.approx(nope.tolist(), rel=1e-6)
    without = found["nope_key_variance_without_calibration"]
    assert without == pytest.approx((nope / scale**2).tolist(), rel=1e-6)


def test_uncalibrated_models_are_told_with_and_without_too():
    """What calibration would do is told of a model that has none: the same weights, one switch."""
    with_, without = (
        measured(model_of(latent(4, 4, num_layers=1, variance_scaling=on)), ablate=False)
        for on in (True, False)
    )
    # Of one layer only: behind it the models differ.
    for name in ("nope_key_variance", "nope_key_variance_without_calibration"):
        assert with_["layers"][0][name] == pytest.approx(without["layers"][0][name], rel=1e-5)
    assert "ablation" not in with_["layers"][0] and "ablation_in_all_layers" not in with_


def test_a_branch_without_values_costs_nothing_and_each_ablation_is_what_it_says():
    model = model_of(latent(4, 4))
    weight = model.model.layers[1].self_attn.kv_b_proj.weight
    with torch.no_grad():
        weight[2, :, 16:] = 0
    before = weight.detach().clone()
    found = measured(model)
    assert found["layers"][1]["ablation"][2]["loss"] == 0.0
    assert torch.equal(weight, before)
    tokens, targets = (torch.from_numpy(part) for part in WINDOW)

    def loss() -> float:
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        return float(torch.nn.functional.cross_entropy(logits, targets))

    base = loss()
    assert found["loss"] == pytest.approx(base, rel=1e-6)
    for places, told in (
        ([(0, 3)], found["layers"][0]["ablation"][3]),
        ([(0, 1), (1, 1)], found["ablation_in_all_layers"][1]),
    ):
        other = model_of(latent(4, 4))
        with torch.no_grad():
            other.model.layers[1].self_attn.kv_b_proj.weight[2, :, 16:] = 0
            for layer, branch in places:
                other.model.layers[layer].self_attn.kv_b_proj.weight[branch, :, 16:] = 0
        model = other
        assert told["loss"] == pytest.approx(loss() - base, abs=1e-5) and told["loss"] != 0


def test_identical_branches_are_alike_and_low_rank_latents_are_seen():
    model = model_of(latent(4, 4))
    module = model.model.layers[0].self_attn
    with torch.no_grad():
        down = module.kv_a_proj_with_mqa.weight[:64].view(4, 16, 64)
        down[:] = down[0].clone()
        # The latent is RMSNorm's, so what its rows span is kept: 5 of 16 directions.
        down[:, 5:] = 0
        module.kv_a_layernorm.weight.view(4, 16)[:] = 1.0
        module.kv_b_proj.weight[:] = module.kv_b_proj.weight[0].clone()
    found = measured(model, ablate=False)["layers"]
    assert np.array_equal(found[0]["divergence"], np.zeros((4, 4)))
    assert np.allclose(found[0]["cosine"], 1)
    assert len(set(found[0]["entropy"])) == 1
    assert found[0]["latent_rank"] == [5] * 4 and max(found[0]["latent_effective_rank"]) <= 5
    other = np.array(found[1]["divergence"])
    assert (other[~np.eye(4, dtype=bool)] > 1e-3).all() and other.max() < math.log(2)


def test_windows_are_spread_evenly():
    windows = [(np.full(10, i), np.full(10, i)) for i in range(12)]
    assert [int(a[0]) for a, _ in spread(windows, 30)] == [0, 4, 8]
    assert len(spread(windows, 3)) == 1 and len(spread(windows, 10**9)) == 12


def test_the_command_tells_writes_and_draws(tmp_path, capsys):
    folder = tmp_path / "exported"
    write_huggingface(RandomFolder(latent(4, 4)), folder, tokenizer="byte", progress=False)
    text = tmp_path / "text.txt"
    text.write_text("A text that is held out, of which windows are taken. " * 8)
    more = ["--text", str(text), "--tokens", "128", "--device", "cpu"]
    out = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([str(folder), *more, *out]) == 0
    said = capsys.readouterr().out
    assert "MLRA-4, loss " in said and "of 8 idle" in said and "variance of NoPE keys" in said
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["tokens"] == 128 and found["windows"] == 2 and len(found["layers"]) == 2
    assert found["layers"][0]["ablation"][0]["standard_error"] > 0
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_a_model_without_rope_has_no_variance_of_its_keys(tmp_path, capsys):
    folder, text = tmp_path / "exported", tmp_path / "text.txt"
    shape = latent(4, 4, qk_rope_head_dim=0)
    write_huggingface(RandomFolder(shape), folder, tokenizer="byte", progress=False)
    text.write_text("A text that is held out.")
    out = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main([str(folder), "--text", str(text), "--no-ablation", "--device", "cpu", *out]) == 0
    said = capsys.readouterr().out
    assert "nan" not in said and "RoPE keys" not in said
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert [layer["rope_key_variance"] for layer in found["layers"]] == [None, None]


def test_what_cannot_be_analyzed_is_one_line(tmp_path, capsys):
    folder, text = tmp_path / "gqa", tmp_path / "text.txt"
    text.write_text("text")
    write_huggingface(RandomFolder(grouped(2)), folder, tokenizer="byte", progress=False)
    for flags, said in (
        ([], "nothing to analyze on; give held-out text by --data or --text"),
        (["--text", str(text)], f"{folder} is GQA, which has no latents to analyze"),
        (["--text", str(text), "--plot", "a.txt"], "--plot a.txt ends in none of .png, .svg"),
        (["--data", "nowhere"], "data file nowhere.idx does not exist"),
        (["--data", "x=a", "x=b"], "--data names x twice"),
    ):
        assert main([str(folder), *flags, "--device", "cpu"]) == 2
        printed = capsys.readouterr()
        assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    for flags, said in (
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--tokens", "0"], "--tokens: 0 is no whole number of at least 2"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), "--text", str(text), *flags])
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1


def test_a_model_whose_loss_is_no_number_is_refused():
    model = model_of(latent(4, 4))
    with torch.no_grad():
        model.model.layers[1].self_attn.kv_b_proj.weight[0] = math.inf
    with pytest.raises(ValueError, match="the model's loss is nan on a window of 40 tokens; check"):
        measured(model)
