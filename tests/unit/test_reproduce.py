"""examples/reproduce: what text is kept, which runs are next, and which differences count."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from comparison import compare, difference, half_width, smallest_detectable
from corpus import Filter, ngrams, words_of
from corpus_sources import html_paragraphs, package, paragraphs
from figures import verdict
from ladder import Ladder
from megatron_mlra.evaluation.token_stream import named_sets, windows
from run_ladder import Runner, visible_gpus
from run_results import Corpus

ROOT = Path(__file__).parents[2]
PROSE = "It is a truth of the {} that a thing in the hand of the {} is worth two in the {}, and so"
SETS = ("books", "docs", "dictionary")


def prose(seed: int) -> list[str]:
    """40 paragraphs of English-like text that no other seed shares."""
    draw = np.random.default_rng(seed)
    return [
        " ".join(PROSE.format(*(f"w{n}" for n in draw.integers(1e9, size=3))) for _ in range(3))
        for _ in range(40)
    ]


def test_pages_lose_menus_and_keep_preformatted_lines():
    page = (
        "<html><head><title>t</title></head><nav>menu<nav>x</nav></nav><p>One <b>bold</b>\n word."
        "<pre>a\n  b</pre><ul><li>first<li>second</ul><script>if (a<b) {}</script>tail<br>end"
    )
    assert html_paragraphs(page) == ["One bold word.", "a\n  b", "first", "second", "tail\nend"]
    assert paragraphs("a\r\n  b\n \n\nc\n") == ["a\n  b", "c"]


def test_a_dictionary_is_read_without_its_source_tags(tmp_path):
    folder = tmp_path / "dict-x" / "usr"
    folder.mkdir(parents=True)
    text = "Word\n   meaning of it.\n   [1913 Webster]\n\nOther\n   [Obs.] meaning\n"
    (folder / "x.dict.dz").write_bytes(gzip.compress(text.encode()))
    ((name, found),) = package(tmp_path, "dict-x")
    assert (name, found) == ("x.dict:0", ["Word\n   meaning of it.", "Other\n   [Obs.] meaning"])
    with pytest.raises(ValueError, match=r"no documents of dict-y there; run .*get_packages\.sh"):
        list(package(tmp_path, "dict-y"))


def test_text_is_seen_once_and_never_what_is_held_out():
    seen = Filter()
    held, grams = seen.admit(prose(1))
    seen.held_out = np.unique(grams)
    # A training document with half of the held-out one loses that half, whatever its case.
    text, _ = seen.admit([*prose(2), *(p.upper() + "!" for p in prose(1)[:20])])
    assert text == "\n\n".join(prose(2))
    assert seen.admit(prose(2)) is None
    # Near duplicates: the same words in other paragraphs.
    joined = [" ".join(prose(2)[i : i + 2]) for i in range(0, 40, 2)]
    assert seen.admit(joined) is None and seen.removed["near duplicate"]
    assert seen.admit([" ".join(prose(1)[i : i + 2]) for i in range(0, 40, 2)]) is None
    assert seen.admit([" ".join(f"x{i}" for i in range(400))]) is None
    assert seen.removed["not English prose"]
    assert len(held) > 1000 and not seen.shared(ngrams(words_of("\n\n".join(prose(3))))).any()


def test_near_copies_of_held_out_text_are_left_out():
    seen = Filter()
    _, grams = seen.admit(prose(1))
    fresh = Filter(held_out=np.unique(grams))
    mixed = [" ".join([*prose(1)[i : i + 2], *prose(4)[i : i + 2]]) for i in range(0, 40, 2)]
    assert fresh.admit(mixed) is None and fresh.removed["overlaps a held-out set"]


def test_ngrams_depend_on_words_and_order():
    words = [f"w{i}" for i in range(30)]
    a, b = ngrams(words), ngrams(words_of(", ".join(words).upper()))
    assert len(a) == 18 and (a == b).all() and len(np.unique(a)) == 18
    swapped = ngrams([*words[:3], words[4], words[3], *words[5:]])
    assert (a == swapped).sum() == 30 - 13 + 1 - 5
    assert len(ngrams(words_of("too few words"))) == 0


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 20])
def test_windows_predict_every_token_once(count):
    tokens = np.arange(1, count + 1, dtype=np.uint16)
    cut = list(windows(tokens, 0, 8))
    assert np.concatenate([targets for _, targets in cut]).tolist() == tokens.tolist()
    assert np.concatenate([inputs for inputs, _ in cut]).tolist() == [0, *tokens[:-1]]
    assert {len(i) - len(t) for i, t in cut} == {0} and max(len(i) for i, _ in cut) <= 8


def test_held_out_sets_are_named():
    assert named_sets(["a=x/books", "y/docs"]) == {"a": "x/books", "docs": "y/docs"}
    assert named_sets(None) == {}
    with pytest.raises(ValueError, match="names a twice"):
        named_sets(["a=x", "y/a"])


@pytest.fixture
def ladder(tmp_path) -> Ladder:
    return Ladder(ROOT / "examples/reproduce/ladder.yaml", tmp_path)


def finish(ladder: Ladder, run, loss: float = 3.0, **more) -> dict:
    """Write what a finished run leaves."""
    result = {
        "id": run.id,
        "phase": run.phase,
        "size": run.size,
        "mechanism": run.mechanism,
        "seed": run.seed,
        "peak_lr": run.peak_lr,
        "held_out": {name: {"loss": loss, "tokens": 9} for name in SETS},
        "tokens_per_second": 500_000,
        **more,
    }
    ladder.write(result)
    return result


def test_the_line_of_a_run_that_timed_no_step_tells_no_speed(ladder):
    run = ladder.left(ladder.done())[0]
    timed = finish(ladder, run)
    assert ladder.write(timed).endswith(" 3.0000; 500,000 tokens/s")
    assert ladder.write(timed | {"tokens_per_second": None}).endswith(" 3.0000")


def test_the_ladder_asks_for_what_is_missing(ladder):
    """All runs of docs/evidence.md, the sweeps first, rates from them, in an order that keeps seeds
    balanced."""
    total, asked = 0, []
    while left := ladder.left(ladder.done()):
        run, total = left[0], total + 1
        asked.append(run.phase)
        base = ladder.base(run)
        assert (base and base.id) == (run.id.replace("beyond", "small") if base else None)
        # The middle rate is the best one, so no sweep is extended.
        finish(ladder, run, 3.0 + abs(math.log(run.peak_lr / 3e-3)))
    assert not ladder.waiting(ladder.done())
    done = list(ladder.done().values())
    count = {
        (phase, m): sum(r["phase"] == phase and r["mechanism"] == m for r in done)
        for phase in ("sweep", "small", "large")
        for m in {r["mechanism"] for r in done}
    }
    core, others = ("mla", "mlra4", "gla2", "gqa", "mlra4-gated"), 8
    assert total == len(done) == 13 * 3 + 5 * 5 + others * 3 + 5 * 3 + 5 * 2
    # Those beyond the loss come behind the large ones, and each names the run whose model it is
    # about. The mechanisms of other papers come last.
    behind = [r for r in done if r["phase"] == "beyond"]
    assert {r["peak_lr"] for r in behind} == {3e-3} and asked.index("beyond") == total - 10 - 18
    assert asked[-28:] == ["beyond"] * 10 + ["sweep"] * 9 + ["small"] * 9
    assert {count["small", m] for m in core} == {5} and {count["large", m] for m in core} == {3}
    assert {r["peak_lr"] for r in done if r["phase"] == "small"} == {3e-3}
    assert {r["peak_lr"] for r in done if r["phase"] == "large"} == {2e-3}


def test_results_of_other_text_are_not_joined(ladder, tmp_path):
    """Packages of another day give other tokens: neither a run nor a table may mix them."""
    first, second = ladder.left({})[:2]
    finish(ladder, first, data_sha256={"train": "a"})
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    (tokens / "tokens.json").write_text(json.dumps({"sets": {"train": {"sha256": "b"}}}))
    with pytest.raises(ValueError, match=f"the tokens of train .* not those of {first.id}"):
        Corpus(tokens).check([], ladder.done().values())
    finish(ladder, second, data_sha256={"train": "b"})
    with pytest.raises(ValueError, match=f"{first.id} and {second.id} .* other text"):
        ladder.done()


def test_tokens_that_change_under_a_ladder_are_refused(tmp_path):
    """Other tokens of equal size, as an interrupted tokenized.py or a copy leaves them."""
    tokens, work = tmp_path / "tokens", tmp_path / "work" / "a"
    tokens.mkdir()
    (tokens / "train.idx").touch()
    for data in (b"tokens", b"nekots"):
        (tokens / "train.bin").write_bytes(data)
        told = {"sets": {"train": {"sha256": hashlib.sha256(data).hexdigest()}}}
        if data == b"tokens":
            (tokens / "tokens.json").write_text(json.dumps(told))
            Corpus(tokens).check(["train"])
            work.mkdir(parents=True)
            Corpus(tokens).note(work)
    with pytest.raises(ValueError, match=r"train\.bin is not the one of tokens\.json"):
        Corpus(tokens).check(["train"])
    (tokens / "tokens.json").write_text(json.dumps(told))
    Corpus(tokens).check(["train"])
    Corpus(tokens).check_begun([work])  # nothing is saved
    (work / "checkpoint").mkdir()
    (work / "checkpoint/latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(ValueError, match="a began with other tokens of train than those in"):
        Corpus(tokens).check_begun([work])


def test_results_of_other_tasks_are_not_joined(ladder):
    loss, first, second, third = ladder.left({})[:4]
    finish(ladder, loss)
    for run, digest in ((first, "a"), (second, "a"), (third, "b")):
        assert len(ladder.done()) == (1, 2, 3)[(first, second, third).index(run)]
        finish(ladder, run, tasks_sha256={"cloze": digest})
    with pytest.raises(ValueError, match=f"{first.id} and {third.id} .* other tasks"):
        ladder.done()


def test_a_best_rate_at_an_end_extends_the_sweep(ladder):
    tried = []
    while (run := ladder.left(ladder.done())[0]).mechanism == "mla" or run.phase == "sweep":
        finish(ladder, run, 3.0 - run.peak_lr if run.mechanism == "mla" else 3.0 + run.peak_lr)
        if run.mechanism == "mla":
            tried.append(run.peak_lr)
        if run.phase == "small":
            break
    assert tried[:5] == [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]
    assert ladder.best_rate("mla", ladder.done()) == 2.4e-2
    assert ladder.best_rate("gqa", ladder.done()) == 3.75e-4


def test_a_diverged_rate_is_never_the_best(ladder):
    for run in [r for r in ladder.left(ladder.done()) if r.mechanism == "mla"]:
        finish(ladder, run, 3.0 - run.peak_lr, **({"diverged": "x"} if run.peak_lr > 5e-3 else {}))
    assert ladder.best_rate("mla", ladder.done()) == 3e-3


def test_times_come_from_runs_of_the_same_kind(ladder):
    run, *_ = ladder.left({})
    assert ladder.seconds(run, 48_000_000, {}) == 25 + 100
    done = {"a": finish(ladder, run)}
    assert ladder.seconds(run, 50_000_000, done) == 25 + 100
    # Two runs on one GPU are slower each, and say nothing about a run alone.
    done["b"] = finish(ladder, run, tokens_per_second=250_000, runs_at_once=2)
    assert ladder.seconds(run, 50_000_000, done, at_once=1) == 25 + 100
    assert ladder.seconds(run, 50_000_000, done, at_once=2) == 25 + 200


def test_a_ladder_that_names_no_preset_is_refused(tmp_path):
    file = tmp_path / "ladder.yaml"
    text = (ROOT / "examples/reproduce/ladder.yaml").read_text()
    file.write_text(text.replace("presets: presets", "presets: nowhere"))
    with pytest.raises(ValueError, match=r"small_mla\.yaml does not exist"):
        Ladder(file, tmp_path)


def results(losses: dict[str, list[float]]) -> list[dict]:
    """Runs of one phase, of losses by mechanism and seed."""
    return [
        {
            "phase": "small",
            "mechanism": mechanism,
            "seed": seed,
            "held_out": {name: {"loss": loss} for name in SETS},
        }
        for mechanism, each in losses.items()
        for seed, loss in enumerate(each, 1)
    ]


def test_a_clear_difference_counts_and_noise_does_not():
    noise = [0.0, 0.01, -0.01, 0.005, -0.005]
    rows = compare(
        results(
            {
                "mla": [3.0 + e for e in noise],
                "mlra4": [2.9 + e for e in noise],
                "gla2": [3.003 + e for e in reversed(noise)],
                "gqa": [3.1 + e for e in noise],
            }
        ),
        "small",
    )
    assert [row.mechanism for row in rows] == ["mlra4", "mla", "gla2", "gqa"]
    assert [row.counts for row in rows] == [True, False, False, True]
    assert verdict(rows) == "better than MLA: MLRA-4; worse: GQA"
    delta, low, high = difference(rows[0], rows[1])
    assert math.isclose(delta, -0.1, abs_tol=1e-9) and low < -0.1 < high < -0.08
    # By hand: standard error of noise is 0.003536; t(4) at 97.5 % is 2.7764.
    assert math.isclose(half_width(rows[1].losses()), 0.009817, rel_tol=1e-3)
    assert math.isclose(smallest_detectable(rows), 2.8 * 0.0079057 * math.sqrt(2 / 5), rel_tol=1e-3)


def test_holm_makes_many_comparisons_stricter():
    a, b = [3.0, 3.01, 2.99, 3.005, 2.995], [3.013, 3.023, 3.003, 3.018, 3.008]
    alone = compare(results({"mla": a, "mlra4": b}), "small")
    assert alone[1].counts and alone[1].p < 0.05
    # MLRA-4, its gated form, GLA-2 and GQA are a family; the others do not weaken it.
    for names, times in (
        (("gla4", "gta", "mfa", "tpa", "mha"), 1),
        (("gla2", "gqa", "mlra4-gated", "mha"), 4),
    ):
        many = compare(results({"mla": a, "mlra4": b, **dict.fromkeys(names, a)}), "small")
        (row,) = [row for row in many if row.mechanism == "mlra4"]
        assert math.isclose(row.p, times * alone[1].p) and row.counts == (times == 1)


def test_one_seed_proves_nothing():
    rows = compare(results({"mla": [3.0, 3.0], "mlra4": [2.0]}), "small")
    assert rows[0].p is None and not rows[0].counts
    assert math.isnan(difference(rows[0], rows[1])[1])


def test_presets_of_the_ladder_are_json_serialisable(ladder):
    assert json.dumps(ladder.told)


def test_runs_keep_to_the_visible_gpus(tmp_path, monkeypatch):
    # A stand-in for nvidia-smi: machines of the tests have no GPU.
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\nfor n in 0 1 2 3; do echo $n, NVIDIA H100 80GB HBM3; done\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [index for index, _ in visible_gpus()] == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_gpus() == [("2", "NVIDIA H100 80GB HBM3"), ("3", "NVIDIA H100 80GB HBM3")]
    # Two runs at once on one GPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,1,2")
    gpus = visible_gpus()
    assert [index for index, _ in gpus] == ["1", "1", "2"]
    runner = Runner(None, None, tmp_path, gpus, 0.0, False, False, "")
    assert [runner.at_once(number) for number in range(3)] == [2, 2, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-5ebe9f43")
    with pytest.raises(ValueError, match="GPU-5ebe9f43 is not one of 0, 1, 2, 3; list GPUs"):
        visible_gpus()


def test_an_interrupted_stage_of_guesses_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples/reproduce"), *sys.path])
    import multi_token

    args = multi_token.parser().parse_args(["--tokens", "tokens", "--work", str(tmp_path)])
    command, _ = multi_token.stages(args)[0]
    places = {flag: command[command.index(flag) + 1] for flag in ("--save", "--load")}
    assert set(places.values()) == {str(tmp_path / "checkpoint")}


def test_stages_of_guesses_are_reused_by_the_same_flags_alone(tmp_path):
    records = [{"batch": 1, "temperature": 0.0, "right": 1, "guessed": 2, "context": 8}]
    ways = ("plain", "guessing")
    records[0] |= {f"{way}_{what}": 1.0 for way in ways for what in ("ms", "tokens_per_step")}
    records[0] |= {"label": "x", "speed_up": 1.0}
    work = tmp_path / "work"

    def ends(*flags: object) -> tuple[int, str]:
        command = [sys.executable, ROOT / "examples/reproduce/multi_token.py", "--tokens", tmp_path]
        command += ["--work", work, *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, said = ends()
    assert code == 2 and "train.idx does not exist" in said  # the first stage began
    (work / "checkpoint").mkdir()
    for name in ("checkpoint/held_out", "trained", "large"):
        (work / f"{name}.json").write_text(json.dumps({"records": records}))
    assert ends() == (0, "")
    for flags, what, differs in (
        (("--steps", 10), "checkpoint", "--train-iters 900, not 10"),
        (("--batches", 1), "trained.json", "--batches 1 8, not 1"),
        (("--shape", "debug"), "large.json", "--configs mlra4_2.9b, not debug"),
    ):
        said = f"error: {work / what} was made with {differs}; give another --work, or remove it"
        assert ends(*flags) == (2, said + "\n")
    shutil.rmtree(work / "checkpoint")
    code, said = ends("--steps", 10)
    assert code == 2 and "trained.json was made with --train-iters 900, not 10" in said
    (work / "commands.json").unlink()
    code, said = ends()
    assert code == 2 and "made with flags that commands.json does not tell; give anoth" in said
