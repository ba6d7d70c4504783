"""The evidence's chain on a CPU: sources, text, tokens, two tiny models, tables and figures."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mlra.evaluation.cli import main as evaluate
from support import ENV, ROOT

HERE = ROOT / "examples" / "reproduce"
LADDER = HERE / "rehearsal" / "ladder.yaml"


def call(*command: object, code: int = 0) -> str:
    """Run to the end; what it printed."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=ENV, timeout=2400
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, warm_python) -> tuple[Path, str]:
    """The folder of a rehearsal in which one run was interrupted, and what was printed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    script = ("bash", HERE / "reproduce.sh", warm_python, folder, "--rehearsal")
    said = call(*script, "--keep-checkpoints")
    return folder, said


@pytest.fixture(scope="module")
def ladder(rehearsal, warm_python) -> Callable[..., str]:
    """What run_ladder.py says of the rehearsal."""
    folder, _ = rehearsal
    paths = ("--ladder", LADDER, "--tokens", folder / "tokens")
    results = ("--results", folder / "docs/results/evidence", "--work", folder / "work")
    command = (warm_python, HERE / "run_ladder.py", *paths, *results)
    return lambda *flags: call(*command, *flags)


def test_the_whole_chain(rehearsal):
    folder, said = rehearsal
    assert "8 runs finished" in said and "0 are left" in said
    files = (folder / "docs/results/evidence").glob("[st][wi]*.json")
    runs = [json.loads(file.read_text()) for file in files]
    assert {(r["phase"], r["mechanism"], r["seed"]) for r in runs} == {
        *(("sweep", m, 1) for m in ("mla", "mlra4")),
        *(("tiny", m, seed) for m in ("mla", "mlra4") for seed in (1, 2)),
    }
    tokens = json.loads((folder / "tokens/tokens.json").read_text())["sets"]
    for run in runs:
        assert run["held_out"].keys() == {"books", "docs", "dictionary"}
        assert all(run["held_out"][n]["tokens"] == tokens[n]["tokens"] for n in run["held_out"])
        assert all(0 < found["loss"] < math.log(512) for found in run["held_out"].values())
        assert run["losses"][-1][0] == run["steps"] and run["tokens_per_second"] > 0
        assert run["train_tokens"] <= run["share"] * tokens["train"]["tokens"]
    # Seeds draw other weights and see the same data; another seed, another loss.
    assert len({run["held_out"]["books"]["loss"] for run in runs}) == 6
    document = (folder / "docs/evidence.md").read_text()
    assert "| MLRA-4 | 145,120 | 2.00e-03 | 2 |" in document
    page = (folder / "docs/results/index.html").read_text()
    for file in re.findall(r'src="([^"]+)"', page):
        assert (folder / "docs/results" / file).read_bytes()[1:4] == b"PNG"
    assert re.findall(r'src="([^"]+)"', page) and "<td>MLRA-4</td>" in page


def test_the_chain_goes_on_behind_the_loss(rehearsal):
    """Analysis, cloze words, a longer context and its tasks; the base is the ladder's own model."""
    folder, _ = rehearsal
    tasks = json.loads((folder / "tokens/tasks/tasks.json").read_text())["files"]
    for mechanism, branches in (("mla", 1), ("mlra4", 4)):
        name = f"tiny_{mechanism}_lr2.00e-03_seed1"
        results = folder / "docs/results/evidence"
        run = json.loads((results / f"beyond_{name}.json").read_text())
        base = json.loads((results / f"tiny_{name}.json").read_text())
        assert run["held_out"] == base["held_out"]
        assert not (folder / "work" / f"beyond_{name}" / "checkpoint").exists()
        found = run["beyond"]
        assert found["analysis"]["tokens"] == 3 * 128
        assert [len(x["ablation"]) for x in found["analysis"]["layers"]] == [branches] * 2
        assert found["base"].keys() == {"cloze"}
        assert found["extended"]["cloze"]["items"] == tasks["cloze"]["items"] > 1
        long = found["extended"]["long_512"]
        assert (long["items"], long["cut"], len(long["groups"])) == (12, 0, 6)
        assert (found["extension"]["steps"], found["extension"]["seq_length"]) == (4, 512)
        log = (folder / "work" / f"beyond_{name}" / "log.txt").read_text()
        assert "sequence length 64 -> 512, positions 64 -> 512, as asked" in log
    document = (folder / "docs/evidence.md").read_text()
    assert "**What the attention does by layer, size tiny**" in document
    for picture in ("long", "why"):
        assert f"results/evidence_tiny_{picture}.png" in document


def test_held_out_texts_are_not_in_the_training_text(rehearsal):
    folder, _ = rehearsal
    train = (folder / "text/train.jsonl").read_text()
    for name in ("books", "docs", "dictionary"):
        for line in (folder / f"text/{name}.jsonl").read_text().splitlines():
            parts = json.loads(line)["text"].split("\n\n")
            long = [part for part in parts if len(part) >= 80]
            assert long and not any(json.dumps(part)[1:-1] in train for part in long)
    told = json.loads((folder / "text/corpus.json").read_text())["sets"]
    assert all("share_of_13_grams_in_train" in told[name] for name in ("books", "docs"))


def test_evaluate_gives_the_held_out_losses_of_training(rehearsal, tmp_path):
    folder, _ = rehearsal
    name = "tiny_tiny_mlra4_lr2.00e-03_seed1"
    sets = ("books", "docs", "dictionary")
    found = tmp_path / "found.json"
    data = [f"{each}={folder / 'tokens' / each}" for each in sets]
    checkpoint = str(folder / "work" / name / "checkpoint")
    assert evaluate([checkpoint, "--data", *data, "--json", str(found), "--device", "cpu"]) == 0
    trained = json.loads((folder / f"docs/results/evidence/{name}.json").read_text())["held_out"]
    evaluated = json.loads(found.read_text())["data"]
    for each in sets:
        assert evaluated[each]["tokens"] == trained[each]["tokens"]
        assert math.isclose(evaluated[each]["loss"], trained[each]["loss"], abs_tol=2e-5)


def test_an_interrupted_run_goes_on_to_the_same_losses(rehearsal, ladder, entry, tmp_path):
    """A run is stopped by the budget in its middle; the next call ends it as if nothing was."""
    folder, _ = rehearsal
    name = "tiny_tiny_mla_lr2.00e-03_seed2"
    file = folder / f"docs/results/evidence/{name}.json"
    whole = json.loads(file.read_text())
    file.unlink()
    (work := folder / "work" / name).rename(folder / "work" / "uninterrupted")
    # A checkpoint of the middle, as a budget that ends there leaves it.
    preset = HERE / "rehearsal/presets/tiny_mla.yaml"
    command = (folder / "work/uninterrupted/log.txt").read_text().splitlines()[0]
    assert command.startswith("$ ") and str(preset) in command
    words = command[2:].replace(str(folder / "work" / name), str(work)).split()
    work.mkdir()
    # Behind the interpreter, its script and the lock: the flags of the entry.
    begun = entry.run(tmp_path, *words[3:], "--exit-interval", 16)
    assert begun.code == 0, begun.err
    status = ladder("--status")
    assert f"interrupted: {name} at step 16" in status and f"next: {name}" in status
    assert "1 runs finished" in ladder()
    again = json.loads(file.read_text())
    assert again["held_out"] == whole["held_out"]
    behind = [[pair for pair in told["losses"] if pair[0] > 16] for told in (again, whole)]
    assert behind[0] == behind[1] and len(behind[0]) > 5


def test_a_budget_too_short_begins_nothing(rehearsal, ladder):
    folder, _ = rehearsal
    (folder / "docs/results/evidence/tiny_tiny_mla_lr2.00e-03_seed1.json").unlink()
    said = ladder("--minutes", "0.05")
    assert "0 runs finished" in said and "1 are left" in said
