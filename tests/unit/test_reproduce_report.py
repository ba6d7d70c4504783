"""examples/reproduce: the committed page and tables are those of the committed results, and what
runs beyond the loss leave is told."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import figures
import page
import report
import report_beyond
from comparison import Row
from ladder import Ladder
from run_ladder import Runner
from run_results import Corpus
from support import ROOT

HERE, DOCS = ROOT / "examples/reproduce", ROOT / "docs"


@pytest.fixture(scope="module")
def made():
    """Tables, pictures, notes and ladder of the committed results."""
    ladder = Ladder(HERE / "ladder.yaml", DOCS / "results/evidence")
    return (*report.sections(ladder), ladder)


def test_the_committed_page_and_tables_are_made_from_the_committed_runs(made):
    tables, pictures, notes, ladder = made
    again = "; run python examples/reproduce/report.py --results docs/results/evidence"
    document = (DOCS / "evidence.md").read_text()
    told = report.placed(document, report.document_part(tables, pictures, notes))
    assert told == document, f"docs/evidence.md is not of these runs{again}"
    html = (DOCS / "results/index.html").read_text()
    shown = [(each.file, each.what) for each in pictures]
    assert page.page(tables, shown, notes, ladder) == html, (
        f"index.html is not of these runs{again}"
    )


def test_everything_that_the_page_needs_lies_beside_it(made):
    html = (DOCS / "results/index.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len([link for link in links if link.startswith("evidence/")]) == len(made[3].done())
    for link in links:
        assert (DOCS / "results" / link).is_file(), link
    assert "<script" not in html and "//" not in re.sub(r"<!doctype[^>]*>", "", html)


def test_speeds_are_timed_as_the_ladders_runs_are_trained():
    speeds, ladder = (Ladder(HERE / name, DOCS).told for name in ("speeds.yaml", "ladder.yaml"))
    for key in ("data_seed", "tokens_per_step", "presets", "gpu_flags", "cpu_flags"):
        assert speeds[key] == ladder[key], key


def test_speeds_are_of_runs_that_had_a_gpu_for_themselves():
    def ran(mechanism: str, speed: int | None, **more) -> dict:
        kv = {"1": 4608, "4": 1536, "8": 1536}
        shared = {"size": "small", "device": "H", "train_tokens": 6000, "kv_bytes_per_token": kv}
        return {"mechanism": mechanism, "tokens_per_second": speed, **shared, **more}

    rows = [Row(m, [ran(m, 10, runs_at_once=2)], 0) for m in ("mla", "gla4")]
    timed = [*(row.results[0] for row in rows), ran("mla", 20), ran("mla", 40, size="large")]
    assert figures.training_minutes(rows, timed) == ("", [])
    timed += [ran("gla4", 50, runs_at_once=1), ran("gla4", None)]
    assert figures.training_minutes(rows, timed) == ("H", [5.0, 2.0])
    _, _, lines = report.cost(rows, timed, "")
    assert [line[-2:] for line in lines] == [["20", "H"], ["50", "H"]]


def test_a_front_has_what_nothing_beats():
    points = [(2.0, 3.0), (1.0, 5.0), (3.0, 3.0), (2.0, 4.0), (4.0, 1.0), (1.0, 6.0)]
    assert figures.front_of(points) == [1, 0, 4]


def layer(cost: float, branches: int = 4) -> dict:
    """One layer's analysis, with numbers that are easy to follow."""
    square = [[float(i != j) / 2 for j in range(branches)] for i in range(branches)]
    return {
        "rope_key_variance": 2.0,
        "nope_key_variance": [4.0] * branches,
        "nope_key_variance_without_calibration": [1.0] * branches,
        "entropy": [1.0] * branches,
        "divergence": square,
        "cosine": square,
        "ablation": [{"loss": cost, "standard_error": None}] * branches,
    }


def result(mechanism: str, right: float) -> dict:
    """What a run beyond the loss leaves."""
    groups = {"passkey": {"acc": right, "items": 8}, "common_words": {"acc": 0.5, "items": 8}}
    scores = {"cloze": {"items": 9, "greedy": 0.25, "log_likelihood": -2.0}}
    scores |= {f"long_{n}": {"groups": groups} for n in (512, 1024)}
    branches = 4 if mechanism == "mlra4" else 1
    found = {
        "base": scores,
        "extended": scores,
        "extension": {"steps": 7, "seq_length": 1024, "held_out": {"books": 4.0}},
        "analysis": {
            "branches": branches,
            "layers": [layer(0.0005, branches), layer(0.2, branches)],
        },
    }
    if mechanism == "gqa":
        del found["analysis"]
    return {"phase": "beyond", "mechanism": mechanism, "beyond": found}


def test_runs_beyond_the_loss_are_told():
    results = [result("gqa", 0.25), result("mlra4", 0.5), result("mlra4", 1.0), result("mla", 0.0)]
    results.append({"phase": "beyond", "mechanism": "gla2", "diverged": "loss is nan"})
    rows = report_beyond.grouped(results, "beyond")
    assert [row.name for row in rows] == ["MLA", "MLRA-4", "GQA"]
    first, by_task, why = report_beyond.tables(rows, "size small")
    assert first[2][1] == ["MLRA-4", "2", "0.250", "7.4", "0.625", "0.625"]
    assert by_task[1:] == (
        ["mechanism", "passkey", "common words"],
        [["MLA", "0.000", "0.500"], ["MLRA-4", "0.750", "0.500"], ["GQA", "0.250", "0.500"]],
    )
    # Two seeds of two layers of four branches, of which the first layer's are idle.
    assert why[2][1][-1] == "8 of 16" and why[2][1][1:3] == ["2.00 to 2.00", "0.50 to 0.50"]
    assert [line[0] for line in why[2]] == ["MLA", "MLRA-4"] and why[2][0][5] == ""
    assert "9 last words" in report_beyond.note(rows, "small")
    phase = {"mechanisms": ["mla", "mlra4", "gla2", "gqa"], "seeds": 2}
    assert report_beyond.note(rows, "small", phase).endswith(
        "significance. Not the whole table; seeds finished of 2: MLA 1, MLRA-4 2, GLA-2 0, GQA 1."
    )
    whole = {"mechanisms": ["mlra4"], "seeds": 2}
    assert report_beyond.note(rows, "small", whole).endswith("was tested for significance.")


def test_a_run_beyond_the_loss_begins_with_what_is_kept(tmp_path):
    """Its base is trained only where its checkpoint is gone; the flags are those of the ladder."""
    ladder = Ladder(HERE / "ladder.yaml", DOCS / "results/evidence")
    tokens = tmp_path / "tokens"
    (tokens / "tasks").mkdir(parents=True)
    (tokens / "tasks/tasks.json").write_text("{}")
    spec = next(run for run in ladder.runs(ladder.done()) if run.phase == "beyond")
    runner = Runner(ladder, Corpus(tokens), tmp_path, [], 0.0, False, False, "")
    (work := tmp_path / spec.id).mkdir()

    def plan() -> list[dict]:
        runner.beyond_command(0, spec, 100)
        return json.loads((work / "plan.json").read_text())

    assert [s["does"] for s in plan()] == ["train", "analyze", "evaluate", "train", "evaluate"]
    train, *_, extend, score = plan()
    assert train["words"] == runner.flags(0, spec, 100, 0)
    assert extend["words"][-3:] == ["--load", str(work / "checkpoint"), "--finetune"]
    assert (
        "8192" in extend["words"]
        and str(ladder.phase(spec)["extension"]["steps"]) in (extend["words"])
    )
    assert [word for word in score["words"] if "long_" in word][-1].endswith("long_8192.jsonl")
    # Data made on another host name a folder there.
    assert score["words"][-3:-2] == [str(tokens / "tokenizer")]
    assert spec.seed == 4 and runner._in_order({})[0].phase == "sweep"
    base = tmp_path / ladder.base(spec).id / "checkpoint"
    base.mkdir(parents=True)
    (base / "held_out.json").write_text("{}")
    assert [s["does"] for s in plan()] == ["analyze", "evaluate", "train", "evaluate"]
    # What goes on with a checkpoint comes before what needs none.
    assert runner._in_order(ladder.done())[0] == spec
    assert plan()[0]["words"][0] == plan()[2]["words"][-2] == str(base)
    # Contexts that the base does not take are asked of the extended model alone.
    assert [w[-15:] for w in plan()[1]["words"] if "long_" in w] == [
        "/long_512.jsonl",
        "long_1024.jsonl",
    ]


def test_stages_beyond_the_loss_are_reused_by_the_same_flags_alone(tmp_path):
    ladder = Ladder(HERE / "ladder.yaml", DOCS / "results/evidence")
    (tmp_path / "tokens/tasks").mkdir(parents=True)
    (tmp_path / "tokens/tasks/tasks.json").write_text("{}")
    spec = next(run for run in ladder.runs(ladder.done()) if run.phase == "beyond")

    def ends(lane: int = 0) -> tuple[int, str]:
        runner = Runner(ladder, Corpus(tmp_path / "tokens"), tmp_path, [], 0, False, False, "")
        command = runner.beyond_command(lane, spec, 100)
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr

    def write(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")

    (work := tmp_path / spec.id).mkdir()
    write(base := tmp_path / ladder.base(spec).id / "checkpoint/held_out.json")
    code, said = ends()
    assert code == 2 and "books.idx does not exist" in said  # the first stage began
    for name in ("analysis.json", "base.json", "extended/held_out.json", "extended.json"):
        write(work / name)
    assert ends() == ends(lane=1) == (0, "")
    base.unlink()  # whose run is over: the base is trained again
    write(work / "checkpoint/held_out.json")
    phase = ladder.phase(spec)
    commands = json.loads((work / "commands.json").read_text())
    commands["checkpoint"] = commands["base.json"][:1]
    (work / "commands.json").write_text(json.dumps(commands))
    assert ends() == (0, "")
    steps = phase["extension"]["steps"]
    phase["extension"]["steps"] = 7
    said = f"{work / 'extended'} was made with --train-iters {steps}, not 7; remove {work}"
    assert ends() == (2, f"error: {said}, and the run begins anew\n")
    phase["extension"]["steps"] = steps
    assert ends() == (0, "")
    phase["lengths"] = phase["lengths"][:-1]
    code, said = ends()
    assert code == 2 and f"{work / 'extended.json'} was made with --task " in said
