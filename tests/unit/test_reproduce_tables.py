"""examples/reproduce: what the tables say while runs are missing or diverged, and ladders that
could not be run."""

from __future__ import annotations

import math

import pytest

import figures
import report
import report_beyond
from comparison import compare
from ladder import Ladder
from support import ROOT

SETS = ("books", "docs")
NEAR = [3.0, 3.01, 2.99, 3.005, 2.995]
FAR = [3.013, 3.023, 3.003, 3.018, 3.008]
"""Five seeds that differ from `NEAR` with a p-value between 0.0125 and 0.05."""


def runs(losses: dict[str, dict[int, float]], phase: str = "small") -> list[dict]:
    """Results of one phase, of losses by mechanism and seed; infinite: the run diverged."""
    return [
        {
            "phase": phase,
            "mechanism": mechanism,
            "seed": seed,
            "peak_lr": 3e-3,
            **({"diverged": "the loss is nan"} if math.isinf(loss) else {}),
            "held_out": {name: {"loss": loss} for name in SETS},
        }
        for mechanism, each in losses.items()
        for seed, loss in each.items()
    ]


def seeds(losses: list[float]) -> dict[int, float]:
    return dict(enumerate(losses, 1))


def test_a_loss_stands_under_its_seed():
    """Runs end in any order, and one that diverged has none."""
    found = runs({"mla": {1: 3.0, 3: 3.3}, "gqa": {1: math.inf, 2: 3.2}})
    _, head, body = report.seeds(compare(found, "small"), "")
    assert head == ["mechanism", "seed 1", "seed 2", "seed 3"]
    assert sorted(body) == [["GQA", "", "3.2000", ""], ["MLA", "3.0000", "", "3.3000"]]


def test_a_family_has_the_comparisons_that_were_planned():
    """A difference may not count for the reason that the runs it shares its level with are late."""
    found = runs({"mla": seeds(NEAR), "mlra4": seeds(FAR)})
    planned = dict.fromkeys(("mla", "mlra4", "gla2", "gqa", "mlra4-gated", "mha"), 5)
    alone, late = compare(found, "small"), compare(found, "small", planned)
    assert alone[1].counts and not late[1].counts
    assert math.isclose(late[1].p, 4 * alone[1].p)


def test_nothing_is_tested_before_the_last_planned_seed():
    """Who looks after each seed and stops at the first small p-value finds differences in noise."""
    planned = {"mla": 5, "mlra4": 5, "gqa": 5}
    losses = {"mla": seeds(NEAR), "mlra4": seeds([2.0, 2.001]), "gqa": seeds([2.0, 2.001])}
    losses["gqa"] |= dict.fromkeys((3, 4, 5), math.inf)
    tested = {row.mechanism: row.p is not None for row in compare(runs(losses), "small", planned)}
    # Of runs that diverged none is late.
    assert tested == {"mla": False, "mlra4": False, "gqa": True}
    del losses["mla"][5]
    late = compare(runs(losses), "small", planned)
    assert not any(row.p is not None for row in late)
    assert figures.verdict(late) == "no difference to MLA is tested yet"


def test_a_mechanism_whose_sweep_diverged_has_no_line_and_no_best_rate(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "finish", lambda figure, path, mechanisms: shown.append(figure))
    lost = runs({"gqa": {1: math.inf}}, "sweep")
    lost[0]["peak_lr"] = 6e-3
    figures.sweep(runs({"mla": {1: 3.0}}, "sweep") + lost, tmp_path / "sweep.png")
    (panel,) = shown[0].axes
    assert [list(line.get_ydata()) for line in panel.lines] == [[3.0]]
    said = shown[0].get_suptitle() + " ".join(text.get_text() for text in shown[0].texts)
    assert "best at 3e-3" in said and "6e-3" not in said
    _, _, body = report.sweep_table(runs({"mla": {1: 3.0}}, "sweep") + lost, "")
    assert body == [["MLA", "**3.0000**", ""], ["GQA", "", "diverged"]]


def test_runs_beyond_the_loss_that_diverged_are_told():
    phase = {"name": "beyond", "mechanisms": ["mla", "gqa"], "seeds": 2}
    scores = {"cloze": {"items": 9}, "long_512": {"groups": {"passkey": {"acc": 1.0, "items": 8}}}}
    extension = {"steps": 7, "seq_length": 1024}
    told = {"base": scores, "extended": scores, "extension": extension}
    results = [
        {"phase": "beyond", "mechanism": m, "beyond": told} for m in ("mla", "mla", "gqa")
    ] + [{"phase": "beyond", "mechanism": "gqa", "diverged": "the loss is nan"}]
    rows = report_beyond.grouped(results, "beyond")
    said = report_beyond.note(rows, "small", phase, report_beyond.diverged(results, "beyond"))
    assert said.endswith("was tested for significance. Diverged: GQA 1.")


def test_gates_are_compared_without_an_interval_of_one_seed():
    one = {"mlra4-gated": {1: 3.0}, "mla-gated": {1: 3.25}}
    said = "MLRA-4 gated minus MLA gated: -0.2500"
    assert report.gates(compare(runs(one), "small")) == f"{said} (not tested)."
    two = {"mlra4-gated": {1: 3.0, 2: 3.01}, "mla-gated": {1: 3.25, 2: 3.26}}
    found = report.gates(compare(runs(two), "small"))
    assert found.startswith(f"{said} (95 % interval -0.28") and found.endswith("; not tested).")
    assert report.gates(compare(runs({"mla-gated": {1: 3.0}}), "small")) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("data_seed: 1234 ", "# data_seed: 1234 ", "it lacks data_seed"),
        ("  small: {tokens_per_second: 480000}", "", "expected lacks small"),
        ("rate_of: sweep, seeds: 5", "rate_of: swept, seeds: 5", "no phase swept sweeps rates"),
        ("    lengths: [512,", "    # lengths: [512,", "phase beyond has a base and no lengths"),
        ("  start_seconds: 25", "", "expected lacks start_seconds"),
        ("      seq_length: 8192", "      seq_length: 4096", "8192 tokens are more than .* 4096"),
    ],
)
def test_a_ladder_that_lacks_something_is_refused_at_once(tmp_path, old, new, said):
    """Not behind the first run, in a KeyError, nor never, as a rate that nothing sweeps."""
    here = ROOT / "examples/reproduce"
    text = (here / "ladder.yaml").read_text()
    assert text.count(old) >= 1
    (file := tmp_path / "ladder.yaml").write_text(text.replace(old, new))
    (tmp_path / "presets").symlink_to(here / "presets")
    with pytest.raises(ValueError, match=f"{file}: .*{said}"):
        Ladder(file, tmp_path)
