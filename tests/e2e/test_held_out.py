"""`--held-out`: the whole set once, at any layout, after a resume too; `--data-seed`."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_mlra.evaluation.token_stream import read_stream
from megatron_mlra.fault_tolerance.integrity import check_complete
from megatron_mlra.fault_tolerance.saved_steps import latest_step
from support.runs import tokenize, wait_for


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Prefix of a held-out set that no number of ranks and sequences divides."""
    documents = [f"    def value_{n}(self) -> int:\n" * (n % 5 + 1) for n in range(22)]
    prefix = tokenize(documents, tmp_path_factory.mktemp("held") / "text")
    tokens = len(read_stream(prefix))
    assert tokens % 32 and -(-tokens // 32) % 4 and tokens > 50 * 32
    return prefix


@pytest.fixture(scope="module")
def trained(entry, preset, held, tmp_path_factory):
    """A run of 4 steps that scores a set, by two names."""
    folder = tmp_path_factory.mktemp("held_out")
    flags = ("--config", preset, "--train-iters", 4, "--eval-iters", 0, "--split", "1,0,0")
    sets = ("--held-out", f"whole={held}", held)
    run = entry.run(folder, *flags, *sets, "--save", folder / "save")
    assert run.code == 0, run.err
    return run, flags, sets


def told(folder) -> dict:
    return json.loads((folder / "save" / "held_out.json").read_text())


def test_the_whole_set_is_scored_behind_the_last_step(trained, held):
    run, _, _ = trained
    found = told(run.folder)
    assert found["step"] == 4 and list(found["sets"]) == ["whole", "text"]
    assert found["sets"]["whole"]["tokens"] == len(read_stream(held))
    assert found["sets"]["whole"]["loss"] == found["sets"]["text"]["loss"]
    loss = found["sets"]["whole"]["loss"]
    assert 0 < loss < np.log(272)
    assert f"scoring whole: {len(read_stream(held)):,} tokens held out\n" in run.out
    assert f"held out at step 4: whole {loss:.4f} ({len(read_stream(held)):,} tokens)" in run.out


@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("--micro-batch-size", 1),
        ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
        ("--pipeline-model-parallel-size", 2),
        ("--context-parallel-size", 2),
    ],
    ids=["dp2", "dp2-micro1", "tp2", "pp2", "cp2"],
)
def test_every_layout_gives_the_same_loss(entry, trained, layout, tmp_path):
    run, flags, sets = trained
    load = ("--load", run.folder / "save", "--save", tmp_path / "save")
    again = entry.run(tmp_path, *flags, *sets, *load, *layout, ranks=2)
    assert again.code == 0, again.err
    loss = told(tmp_path)["sets"]["whole"]["loss"]
    assert abs(loss - told(run.folder)["sets"]["whole"]["loss"]) < 1e-5


@pytest.mark.parametrize("interval", [2, 3], ids=["divides", "behind"])
def test_the_last_step_is_saved_before_it_is_scored(entry, trained, interval, tmp_path):
    """Behind the loop where the interval does not divide it. A run that is killed while it scores
    has lost no step."""
    run, flags, sets = trained
    save = ("--save", tmp_path / "save", "--save-interval", interval)
    again = entry.run(tmp_path, *flags, *sets, *save)
    assert again.code == 0, again.err
    assert again.out.index("saved step 4 to ") < again.out.index("scoring whole: ")
    assert again.out.count("held out at step 4: ") == again.out.count("scoring whole: ") == 1
    assert told(tmp_path)["sets"]["whole"] == told(run.folder)["sets"]["whole"]


def test_killed_while_it_scores(entry, trained, tmp_path):
    """An asynchronous save, of a last step that the interval does not divide, is complete then."""
    _, flags, sets = trained
    save = tmp_path / "save"
    asleep = {"ranks": [0, 1], "place": "megatron_mlra.evaluation.held_out:windows", "seconds": 600}
    command = [*flags, *sets, "--async-save", "--save", save, "--save-interval", 3]
    pids = entry.start(tmp_path, *command, ranks=2, asleep=[asleep])
    wait_for(tmp_path / "stdout-1.txt", "scoring whole: ")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    entry.wait(tmp_path, pids)
    assert latest_step(save) == 4
    check_complete(save / "iter_0000004")


def test_data_seed_orders_the_data_apart_from_the_weights(entry, trained, tmp_path):
    """Megatron names the index of an order after what decides it: the same with other weights,
    another with another data seed."""
    _, flags, _ = trained
    losses, orders = {}, {}
    for name, seeds in (("a", (1, 7)), ("b", (2, 7)), ("c", (1, 8))):
        cache = ("--data-cache-path", tmp_path / name / "cache")
        chosen = ("--seed", seeds[0], "--data-seed", seeds[1])
        run = entry.run(tmp_path / name, *flags, *chosen, *cache)
        assert run.code == 0, run.err
        losses[name] = tuple(run.losses.values())
        orders[name] = {path.name for path in (tmp_path / name / "cache").rglob("*.npy")}
    assert orders["a"] == orders["b"] and not orders["a"] & orders["c"]
    assert len(set(losses.values())) == 3 and orders["a"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--held-out", "a=nowhere"), "nowhere.idx does not exist; make it with"),
        (("--held-out", "a=x", "a=y"), "--held-out names a twice"),
        (("--held-out", "a=x", "--packed-sequences"), "--packed-sequences keeps them apart"),
        (("--held-out", "a=x", "--skip-train"), "--skip-train makes none; score"),
    ],
)
def test_bad_input_is_refused_in_one_line(entry, preset, tmp_path, flags, said):
    for name in ("x.idx", "x.bin", "y.idx", "y.bin"):
        (tmp_path / name).touch()
    run = entry.run(tmp_path, "--config", preset, *flags)
    assert run.code == 2 and said in run.err
    assert run.err.count("\n") == 1


def test_sets_beside_mock_data_are_checked_too(entry, preset, held, tmp_path):
    """Another tokenizer's ids ended the run behind its last step, in an IndexError."""
    other = tmp_path / "other"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{held}{suffix}", f"{other}{suffix}")
    metadata = json.loads(Path(f"{held}.json").read_text())
    metadata["vocab_size"] = 1000
    Path(f"{other}.json").write_text(json.dumps(metadata))
    flags = ("--config", preset, "--mock-data", "--held-out", f"other={other}")
    run = entry.run(tmp_path, *flags)
    said = f"error: data {other} has a vocabulary of 1000, the model one of 257; use"
    assert (run.code, run.err.count("\n")) == (2, 1) and run.err.startswith(said), run.err


def test_hosts_with_other_sets_are_refused(entry, preset, held, tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for number, folder in enumerate((mine, theirs)):
        folder.mkdir()
        tokenize([f"a text of host {number}. " * 30], folder / "set")
    hosts = [
        {"name": "one", "mounts": [[str(mine), str(mine)]]},
        {"name": "two", "mounts": [[str(theirs), str(mine)]]},
    ]
    flags = ("--config", preset, "--micro-batch-size", 1, "--held-out", mine / "set")
    run = entry.run(tmp_path / "run", *flags, ranks=2, hosts=hosts)
    assert run.code == 2 and f"the content of {mine}/set.bin" in run.err, run.err
