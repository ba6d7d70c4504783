"""tools/twin.py: the paper's own twins to the digit, what it writes and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.megatron_args import from_megatron_args
from megatron_mlra.description.presets import preset_values
from megatron_mlra.planner.twin import VARIANTS, twin
from support import CONFIGS, ROOT

# The paper's configurations were made equal to MHA's: variant -> MLP size.
PUBLISHED = {
    "mha": 8192,
    "mqa": 10152,
    "gqa": 9728,
    "mla": 9448,
    "gla2": 10048,
    "gla4": 10136,
    "mlra2": 10048,
    "mlra4": 9880,
    "mla-gated": 8424,
    "gla2-gated": 9024,
    "mlra2-gated": 9024,
    "mlra4-gated": 8856,
    "gqa-gated": 8704,
    "gta": 9960,
    "mfa": 8024,
    "tpa": 10760,
}


def run(*argv: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/twin.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_twins_of_the_papers_mha_are_its_configurations(variant):
    found = twin(CONFIGS / "mha_2.9b.yaml", variant)
    name = variant.replace("-", "_")
    assert found.shape == from_megatron_args(preset_values(CONFIGS / f"{name}_2.9b.yaml"))
    assert found.shape.ffn_hidden_size == PUBLISHED[variant]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("source", ["mlra4_2.9b", "gqa_qwen_8b", "mlra4_70b", "mlra4_moe_16b"])
def test_every_twin_is_equal_within_a_thousandth(source, variant, tmp_path):
    preset = CONFIGS / f"{source}.yaml"
    found = twin(preset, variant)
    written = tmp_path / "twin.yaml"
    written.write_text(found.to_yaml(tmp_path, source))
    values = preset_values(written)
    shape = from_megatron_args({"swiglu": True} | values)
    assert shape == found.shape
    original = preset_values(preset)
    whole = parameters(from_megatron_args({"swiglu": True} | original)).total
    assert abs(parameters(shape).total / whole - 1) <= 1e-3
    # What says nothing of attention is kept.
    kept = ("num_layers", "hidden_size", "seq_length", "lr", "train_iters", "num_experts")
    assert [values.get(k) for k in kept] == [original.get(k) for k in kept]
    ranks = values.get("tensor_model_parallel_size") or 1
    assert shape.ffn_hidden_size % ranks == 0
    assert values.get("variance_scaling", True) != variant.endswith("-unscaled")
    assert found.title.endswith("unscaled") == variant.endswith("-unscaled")


def test_a_latent_twin_keeps_the_sources_sizes():
    values = twin(CONFIGS / "mlra4_70b.yaml", "mla").values
    assert (values["q_lora_rank"], values["kv_lora_rank"]) == (2880, 512)
    assert twin(CONFIGS / "mlra4_70b.yaml", "gla2").values["q_lora_rank"] == 1920
    assert "q_lora_rank" not in twin(CONFIGS / "mlra4_moe_16b.yaml", "gla2").values


def test_a_norm_of_query_heads_is_kept_or_becomes_megatrons(tmp_path):
    source = tmp_path / "normed.yaml"
    source.write_text("base: mlra4_2.9b\nquery_head_norm: true\n")
    for variant, norm in (("mla", "query_head_norm"), ("gqa", "qk_layernorm"), ("tpa", None)):
        values = twin(source, variant).values
        kept = {name for name in ("query_head_norm", "qk_layernorm") if values.get(name)}
        assert kept == ({norm} if norm else set())


def test_layers_without_rope_have_twins_that_can_be_trained(tmp_path):
    source = tmp_path / "pattern.yaml"
    source.write_text("base: debug\nno_rope_freq: 2\n")
    assert twin(source, "gqa").shape.no_rope_pattern == (0, 1, 0, 1)
    for variant in ("gta", "mfa", "tpa"):
        with pytest.raises(ValueError, match=f"attention '{variant}' does not go with no_rope"):
            twin(source, variant)


def test_the_command_writes_the_preset_and_prints_both(tmp_path):
    made = run(CONFIGS / "mha_2.9b.yaml", "--attention", "mlra4", "--output", tmp_path / "t.yaml")
    assert made.returncode == 0, made.stderr
    *lines, wrote = made.stdout.splitlines()
    rows = {line[:36].strip(): line[36:].split() for line in lines}
    assert rows["parameters"][0] == "2,872,593,408" and rows["difference"] == ["+0.0218", "%"]
    assert rows["attention"] == ["MHA", "MLRA-4"] and len(rows["TP8"]) == 2
    assert max(map(len, lines)) <= 80
    assert wrote == f"wrote {tmp_path / 't.yaml'}"
    assert preset_values(tmp_path / "t.yaml") == preset_values(CONFIGS / "mlra4_2.9b.yaml")
    again = run(CONFIGS / "mha_2.9b.yaml", "--attention", "mla", "--output", tmp_path / "t.yaml")
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_bad_input_is_one_line():
    tiny = ROOT / "examples/reproduce/rehearsal/presets/tiny_mla.yaml"
    for argv, said in (
        ((CONFIGS / "mha_2.9b.yaml", "--attention", "gla3"), "--attention is 'gla3'; use one of"),
        ((CONFIGS / "no.yaml", "--attention", "mla"), "no such file"),
        ((tiny, "--attention", "mlra4"), "use a larger preset"),
        ((tiny, "--attention", "mla", "--output", "/proc/a/b.yaml"), "cannot be made"),
    ):
        failed = run(*argv)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
        assert said in failed.stderr
