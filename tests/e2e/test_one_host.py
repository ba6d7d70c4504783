"""examples/one_host: its commands, rehearsed on four CPU ranks; its checkpoint, served on fewer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from support import ENV, ROOT
from support.runs import TINY

SCRIPTS = ROOT / "examples" / "one_host"
LAYOUTS = ("tp4-head", "tp4-latent", "cp4", "pp2-tp2", "dp")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 4 -m megatron_mlra.command_line "


def script(name: str, out: Path, *flags: str, **env: str) -> subprocess.CompletedProcess:
    """Run a script with `echo` as its Python, so that it shows what it would start."""
    return subprocess.run(
        [SCRIPTS / f"{name}.sh", out, *flags], capture_output=True, text=True,
        env=ENV | {"PYTHON": "echo"} | env,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[str]]:
    """Layout -> flags of `mlra pretrain` that training.sh starts it with, at the tiny preset."""
    out = tmp_path_factory.mktemp("runs")
    preset = out / "tiny.yaml"
    # The scripts make up their data.
    lines = TINY.format(corpus="none").splitlines(keepends=True)
    preset.write_text(
        "".join(line for line in lines if not line.startswith(("data_path", "split")))
    )
    small = "--seq-length 32 --max-position-embeddings 32 --global-batch-size 4 --train-iters 8"
    done = script("training", out, *small.split(), PRESETS=str(preset), GPUS="4")
    assert done.returncode == 0, done.stderr
    said = {layout: (out / f"tiny-{layout}.txt").read_text() for layout in LAYOUTS}
    start = TORCHRUN + "pretrain "
    assert all(text.startswith(start) for text in said.values())
    return {layout: text.removeprefix(start).split() for layout, text in said.items()}


def test_two_gpus_have_layouts_of_their_own(tmp_path):
    done = script("training", tmp_path, GPUS="2", PRESETS="mlra4_2.9b mla_2.9b")
    assert done.returncode == 0, done.stderr
    started = {path.stem: path.read_text() for path in tmp_path.glob("*-*.txt")}
    layouts = ["tp2-head", "cp2", "pp2", "dp"]
    names = {f"{model}_2.9b-{layout}" for model in ("mlra4", "mla") for layout in layouts}
    assert started.keys() == names | {"mlra4_2.9b-tp2-latent"}
    assert "--nproc-per-node 2" in started["mla_2.9b-pp2"]
    assert "--pipeline-model-parallel-size 2" in started["mla_2.9b-pp2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, entry, runs) -> Path:
    """A checkpoint of four tensor-parallel ranks, by the script's own flags."""
    folder = tmp_path_factory.mktemp("trained")
    run = entry.run(folder, *runs["tp4-latent"], "--save", folder / "save", ranks=4)
    assert run.code == 0, run.err
    assert "tokens/s" in run.out
    return folder / "save"


@pytest.fixture(scope="module")
def served(tmp_path_factory, entry, trained) -> Path:
    """The driver's folder: the checkpoint in five worlds, decoding.sh's rehearsal."""
    out = tmp_path_factory.mktemp("served")
    done = script("decoding", out, "--contexts", "70", REHEARSE="1")
    assert done.returncode == 0, done.stderr
    start = TORCHRUN + "benchmark-decoding "
    assert done.stdout.startswith(start)
    job = {"checkpoint": str(trained), "benchmark": done.stdout.removeprefix(start).split()}
    (out / "job.json").write_text(json.dumps(job))
    driver = entry.run(out / "said", out, module="support.drivers.one_host", timeout=900)
    assert driver.code == 0, driver.err[-3000:]
    return out


@pytest.mark.parametrize("layout", ["tp4-head", "cp4", "pp2-tp2", "dp"])
def test_every_layout_is_accepted(layout, runs, entry, tmp_path):
    run = entry.run(tmp_path / "run", *runs[layout], "--dry-run", 4)
    assert run.code == 0, run.err
    assert "training MLRA-4" in run.out


@pytest.mark.parametrize("world", ["2-1", "4-1", "2-2", "4-2"])
def test_a_checkpoint_of_four_ranks_serves_on_fewer_with_the_same_tokens(world, served):
    alone = json.loads((served / "served-1-1.json").read_text())
    together = json.loads((served / f"served-{world}.json").read_text())
    for (tokens, logprobs), (expected, wanted) in zip(together, alone, strict=True):
        assert tokens == expected and len(tokens) == 16
        assert logprobs == pytest.approx(wanted, abs=1e-4)


def test_the_rehearsal_runs_every_case_on_four_ranks(served):
    found = json.loads((served / "decoding.json").read_text())
    assert not found["failed"] and found["gpus"] == 0
    labels = {record["label"] for record in found["records"]}
    whole = {f"{name} x4" for name in ("MLRA-4", "MLA", "GLA-4", "GQA-8")}
    assert whole <= labels
    assert {"MLA tokens cut in 4 x4", "MLA tokens cut in 4 sharded x4"} <= labels
    for record in found["records"]:
        assert "us" not in record
        assert record["gate_error"] < (0.1 if "FP8" in record["label"] else 1e-5)
    # What a rank caches of a token: MLA all, or a quarter of the tokens; MLRA-4 its latent.
    numbers = {r["label"]: r["cache_bytes_per_token"] / 8 for r in found["records"]}
    assert numbers["MLA x4"] == 72 and numbers["MLA tokens cut in 4 x4"] == 18
    assert numbers["MLRA-4 x4"] == numbers["GLA-4 x4"] == 24
    assert "rehearsed" in (served / "printed-0.txt").read_text()
    assert not (served / "printed-1.txt").read_text()


@pytest.mark.parametrize(
    ("name", "env", "message"),
    [
        ("decoding", {"GPUS": "1"}, "GPUS is '1'; these scripts need at least 2 GPUs of one host"),
        ("training", {"GPUS": "6"}, "GPUS is 6; use 2 or a multiple of 4"),
        ("training", {"GPUS": "a[$(id)]"}, "GPUS is 'a[$(id)]'; these scripts need"),
        ("decoding", {"PYTHON": "/nowhere"}, "there is no /nowhere; set PYTHON"),
    ],
)
def test_what_cannot_run_is_one_line(name, env, message, tmp_path):
    done = script(name, tmp_path / "out", **env)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
