"""The planner's arithmetic, search and command line."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_mlra.cost.parameters import parameters
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.description.presets import preset_values
from megatron_mlra.planner import cli
from megatron_mlra.planner.cli import main, shape_of
from megatron_mlra.planner.decoding import decode, ways
from megatron_mlra.planner.gpus import GPUS, Assumptions, find
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import (
    GIB,
    attention_activations,
    memory,
    optimizer_bytes,
    rank_parameters,
)
from megatron_mlra.planner.search import context_sizes, search
from megatron_mlra.planner.step import core_flops_per_token, predict, traffic
from megatron_mlra.planner.tables import print_report
from support import CONFIGS, ROOT

LARGE = ("mlra4_7b", "mla_7b", "mlra4_70b", "gqa_70b", "mlra4_qwen_8b", "gqa_qwen_8b")
MOE = ("mlra4_moe_16b", "mla_moe_16b")


def shape(name: str) -> ModelDescription:
    return shape_of(preset_values(CONFIGS / f"{name}.yaml"))


def plan(capsys, *argv: object) -> tuple[int, str, str]:
    code = main([*map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_it_loads_no_torch():
    code = (
        "import sys; from megatron_mlra.planner.cli import main;"
        f"code = main(['--config', r'{CONFIGS / 'mlra4_70b.yaml'}', '--gpus', '1024']);"
        "assert not {'torch', 'numpy', 'megatron.core', 'matplotlib'} & set(sys.modules);"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TP4 PP4" in done.stdout and "does not fit" not in done.stdout


@pytest.mark.parametrize("name", LARGE + MOE)
@pytest.mark.parametrize(
    ("tp", "pp", "ep"), [(1, 1, 1), (2, 1, 1), (4, 3, 1), (8, 9, 1), (1, 3, 8)]
)
def test_parameters_of_all_ranks_are_the_models(name, tp, pp, ep):
    model = shape(name)
    if model.num_layers % pp:
        pp = 4
    layout = Layout(tp=tp, pp=pp, ep=ep if model.num_experts else 1, dp=8)
    stages = [rank_parameters(model, layout, stage) for stage in range(pp)]
    whole = sum(tp * dense + tp * layout.ep * experts for dense, experts in stages)
    # What every tensor-parallel rank holds in full: norms, GQA's norms of heads, routers, and what
    # GQA repeats where there are more ranks than key/value heads.
    p, n = parameters(model), model.num_layers
    replicated = n * p.layer_norms + p.final_norm
    replicated += sum(p.attention_norms.values()) * n if model.attention == "gqa" else 0
    moe_layers = n - model.num_dense_layers if model.num_experts else 0
    replicated += moe_layers * model.hidden_size * model.num_experts
    assert whole - (tp - 1) * replicated == p.total


@pytest.mark.parametrize("name", [n for n in LARGE + MOE if n.startswith("mlra4")])
def test_a_presets_own_layout_is_among_the_planners_best(name):
    values = preset_values(CONFIGS / f"{name}.yaml")
    gpus = 1024 if "70b" in name else 64
    batch = values["global_batch_size"]
    plans, _ = search(shape(name), gpus, batch, GPUS["h100"], Assumptions())

    def is_own(flags: dict) -> bool:
        return flags == {key: values.get(key, 1) for key in flags}

    own = next(plan for plan in plans if is_own(plan.layout.flags(shape(name))))
    assert own.step.seconds <= 1.05 * plans[0].step.seconds


def test_the_surcharge_over_mla_is_the_known_one(capsys):
    config = CONFIGS / "mlra4_2.9b.yaml"
    code, out, _ = plan(capsys, "--config", config, "--gpus", 8, "--json")
    assert code == 0
    said = json.loads(out)["training_flops_over_mla"]
    for length, ratio in ((2048, 1.19), (4096, 1.35), (8192, 1.62)):
        assert said[str(length)] == pytest.approx(ratio, abs=0.01)


def test_decoding_is_told_fairly():
    model, h100, assume = shape("mlra4_2.9b"), GPUS["h100"], Assumptions()

    def per_layer(name: str, devices: int) -> float:
        (way,) = (way for way in ways(model, devices) if way.name == name)
        return decode(way, 1000, 1, devices, h100, assume).kv_bytes_per_token / 24 / 2 / 128

    assert per_layer("MLRA-4", 4) == 1.5
    assert per_layer("MLA", 4) == 4.5
    assert per_layer("MLA, tokens cut (DCP)", 4) == 4.5 / 4
    assert per_layer("GLA-4", 4) == 1.5
    assert per_layer("GQA, 8 KV heads", 8) == 2
    assert per_layer("MLRA-4, tokens cut x2", 8) == 0.75
    few = replace(model, num_attention_heads=4)
    assert "GQA, 4 KV heads" in {way.name for way in ways(few, 4)}


def test_core_flops_are_what_grows_with_the_length():
    model = shape("mlra4_2.9b")
    h, n, keys = 24, 24, (model.seq_length + 1) / 2
    assert core_flops_per_token(model, hardware=False) == pytest.approx(
        3 * 2 * n * 4 * h * (192 + 128) * keys
    )


def test_traffic_by_hand():
    # MLA's 2.9B at TP2 DP4, one micro-batch of 1 x 2048 tokens per rank.
    model, s, d = shape("mla_2.9b"), 2048, 3072
    layout = Layout(tp=2, dp=4)
    sent = traffic(model, layout, 1)
    dense, experts = rank_parameters(model, layout)
    assert experts == 0
    assert sent.data == pytest.approx(3 / 4 * 6 * dense)
    # Per layer: the MLP's five passes of d; attention's entry, latents and exit, both ways.
    compressed = 1536 + 512 + 64
    attention = 4 * d + 2 * compressed
    assert sent.tensor == pytest.approx(2 * s * 24 / 2 * (5 * d + attention))
    assert sent.pipeline == sent.context == sent.expert == 0


def test_context_parallel_traffic_by_hand():
    # The whole sequence's latents and RoPE keys, 4 x 128 + 64 numbers per token, less the rank's
    # own share; their gradients the same way.
    model = replace(shape("mlra4_2.9b"), seq_length=32768)
    layout = Layout(tp=2, cp=4, dp=2, micro_batch=2)
    gathered = 3 / 4 * 2 * 32768 * 576
    assert traffic(model, layout, 5).context == 5 * 24 * 2 * gathered * 2
    full = replace(layout, recompute="full")
    assert traffic(model, full, 5).context == 5 * 24 * 3 * gathered * 2
    # In the latent layout a rank reads its own two latents.
    latent = replace(layout, tp_layout="latent")
    assert traffic(model, latent, 5).context == 5 * 24 * 2 * 3 / 4 * 2 * 32768 * 320 * 2
    # Megatron's ring: keys and values of the rank's groups forward, again and with their gradients
    # backward.
    gqa = replace(shape("gqa_2.9b"), seq_length=32768)
    groups, dim = gqa.num_query_groups / 2, gqa.head_dim
    ring = 3 * (4 - 1) * 2 * groups * dim * 2 * 32768 / 4
    assert traffic(gqa, layout, 5).context == 5 * gqa.num_layers * ring * 2


def test_context_parallel_shares_activations_but_not_what_is_gathered():
    model = replace(shape("mlra4_2.9b"), seq_length=32768)
    one, four = (memory(model, Layout(cp=cp)) for cp in (1, 4))
    assert four.weights == one.weights and four.optimizer * 4 == one.optimizer
    # Key and value latents of the whole sequence on every rank: 4 x (128 + 64) and 4 x 128 numbers.
    gathered = 24 * 32768 * 2 * (4 * 192 + 4 * 128)
    assert four.activations - gathered == pytest.approx((one.activations - gathered) / 4)


def test_context_parallel_is_tried_where_sequences_are_long():
    model, h100, assume = shape("mlra4_7b"), GPUS["h100"], Assumptions()
    sizes = [context_sizes(replace(model, seq_length=s)) for s in (4096, 16384, 131072)]
    assert sizes == [[1], [1, 2, 4], [1, 2, 4, 8, 16]]
    assert context_sizes(replace(shape("gta_2.9b"), seq_length=131072)) == [1]
    long = replace(model, seq_length=131072)
    best = search(long, 64, 32, h100, assume)[0][0]
    without = search(long, 64, 32, h100, assume, cp=1)[0]
    assert best.layout.cp > 1
    assert best.layout.flags(long)["context_parallel_size"] == best.layout.cp
    assert not without or best.step.seconds < without[0].step.seconds
    assert {plan.layout.cp for plan in search(long, 64, 32, h100, assume, cp=8)[0]} == {8}


def test_search_prefers_what_fits_and_says_what_does_not():
    model, assume = shape("mlra4_70b"), Assumptions()
    plans, misfits = search(model, 64, 2048, GPUS["h100"], assume)
    assert plans and misfits
    times = [plan.step.seconds for plan in plans]
    assert times == sorted(times)
    limit = 80e9 * assume.memory
    assert all(plan.memory.total <= limit and plan.layout.gpus == 64 for plan in plans)
    assert all("needs" in miss.why or "divide" in miss.why for miss in misfits)
    nothing, _ = search(model, 2, 2048, GPUS["h100"], assume)
    assert not nothing


def test_more_of_a_resource_never_costs_time():
    model, assume = shape("mlra4_7b"), Assumptions()
    layout = Layout(tp=2, dp=4)
    slow = predict(model, layout, 64, GPUS["h100"], assume)
    assert predict(model, layout, 64, GPUS["b200"], assume).seconds < slow.seconds
    assert predict(model, replace(layout, recompute="full"), 64, GPUS["h100"], assume).seconds > (
        slow.seconds
    )
    assert predict(model, layout, 64, GPUS["h100"], replace(assume, gemm=0.4)).mfu < slow.mfu


@pytest.mark.parametrize(
    ("gpu", "preset", "ffn", "length", "tokens_per_second", "gib"),
    [
        ("h200", "mla_2.9b", 9456, 2048, 89680, 33.1),
        ("h200", "mla_2.9b", 9456, 4096, 82907, 33.3),
        ("h200", "mla_2.9b", 9456, 8192, 74067, 33.3),
        ("h200", "mlra4_2.9b", 9888, 2048, 77821, 34.6),
        ("h200", "mlra4_2.9b", 9888, 4096, 66102, 34.6),
        ("h200", "mlra4_2.9b", 9888, 8192, 50826, 34.7),
        ("h100", "mla_2.9b", 9456, 2048, 83567, 33.1),
        ("h100", "mlra4_2.9b", 9888, 2048, 74719, 34.6),
    ],
)
def test_one_gpus_step_is_met(gpu, preset, ffn, length, tokens_per_second, gib):
    # docs/performance/training.md: six layers, 2 micro-batches of 16,384.
    model = replace(shape(preset), num_layers=6, ffn_hidden_size=ffn, seq_length=length)
    layout = Layout(micro_batch=16384 // length)
    assert memory(model, layout).total / GIB == pytest.approx(gib, rel=0.1)
    step = predict(model, layout, 32768 // length, GPUS[gpu], Assumptions())
    assert step.tokens_per_gpu_second == pytest.approx(tokens_per_second, rel=0.1)


@pytest.mark.parametrize(
    ("form", "mib"),
    [
        ({"absorbed": True}, 416),
        ({"absorbed": True, "keep_absorbed_query": True}, 706),
        ({"absorbed": False}, 1109),
    ],
)
def test_what_one_gpus_attention_saved_is_met(form, mib):
    # The sublayer alone in the same place: 8,192 tokens, MiB beyond weights and input, with output.
    form = dict(form)
    model = replace(
        shape("mlra4_2.9b"), core_form="absorbed" if form.pop("absorbed") else "materialized"
    )
    saved = sum(attention_activations(model, Layout(**form), "transformer_engine", 2).values())
    assert saved * 8192 / 2**20 == pytest.approx(mib, rel=0.03)


def test_the_distributed_optimizer_shares_by_replicas():
    layout = Layout(dp=8, ep=4)
    assert optimizer_bytes(800, 80, layout) == 12 * 100 + 12 * 40
    assert optimizer_bytes(800, 80, replace(layout, distributed_optimizer=False)) == 12 * 880


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize(
    ("preset", "gpus", "length"),
    [("mlra4_2.9b", 64, 2048), ("mlra4_moe_16b", 512, 131072), ("mlra4_70b", 8, 8192)],
)
def test_tables_fit_and_no_number_is_cut(preset, gpus, length, width):
    flags = ["--config", str(CONFIGS / f"{preset}.yaml"), "--gpus", str(gpus), "--top", "8"]
    flags += ["--seq-length", str(length), "--contexts", *map(str, (8192, 131072, 1048576, 2**23))]
    report = cli.plan(cli.parser().parse_args(flags))
    shown = {}
    for columns in (width, 1000):
        console = Console(highlight=False, width=columns, file=io.StringIO())
        print_report(report, console, details=True)
        shown[columns] = console.file.getvalue()
    assert "…" not in shown[width]
    tables, _, command = shown[width].partition("To train by the first layout")
    assert max(map(len, tables.splitlines())) <= width
    # To be pasted: never wrapped.
    assert bool(report.plans) == bool(command) and shown[1000].endswith(command[-60:])

    def cells(text: str) -> set[str]:
        rows = (line.split("│")[1:-1] for line in text.splitlines() if "│" in line)
        return {cell.strip() for row in rows for cell in row if re.fullmatch(r" +[\d.,%]+ +", cell)}

    # Beyond the numbers, the narrow tables may wrap a word that is one.
    assert cells(shown[width]) >= cells(shown[1000]) and len(cells(shown[1000])) > 10


def test_a_small_model_is_told_in_small_units(capsys):
    said = plan(capsys, "--config", "debug", "--gpus", 8, "--details")[1]
    assert "MiB per GPU" in said and " step ms " in said and "GiB" not in said
    assert " 0.0 " not in said.partition("Layouts that fit")[2].partition("What a GPU")[0]
    said = plan(capsys, "--config", "mlra4_2.9b", "--gpus", 8)[1]
    assert "GiB per GPU" in said and " step s " in said


def test_the_end_is_the_command_and_details_are_asked_for(capsys, tmp_path):
    short = plan(capsys, "--config", "mlra4_2.9b", "--gpus", 8, "--seq-length", 4096)[1]
    assert len(short.splitlines()) < 20 and "Decoding" not in short
    assert short.endswith(
        "To train by the first layout (TP1 PP1 DP8):\n"
        "  mlra launch --standalone --nproc-per-node 8 \\\n"
        "    -m megatron_mlra.training --config mlra4_2.9b \\\n"
        "    --data-path DATA --save RUN --load RUN \\\n"
        "    --micro-batch-size 1 --seq-length 4096 --max-position-embeddings 4096\n"
    )
    long = plan(capsys, "--config", "mlra4_70b", "--gpus", 1024, "--details")[1]
    for part in ("does not fit", "Decoding on", "weights", "Assumed: "):
        assert part in long
    assert "on every node:\n  mlra launch --nnodes 128 --rdzv-backend c10d" in long
    # Data and folder that the preset names are left to it.
    own = tmp_path / "own.yaml"
    own.write_text("base: mlra4_2.9b\nmicro_batch_size: 2\ndata_path: data/web\nsave: runs/own\n")
    assert plan(capsys, "--config", own, "--gpus", 8)[1].splitlines()[-1] == "    --load runs/own"
    # A preset's own layout, where another one is faster.
    other = tmp_path / "other.yaml"
    other.write_text(
        "base: mlra4_2.9b\ncontext_parallel_size: 2\nrecompute_granularity: full\n"
        "sequence_parallel: true\nbf16: false\n"
    )
    *_, flags, note = plan(capsys, "--config", other, "--gpus", 8)[1].splitlines()
    expected = ["--context-parallel-size", "1", "--no-sequence-parallel", "--bf16"]
    assert flags.split() == expected
    assert note == "    # with a copy of the preset that has no recompute_granularity"


def test_a_plot_is_written_whole(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    config = CONFIGS / "mlra4_7b.yaml"
    assert plan(capsys, "--config", config, "--gpus", 16, "--plot", path)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu", "h900"], "--gpu h900 is not known"),
        (["--gpus", "0"], "argument --gpus: 0 is no whole number from 1 to 1000000"),
        (["--gpus", "many"], "argument --gpus"),
        (["--cp", "3"], "--cp 3 does not divide --gpus 8; use 2"),
        (["--cp", "1000000000"], "--cp 1000000000 does not divide --gpus 8; use 8"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--gpu", "a100", "--fp8"], "a100 has no FP8"),
        (["--gemm", "1.5"], "--gemm is 1.5"),
        (["--seq-length", "-1"], "argument --seq-length: -1 is no whole number"),
        (["--plot", "/proc/nowhere/plan.png"], "the folder /proc/nowhere cannot be made"),
        (["--plot", "plan.doc"], "use a name that ends in .png"),
        (["--unknown", "1"], "unknown flag"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    config = ["--config", CONFIGS / "mlra4_7b.yaml", "--gpus", 8]
    code, out, err = plan(capsys, *config, *argv)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1 and err.startswith("error: ")


def test_a_reader_that_leaves_early_ends_it_quietly():
    # More JSON than a pipe holds.
    command = [sys.executable, ROOT / "tools/plan.py", "--config", CONFIGS / "mlra4_70b.yaml"]
    command += ["--gpus", "1024", "--json", "--contexts", *map(str, range(1000, 1200))]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tool.stdout.readline() == b"{\n"
    tool.stdout.close()
    assert tool.wait(60) == 141
    assert tool.stderr.read() == b""


def test_a_size_that_is_no_number_is_one_line(capsys, tmp_path):
    config = tmp_path / "odd.yaml"
    config.write_text(f"base: {CONFIGS / 'mlra4_7b.yaml'}\nhidden_size: wide\n")
    code, out, err = plan(capsys, "--config", config, "--gpus", 8)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a size is not a number" in err


def test_every_gpu_names_its_source():
    for name, gpu in GPUS.items():
        assert find(name) is gpu
        assert "NVIDIA" in gpu.source
        assert gpu.network_gb_s <= gpu.link_gb_s < gpu.memory_gb_s


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # Neither three GPUs' replicas divide the batch, nor does anything else divide by three.
        ("mlra4_7b --gpus 3", "Use --gpus 2 or 4, or --global-batch-size 1023."),
        ("mlra4_70b --gpus 4", "Use --gpus 32."),
        ("mlra4_70b --gpus 1000", "Use --gpus 1024, or --global-batch-size 2000."),
    ],
)
def test_where_nothing_fits_the_way_out_does(capsys, flags, said):
    config, _, gpus = flags.split()
    code, out = plan(capsys, "--config", config, "--gpus", gpus)[:2]
    assert code == 1
    (line,) = (line for line in out.splitlines() if line.startswith("No layout fits."))
    assert said in line
    for way in line.partition(" Use ")[2].rstrip(".").split(", or "):
        name, *values = way.replace(" or ", " ").split()
        for value in values:
            again = [] if name == "--gpus" else ["--gpus", gpus]
            assert plan(capsys, "--config", config, *again, name, value)[0] == 0, (name, value)
