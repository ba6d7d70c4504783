"""The decoding benchmark apart from its GPU: presets, cases, bytes, its table and plot."""

from __future__ import annotations

import json
import math
import re
import subprocess

import numpy as np
import pytest
import torch

from megatron_mlra.benchmarks.decoding import cli as tool
from megatron_mlra.benchmarks.decoding.guesses import measure_guesses, of_checkpoint
from megatron_mlra.benchmarks.decoding.kernels import (
    EPILOGUES,
    ROLES,
    profile_table,
    replays,
    role,
    summary,
)
from megatron_mlra.benchmarks.decoding.measure import random_reader
from megatron_mlra.benchmarks.decoding.place import Place
from megatron_mlra.benchmarks.decoding.plot import _finding
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.data.writer import DatasetWriter
from megatron_mlra.description.presets import preset_description
from megatron_mlra.description.tensors import expected_tensors
from mlra_kernels.benchmarks.timing import gpu_launches
from mlra_kernels.products.kernel import NAMES
from support import CONFIGS, ENV, ROOT
from support.random_checkpoint import RandomFolder, latent

TOOL = ROOT / "tools" / "benchmark_decoding.py"


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("mlra4", 2873220096), ("mla", 2872052736), ("mlra2_gated", 2872630272), ("gqa", 2872593408)],
)
def test_presets_are_the_papers_models(preset, parameters):
    model = preset_description(CONFIGS / f"{preset}_2.9b.yaml")
    assert sum(math.prod(shape) for shape in expected_tensors(model).values()) == parameters


@pytest.mark.parametrize("preset", ["gta", "nowhere"])
def test_other_presets_are_refused(preset):
    with pytest.raises(ValueError, match=r"use one|no such file"):
        preset_description(CONFIGS / f"{preset}_2.9b.yaml")


def test_cases_hold_every_model_whole_and_as_a_share():
    presets = [CONFIGS / f"{name}_2.9b.yaml" for name in ("mlra4", "mla", "gqa")]
    assert [case.label for case in tool.cases([4, 1], presets)] == [
        "MLRA-4 1/4", "MLRA-4 FP8 1/4", "MLRA-4 sharded 1/4", "MLA 1/4", "GQA-8 1/4",
        "MLRA-4 whole", "MLRA-4 FP8 whole", "MLA whole", "GQA-6 whole",
    ]  # fmt: skip


def test_a_world_is_cut_by_latents_or_by_tokens(capsys):
    presets = [CONFIGS / f"{name}_2.9b.yaml" for name in ("mlra4", "mla", "gqa")]
    two = tool.cases([1], presets, [1, 2], Place(ranks=2))
    assert [(case.label, case.tp, case.context) for case in two] == [
        ("MLRA-4 x2", 2, 1), ("MLRA-4 FP8 x2", 2, 1), ("MLRA-4 sharded x2", 2, 1), ("MLA x2", 2, 1),
        ("GQA-6 x2", 2, 1),
        ("MLRA-4 tokens cut in 2 x2", 1, 2), ("MLRA-4 tokens cut in 2 FP8 x2", 1, 2),
        ("MLRA-4 tokens cut in 2 sharded x2", 1, 2), ("MLA tokens cut in 2 x2", 1, 2),
        ("MLA tokens cut in 2 sharded x2", 1, 2), ("GQA-6 tokens cut in 2 x2", 1, 2),
    ]  # fmt: skip
    # What does not fit is left out with its reason.
    assert {case.tp for case in tool.cases([1], presets, [1, 8], Place(ranks=8))} == {8, 1}
    assert not tool.cases([1], presets, [1], Place(ranks=16)) and not tool.cases([16], presets)
    said = "left out: MLA: tensor parallel size 16 does not fit MLA (24 heads"
    assert said in capsys.readouterr().out
    with pytest.raises(ValueError, match="context parallel size 3 does not divide the number of"):
        tool.cases([1], presets, [3], Place(ranks=4))


def test_random_weights_repeat_and_are_not_zero():
    model = preset_description(CONFIGS / "mlra4_2.9b.yaml").replace(
        num_layers=1, hidden_size=64, ffn_hidden_size=48, vocab_size=100
    )
    first, again, other = (random_reader(model, "cpu", seed=seed) for seed in (1, 1, 2))
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert first(name).equal(again(name)) and not first(name).equal(other(name))
    assert 0.015 < float(first(name).float().std()) < 0.025
    assert 0.9 < float(first("decoder.final_layernorm.weight").float().mean()) < 1.1


def test_table_and_plot(tmp_path):
    common = {"label": "MLRA-4 1/4", "tp": 4, "weight_bytes": 2 * 10**9}
    records = [
        common
        | {"batch": 1, "context": 4096 * 8**i, "cache_bytes": 10**7, "us": 900.0 + i}
        | {"roof_us": 600.0, "share": 0.667}
        for i in range(2)
    ]
    records.append(common | {"batch": 32, "context": 524288, "cache_bytes": 155 * 10**9})
    lines = tool.table(records).splitlines()
    assert lines[2] == "| MLRA-4 1/4 | 1 | 4K | 900 | 600 | 67 % | 2.00 | 0.01 |"
    assert lines[4] == "| MLRA-4 1/4 | 32 | 512K | does not fit | | | 2.00 | 155.00 |"
    assert len({line.count("|") for line in lines}) == 1
    tool.plot(records, "a GPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    cut = {"label": "MLA tokens cut in 2 x2", "tp": 1, "context_parallel": 2, "gpus": 2}
    whole = {"label": "MLRA-4 x2", "tp": 2, "context_parallel": 1, "gpus": 2}
    both = [r | way for r in records[:2] for way in (cut, whole)]
    assert _finding(both) == (
        "32K tokens of context on 2 GPUs, ms per token: MLA tokens cut in 2 0.9, MLRA-4 0.9"
    )
    tool.plot(both, "two GPUs", tmp_path / "plot.png")
    rehearsed = tool.table([whole | r | {"fits": True} for r in records[2:]]).splitlines()[2]
    assert "| rehearsed | | |" in rehearsed


def test_a_plot_of_variations_alone_has_a_finding(tmp_path):
    """As of `--all-reduce nccl`, or where nothing but FP8 fits."""
    record = {"label": "MLRA-4 nccl x2", "tp": 2, "gpus": 2, "batch": 1, "context": 1024, "us": 900}
    assert _finding([record]) == "1K tokens of context on 2 GPUs, ms per token: MLRA-4 nccl 0.9"
    tool.plot([record], "two GPUs", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("context", "name"), [(1, "1"), (1000, "1000"), (1023, "1023"), (5000, "4.88K"), (4096, "4K")]
)
def test_contexts_that_are_no_whole_thousands_are_named(context, name):
    sizes = {"weight_bytes": 1, "cache_bytes": 1, "fits": True}
    (line,) = tool.table([{"label": "a", "batch": 1, "context": context} | sizes]).splitlines()[2:]
    assert line.startswith(f"| a | 1 | {name} | rehearsed ")


@pytest.mark.parametrize("cut", [(3, 1), (1, 3), (12, 2), (2, 6), (24, 1)], ids=str)
def test_a_rehearsal_takes_every_cut_that_the_models_take(cut, capsys):
    tp, context = map(str, cut)
    argv = ["--rehearse", "--configs", "mlra4_2.9b", "mla_2.9b", "gqa_2.9b", "--contexts", "5"]
    argv += ["--batches", "2", "--tp", tp, "--context-parallel", context, "--seed", "1"]
    code = tool.main(argv)
    found = capsys.readouterr()
    if code:  # no model takes the cut at its full size either
        assert "nothing is measured" in found.err and "left out: MLRA-4: tensor" in found.out
    assert "not reported" not in found.err


@pytest.mark.parametrize("seed", ["-1", "9" * 20])
def test_seeds_that_no_generator_takes_are_refused(seed, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--rehearse", "--contexts", "1", "--batches", "1", "--seed", seed])
    assert f"--seed: {seed} is no whole number from 0 to" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_one_line(warm_python):
    env = ENV | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([warm_python, TOOL], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr == "error: this benchmark needs a CUDA GPU, and torch sees none\n"


MARKED = "at::cuda::(anonymous namespace)::spin_kernel(long)"
FIRST, SECOND, HEADS = "product_kernel_plain_2112x3072", "combine_kernel", "heads_kernel_128to512"


def replay(start):
    """Launches of a replay behind its mark, in any order: 4 us; 3 us of which 2 overlap; a whole
    one under that; a pause of 2 us; and 1 us."""
    return [
        (MARKED, start - 9_000, 8_000), (FIRST, start + 7_000, 1_000), (HEADS, start + 3_500, 500),
        (SECOND, start + 2_000, 3_000), (FIRST, start, 4_000),
    ]  # fmt: skip


def test_kernels_of_a_profile_are_summed_by_what_they_add():
    launches = [launch for i in range(3) for launch in replay(100_000 * i)]
    # What has no mark in front or behind is no whole replay.
    launches += [(FIRST, -50_000, 7_000), (MARKED, 290_000, 8_000), (SECOND, 299_000, 7_000)]
    steps = list(replays(launches))
    assert [[name for name, *_ in step] for step in steps] == [[FIRST, SECOND, HEADS, FIRST]] * 3
    found = summary(steps)
    kernels = found.pop("kernels")
    assert found == pytest.approx(
        {"steps": 3, "step_us": 8, "busy_us": 6, "idle_us": 2, "launches": 4}
    )
    assert [(k["name"], k["launches"], k["us"]) for k in kernels] == [
        (FIRST, 2, pytest.approx(5)), (SECOND, 1, pytest.approx(1)), (HEADS, 1, 0)
    ]  # fmt: skip
    assert [k["share"] for k in kernels] == pytest.approx([5 / 8, 1 / 8, 0])
    record = {"label": "MLRA-4 whole", "batch": 1, "context": 8192, "profile": found}
    lines = profile_table(record | {"profile": found | {"kernels": kernels}}).splitlines()
    said = "MLRA-4 whole, 1 x 8K: 8 us a step when traced, 4 launches, busy 6 us, idle 2 us"
    assert lines[0] == said
    assert lines[4:] == [
        "| product 3072 to 2112 | 2 | 5.0 | 62.5 % |",
        "| attention: merge of parts | 1 | 1.0 | 12.5 % |",
        "| product per head 128 to 512 | 1 | 0.0 | 0.0 % |",
    ]
    assert len({line.count("|") for line in lines[2:]}) == 1
    json.dumps(kernels)


def test_steps_of_unlike_launches_and_long_tables():
    steps = [[(f"kernel_{n}", 1_000 * n, 1_000) for n in range(30)], [("kernel_0", 5, 1_000)], []]
    found = summary(steps)
    assert (found["steps"], found["launches"], found["idle_us"]) == (2, 15.5, 0)
    record = {"label": "a", "batch": 1, "context": 1, "profile": found}
    lines = profile_table(record).splitlines()
    assert len(lines) == 4 + 24 and lines[-1] == "| 7 others | 3.5 | 3.5 | 22.6 % |"
    for nothing in ([], [[]], list(replays([(FIRST, 0, 1), (MARKED, 5, 1)]))):
        record["profile"] = summary(nothing)
        assert (
            profile_table(record)
            == "a, 1 x 1: no profile: the tracer saw no kernel of a whole step"
        )


def test_a_profiler_without_a_gpu_saw_nothing():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2) + 1
    assert profiler.profiler.kineto_results.events() and gpu_launches(profiler) == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("product_kernel_swiglu_19760x3072", "product 3072 to 19760 + SwiGLU"),
        ("latent_decode_hopper_kernel", "attention"),
        ("merge_states_kernel", "attention: merge of parts or ranks"),
        ("_add_rms_norm_kernel", "norm"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclArgs<4096ul>)", "collective of NCCL"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "product of cuBLAS"),
        ("void at::native::(anonymous namespace)::vectorized_gather<16>(char*)",
         "at::native::vectorized_gather"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
    ],
)  # fmt: skip
def test_what_kernels_do_follows_from_their_names(name, what):
    assert role(name).startswith(what)


def test_roles_name_kernels_that_are_there():
    """A kernel of the project that is renamed is renamed in the profile too."""
    code = "\n".join(path.read_text() for path in (ROOT / "kernels/mlra_kernels").rglob("*.py"))
    for names in ROLES:
        for name in re.sub(r"(\w+)\((\w+)\)\?(\w+)", r"\1\2\3|\1\3", names).split("|"):
            assert f"def {name}(" in code, name
    assert tuple(EPILOGUES) == NAMES


@pytest.mark.parametrize("other", ["--rehearse", "--speculate"])
def test_a_profile_needs_steps_that_are_timed(other, guessing, capsys):
    folder = [str(guessing)] if other == "--speculate" else []
    assert tool.main([other, *folder, "--profile"]) == 2
    error = capsys.readouterr().err
    assert f"timed alone, and {other} has none; leave one of them out" in error
    assert error.count("\n") == 1


def write_stream(prefix, tokens):
    """An indexed dataset of one document."""
    with DatasetWriter(str(prefix), np.uint16, overwrite=False) as writer:
        writer.add(np.array(list(tokens), np.uint16), np.array([len(tokens)]))
        writer.publish({})


GUESSING = latent(4, 4, mtp_num_layers=1)


@pytest.fixture(scope="module")
def guessing(tmp_path_factory):
    """A checkpoint with a layer of multi-token prediction."""
    folder = tmp_path_factory.mktemp("guessing") / "hf"
    write_huggingface(RandomFolder(GUESSING), folder, tokenizer="byte", progress=False)
    return folder


def test_guesses_of_a_checkpoint_are_measured(guessing, tmp_path, capsys):
    out = tmp_path / "guesses.json"
    argv = ["--batches", "1", "3", "--contexts", "20", "--new-tokens", "9", "--json", str(out)]
    tool.main(["--speculate", str(guessing), *argv])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[1:]}) == 1
    for batch, line in zip((1, 3), lines[3:], strict=True):
        assert line.startswith(f"| MLRA-4 (hf) | {batch} | 20 | ")
    for record in json.loads(out.read_text())["records"]:
        assert record["equal_outputs"] == record["batch"]
        assert record["plain_tokens_per_step"] == 1
        assert 1 <= record["guessing_tokens_per_step"] <= 2
        ratio = record["plain_ms"] / record["guessing_ms"]
        gain = record["guessing_tokens_per_step"] * ratio
        assert record["speed_up"] == pytest.approx(gain)
        assert record["pays_from"] == pytest.approx(1 / ratio - 1)


def test_prompts_of_a_dataset_lie_at_equal_distances(guessing, tmp_path, capsys):
    write_stream(tmp_path / "data", [n % 50 for n in range(101)])
    guesser = of_checkpoint(str(guessing), None, str(tmp_path / "data"))
    assert guesser.prompts(3, 21) == [[n % 50 for n in range(a, a + 21)] for a in (0, 40, 80)]
    assert guesser.prompts(1, 4) == [[0, 1, 2, 3]]
    write_stream(tmp_path / "foreign", [GUESSING.vocab_size] * 40)
    with pytest.raises(ValueError, match=f"holds token {GUESSING.vocab_size} and the model has"):
        of_checkpoint(str(guessing), None, str(tmp_path / "foreign")).prompts(2, 20)
    argv = ["--data", str(tmp_path / "data"), "--temperature", "0", "0.5", "--batches", "2"]
    tool.main(["--speculate", str(guessing), *argv, "--contexts", "20", "--new-tokens", "9"])
    lines = capsys.readouterr().out.splitlines()[3:]
    for line, temperature in zip(lines, ("0", "0.5"), strict=True):
        assert line.startswith(f"| MLRA-4 (hf) | 2 | 20 | {temperature} | ")


def test_guesses_of_presets_are_rehearsed(capsys):
    argv = ["--rehearse", "--speculate", "--configs", "mlra4_2.9b", "gqa_2.9b", "--batches", "2"]
    tool.main([*argv, "--contexts", "70", "--new-tokens", "5", "--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "| MLRA-4, random | 2 | 70 | 0 | rehearsed | rehearsed | 0 of " in lines[3]
    assert "| GQA, random | 2 | 70 | 0 | rehearsed | rehearsed | " in lines[6]


def test_guesses_are_measured_with_the_products_that_the_report_names(guessing):
    place = Place(rehearsal=True, products="none of them")
    with pytest.raises(ValueError, match="products is 'none of them'"):
        measure_guesses(of_checkpoint(str(guessing), None), 1, 20, 9, 0.0, place)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--contexts", "60"], "--contexts 60 and --new-tokens 9 exceed the model's 64 positions"),
        (["--context-parallel", "2"], "--speculate needs whole sequences; leave"),
        (["--data", "DATA"], "--data DATA has 30 tokens, and 2 prompts of 20 are asked for; use"),
        (["--data", "DATA", "--text", "TEXT"], "--data is for --speculate FOLDER, in place of"),
        (["--text", "TEXT"], "the text makes 1 prompts of 20 tokens, and 2 of 20 are asked for"),
    ],
)
def test_guesses_that_cannot_be_measured(argv, said, guessing, tmp_path, capsys):
    (tmp_path / "text").write_text("x" * 30)
    write_stream(tmp_path / "data", range(30))
    files = {"TEXT": str(tmp_path / "text"), "DATA": str(tmp_path / "data")}
    own = [files.get(word, word) for word in argv]
    said = said.replace("DATA", files["DATA"])
    common = ["--batches", "2", "--contexts", "20", "--new-tokens", "9"]
    assert tool.main(["--speculate", str(guessing), *common, *own]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_checkpoint_without_a_layer_has_no_guesses(tmp_path, capsys):
    write_huggingface(RandomFolder(GUESSING.decoder()), tmp_path / "hf", progress=False)
    assert tool.main(["--speculate", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert "has none; train with --mtp-num-layers 1, or leave the folder out" in error


def test_a_cut_that_no_model_has_measures_nothing(capsys):
    assert tool.main(["--rehearse", "--configs", "mlra4_2.9b", "--tp", "7"]) == 2
    assert (
        "error: nothing is measured: no model of --configs can be cut so" in capsys.readouterr().err
    )
