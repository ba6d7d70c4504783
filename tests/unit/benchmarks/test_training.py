"""The training benchmark's cases, table and plot; what it times is for a GPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mlra.benchmarks.training import cli, kernels, report
from megatron_mlra.benchmarks.training.case import Load, parse_case
from megatron_mlra.benchmarks.training.cases import Case
from megatron_mlra.benchmarks.training.cli import TWO_GPUS, main
from megatron_mlra.benchmarks.training.layouts import Layout
from megatron_mlra.benchmarks.training.measure import Result, SublayerResult
from megatron_mlra.benchmarks.training.plot import plot
from megatron_mlra.benchmarks.training.progress import Progress
from megatron_mlra.inference import world
from support import ROOT
from support.drivers.training_benchmark import LAYOUTS


def test_ranks_that_differ_measure_nothing(monkeypatch, tmp_path, capsys):
    def meet(told):
        found = told()["arguments"]
        raise world.Refused(f"{found['--steps']} {found['the flags of training']}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(world, "meet", meet)
    assert main(["--steps", "3", "--out", str(tmp_path), "--seq-length", "64"]) == 2
    assert capsys.readouterr().err == "error: 3 ['--seq-length', '64']\n"
    assert not any(tmp_path.iterdir())


def result(case: Case, rate: float) -> Result:
    return Result(
        case=str(case),
        variant=case.variant,
        recipe=case.recipe,
        form="absorbed",
        seq_length=case.seq_length,
        layout=str(case.layout),
        gpus=case.layout.world,
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
        ("mlra4/bf16/auto/long", "use VARIANT/RECIPE/FORM/SEQ_LENGTH@LAYOUT"),
        ("mlra4/bf16/auto/0", "use VARIANT/RECIPE/FORM/SEQ_LENGTH"),
        ("mlra4/bf16/auto/2048/6", "use VARIANT/RECIPE/FORM/SEQ_LENGTH"),
    ],
)
def test_what_is_no_case_is_refused(text, words):
    with pytest.raises(ValueError, match="--case") as error:
        Case.parse(text)
    assert words in str(error.value)


def test_a_layout_is_read_from_its_name():
    case = Case.parse("mlra4/bf16/auto/4096@dp2-tp2-latent-graphs")
    assert case.layout.world == 4 and case.layout.size("cp") == 1
    assert case.layout.flags() == [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--latent-tp-layout", "latent", "--cuda-graph-impl", "local", "--te-rng-tracker"),
    ]
    assert str(case) == "mlra4/bf16/auto/4096@dp2-tp2-latent-graphs"
    assert Case.parse("mlra4@one").layout == Layout() and str(Layout()) == "one"
    assert Layout.parse("dp2-ep2").world == 2
    assert Layout.parse("dp2-wide4").micro_batches(8) == 2
    assert all(Case.parse(text).layout.world <= 2 for text in TWO_GPUS)
    assert len(set(TWO_GPUS)) == len(TWO_GPUS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp2-fast", "'fast'; join one, tpN"),
        ("tp0", "'tp0'; join"),
        ("tp2-tp4", "'tp4'; join"),
        ("ep2", "experts lie across data-parallel ranks; use dp2-ep2"),
        ("", "''; join"),
    ],
)
def test_what_is_no_layout_is_refused(text, words):
    with pytest.raises(ValueError, match="layout") as error:
        Case.parse(f"mlra4@{text}")
    assert words in str(error.value)


def test_micro_batches_that_do_not_divide_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="--micro-batches 4 do not divide into dp2-wide4; use 8"):
        Layout.parse("dp2-wide4").micro_batches(4)
    assert main(["--case", "mlra4_moe_16b@dp2-ep2", "--out", str(tmp_path)]) == 2
    said = "--micro-batches 1 do not divide into dp2-ep2; use 2 or a multiple"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_without_flags_two_processes_measure_every_layout(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [str(case) for case in cli.chosen(cli.parser().parse_args([]))] == [
        str(Case.parse(text)) for text in TWO_GPUS
    ]


def test_a_trace_is_summed_up():
    """Two steps of 100 us: computing at 0-40 and 90-100, NCCL at 30-70, idle at 70-90."""
    events = [
        {"cat": "kernel", "name": name, "ts": 100 * step + start, "dur": stop - start}
        for step in (0, 1)
        for name, start, stop in (
            ("void gemm<float>(x)", 0, 40),
            ("ncclDevKernel_AllGather(y)", 30, 70),
            ("void gemm<float>(x)", 90, 100),
        )
    ]
    events += [{"cat": "cuda_runtime", "name": "launch", "ts": 0, "dur": 9}, {"name": "thread"}]
    found = kernels.summary(events, 2, 0.125)
    assert found["busy_ms"] == pytest.approx(0.08)
    assert found["compute_ms"] == pytest.approx(0.05)
    assert found["communication_ms"] == pytest.approx(0.04)
    assert found["exposed_ms"] == pytest.approx(0.03)
    assert found["idle_ms"] == pytest.approx(0.02)
    assert found["idle_share"] == pytest.approx(1 - 0.08 / 0.125)
    assert found["launches"] == 3
    assert [gap["count"] for gap in found["gaps"]] == [0, 1, 0]
    assert found["kernels"][0][2] == "void gemm<float>(x)"
    assert found["kernels"][0][:2] == (pytest.approx(0.05), 2)
    assert [row[2] for row in found["collectives"]] == ["ncclDevKernel_AllGather(y)"]
    said = kernels.text(found)
    assert "waits for the host" in said and "idle 36% of it" in said and "  gemm\n" in said
    assert kernels.summary([{"cat": "cpu_op", "name": "add", "ts": 0, "dur": 1}], 1, 1.0) == {}


def test_a_launch_that_is_started_again_goes_on_behind_the_case_that_ended_it(
    tmp_path, monkeypatch
):
    cases = [Case.parse(f"mlra4@{layout}") for layout in ("one", "tp2", "pp2")]
    first = Progress(tmp_path, Result)
    first.begin(cases[0])
    first.measured(cases[0], result(cases[0], 5.0))
    first.begin(cases[1])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Progress(tmp_path, Result)
    assert again.begun == [str(case) for case in cases[:2]]
    assert again.rows == {str(cases[0]): result(cases[0], 5.0)}
    assert [*again.failed.values()] == ["mlra4/bf16/auto/2048@tp2: it ended its process"]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert not Progress(tmp_path, Result).begun


def test_layouts_have_a_table_of_their_own():
    cases = [
        Case.parse(f"mlra4/bf16/auto/4096@{name}") for name in ("one", "tp2-head", "tp2-wide4")
    ]
    table = report.layout_table([result(case, 10.0 * (i + 1)) for i, case in enumerate(cases)])
    assert "| mlra4/bf16/auto/4096@tp2-head | 20 | 2.00 |" in table
    assert "@tp2-wide4 | 30 |  |" in table


def test_arguments_follow_the_case():
    load = Load(num_layers=3, tokens=256, micro_batches=2, flags=("--no-variance-scaling",))
    args, config = parse_case(Case("debug", "bf16", "materialized", 64), load)
    assert (args.num_layers, args.micro_batch_size, args.global_batch_size) == (3, 4, 8)
    assert args.ffn_hidden_size % 16 == 0 and not config.absorbed
    assert config.kv_scale == 1.0


EXPERTS = ("mlra4_moe_16b", "stock-mla_moe_16b")


@pytest.mark.parametrize("variant", EXPERTS)
def test_experts_lie_across_two_gpus(variant, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    load = Load(num_layers=3, tokens=64, micro_batches=2, flags=("--no-moe-grouped-gemm",))
    args, config = parse_case(Case.parse(f"{variant}/bf16/auto/64@dp2-ep2"), load)
    assert (args.expert_model_parallel_size, config.expert_model_parallel_size) == (2, 2)
    assert (args.data_parallel_size, args.global_batch_size) == (2, 2 * args.micro_batch_size)
    assert config.moe_layer_freq == [0, 1, 1]


def test_experts_are_cut_to_the_layers_and_to_one_gpu():
    for variant in EXPERTS:
        case = Case.parse(f"{variant}/bf16/auto/64")
        assert case.has_experts and not case.is_fused
        load = Load(num_layers=3, tokens=64, flags=("--no-moe-grouped-gemm",))
        args, config = parse_case(case, load)
        assert (config.moe_layer_freq, args.expert_model_parallel_size) == ([0, 1, 1], 1)
    assert Case.parse("stock-mla-fused").is_fused and not Case.parse("mlra4").has_experts


@pytest.fixture(scope="module")
def measured(run_driver):
    """The driver's folder: cases of one process, and layouts of two."""
    return run_driver("training_benchmark", timeout=300)


def test_a_case_is_measured_with_its_memory_apart(measured):
    """On the CPU, of a dense and a mixture-of-experts model: the gate, the steps, what is held."""
    rows = json.loads((measured / "one" / "training.json").read_text())["rows"]
    assert [row["gate"] for row in rows] == [0.0, 0.0, 0.0]
    assert [row["form"] for row in rows] == ["absorbed", "materialized", "absorbed"]
    for row in rows:
        weights = 4 * row["parameters"]
        held = {n: row[f"{n}_gib"] * 2**30 for n in ("weights", "gradients", "optimizer")}
        assert held["weights"] == pytest.approx(weights, rel=0.01)
        assert held["gradients"] == pytest.approx(weights, rel=0.01)
        assert held["optimizer"] == pytest.approx(2 * weights, rel=0.01)
        assert row["step_ms"] > 0 and row["loss"] > 0


def test_every_layout_of_two_processes_is_measured(measured):
    found = json.loads((measured / "two" / "training.json").read_text())
    rows = {(Path(r["variant"]).stem, r["layout"], r["form"]): r for r in found["rows"]}
    assert {name for _, name, _ in rows} == {*LAYOUTS, "dp2-ep2"} - {"one-wide4"} | {"wide4"}
    experts = [form for _, name, form in rows if name == "dp2-ep2"]
    assert experts == ["absorbed", "materialized"]
    assert [error.partition(": ")[2] for error in found["failed"]] == [
        "layout dp3 needs 3 GPUs and 2 processes run; launch with torchrun --nproc-per-node 3"
    ]
    for (_, name, _), row in rows.items():
        assert row["gpus"] == (1 if name in ("one", "wide4") else 2)
        assert row["tokens"] == (4 if "half" in name else 8) * 32
        assert row["loss"] > 0 and row["tokens_per_second"] > 0
    known = json.loads((measured / "two" / "progress.json").read_text())
    assert len(known["begun"]) == len(rows) + 1


def test_what_is_measured_outlives_the_process(measured):
    (row,) = json.loads((measured / "ended" / "training.json").read_text())["rows"]
    assert row["form"] == "absorbed"


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
    assert "VARIANT[/RECIPE[/FORM[/LENGTH]]][@CUT]" in told
