"""The training benchmark's cases, table and plot; what it times is for a GPU."""

import json
import os
import subprocess
import sys

import pytest

from megatron_mlra.benchmarks.training import report
from megatron_mlra.benchmarks.training.case import Case, Load, parse_case
from megatron_mlra.benchmarks.training.measure import Result, SublayerResult
from megatron_mlra.benchmarks.training.plot import plot
from support import ROOT


def result(case: Case, rate: float) -> Result:
    return Result(
        case=str(case),
        variant=case.variant,
        recipe=case.recipe,
        form="absorbed",
        seq_length=case.seq_length,
        tokens=8192,
        parameters=1,
        layers=6,
        gate=0.01,
        step_ms=100.0,
        spread_ms=1.0,
        tokens_per_second=rate,
        model_tflops=300.0,
        hardware_tflops=310.0,
        mfu=0.4,
        weights_gib=5.0,
        gradients_gib=6.0,
        optimizer_gib=7.0,
        activations_gib=1.5,
        peak_gib=20.0,
        loss=11.0,
    )


def test_a_case_is_read_from_its_text():
    assert Case.parse("mlra4") == Case("mlra4", "bf16", "auto", 2048)
    case = Case.parse("mla/delayed/materialized/4096")
    assert case == Case("mla", "delayed", "materialized", 4096)
    assert str(case) == "mla/delayed/materialized/4096"
    assert Case.parse("stock-mla").preset() == Case("mla").preset()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlra5", "use stock-mla or one of debug, "),
        ("mlra4/fp8", "'fp8'; use one of bf16, delayed"),
        ("mlra4/bf16/fast", "'fast'; use one of auto, absorbed"),
        ("mlra4/bf16/auto/long", "use VARIANT/RECIPE/FORM/SEQ_LENGTH"),
        ("mlra4/bf16/auto/0", "use VARIANT/RECIPE/FORM/SEQ_LENGTH"),
        ("mlra4/bf16/auto/2048/6", "use VARIANT/RECIPE/FORM/SEQ_LENGTH"),
    ],
)
def test_what_is_no_case_is_refused(text, words):
    with pytest.raises(ValueError, match="--case") as error:
        Case.parse(text)
    assert words in str(error.value)


def test_arguments_follow_the_case():
    load = Load(num_layers=3, tokens=256, micro_batches=2, flags=("--no-variance-scaling",))
    args, config = parse_case(Case("debug", "bf16", "materialized", 64), load)
    assert (args.num_layers, args.micro_batch_size, args.global_batch_size) == (3, 4, 8)
    assert args.ffn_hidden_size % 16 == 0 and not config.absorbed
    assert config.kv_scale == 1.0


def test_experts_are_cut_to_the_layers_and_to_one_gpu():
    for variant in ("mlra4_moe_16b", "stock-mla_moe_16b"):
        case = Case.parse(f"{variant}/bf16/auto/64")
        assert case.has_experts and not case.is_fused
        load = Load(num_layers=3, tokens=64, flags=("--no-moe-grouped-gemm",))
        args, config = parse_case(case, load)
        assert (config.moe_layer_freq, args.expert_model_parallel_size) == ([0, 1, 1], 1)
    assert Case.parse("stock-mla-fused").is_fused and not Case.parse("mlra4").has_experts


def test_a_case_is_measured_with_its_memory_apart(tmp_path):
    """On the CPU, of a dense and a mixture-of-experts model: the gate, the steps, what is held."""
    run = subprocess.run(
        [sys.executable, "-m", "support.drivers.training_benchmark", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["gate"] for row in rows] == [0.0, 0.0, 0.0]
    for row in rows:
        weights = 4 * row["parameters"]
        held = {n: row[f"{n}_gib"] * 2**30 for n in ("weights", "gradients", "optimizer")}
        assert held["weights"] == pytest.approx(weights, rel=0.01)
        assert held["gradients"] == pytest.approx(weights, rel=0.01)
        assert held["optimizer"] == pytest.approx(2 * weights, rel=0.01)
        assert row["step_ms"] > 0 and row["loss"] > 0
    assert run.stdout.splitlines()[-1].startswith("| ") and "materialized" in run.stdout


def test_results_are_written_whole(tmp_path):
    rows = [result(Case("mlra4", "bf16", "auto", s), 1e5 / s) for s in (2048, 4096)]
    written = report.write(rows, 800.0, {"num_layers": 6}, tmp_path)
    plot(written["rows"], tmp_path / "training.png", "a GPU")
    stored = json.loads((tmp_path / "training.json").read_text())
    assert [row["seq_length"] for row in stored["rows"]] == [2048, 4096]
    assert stored["matmul_tflops"] == 800.0 and stored["commit"]
    assert {path.name for path in tmp_path.iterdir()} == {"training.json", "training.png"}
    assert report.table(rows).count("\n") == 3
    assert "| 1.50 | 256 | 5.00 | 6.00 | 7.00 | 20.00 |" in report.memory_table(rows)


def test_sublayers_have_a_table_of_their_own():
    row = SublayerResult("mlra4/bf16/auto/2048", "absorbed", 8192, 2.0, 8.0, 424.0, 2000.0)
    assert "8.00" in report.table([row]) and "424 MiB" in report.line(row)


def test_without_a_gpu_it_is_one_line(warm_python):
    command = [warm_python, ROOT / "tools/benchmark_training.py"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.splitlines()[-1] == (
        "error: this benchmark needs a CUDA GPU, and torch sees none; mlra benchmark-cpu measures a"
        " CPU"
    )
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, env=env).stdout
    assert "VARIANT[/RECIPE[/FORM[/SEQ_LENGTH]]]" in told
