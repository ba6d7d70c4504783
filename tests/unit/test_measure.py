"""examples/measure: the committed tables are those of the committed results; a rehearsal of the
queue without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import measure
import measured
import tables
from measure import Queue, commit_of, run_to_end
from megatron_mlra.command_line.commands import COMMANDS
from pieces import Piece, read_queue
from support import ENV, ROOT
from support.drivers.two_gpus import figures

WRITES = f'{sys.executable} -c \'import sys; open(sys.argv[1], "w").write("[1]")\' {{json}}'
FAILS = f"{sys.executable} -c 'raise SystemExit(\"error: no such thing\")'"
HANGS = f"{sys.executable} -c 'import time; time.sleep(600)'"
H200 = [{"index": str(i), "name": "NVIDIA H200", "driver": "580.1"} for i in (4, 5)]


PAGES = [page for page in tables.pages() if "<!-- table:" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_results(page):
    assert tables.renewed(page) == page.read_text(), "run python examples/measure/tables.py"


def test_every_table_with_results_is_on_a_page():
    found = {n for p in PAGES for n, _ in tables.BLOCK.findall(p.read_text())}
    for name in measured.TABLES.keys() - found:
        with pytest.raises(ValueError, match="there is no result of "):
            measured.TABLES[name]()
    assert found <= measured.TABLES.keys()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "<!-- table: nothing -->\n<!-- end of table -->\n",
            "no table nothing; there are context-parallel, decoding",
        ),
        ("<!-- table: decoding -->\n| a |\n", "1 tables begin and 0 end"),
        ("<!-- table: a -->\n<!-- table: b -->\n<!-- end of table -->", "2 tables begin and 1 end"),
    ],
)
def test_wrong_marks_are_refused(tmp_path, text, says):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=says):
        tables.renewed(page)


def test_a_newer_result_renews_table_and_caption(tmp_path, monkeypatch):
    old = measured.newest("one_shot")
    told = old.told | {"piece": "one_shot", "date": "2027-01-02 03:04", "commit": "abc1234"}
    told["records"] = [r | {"us": r["us"] | {"nccl": 9.99}} for r in told["records"]]
    (tmp_path / "2027-01-02_h200x2_one_shot_abc1234.json").write_text(json.dumps(told))
    monkeypatch.setattr(measured, "FOLDERS", (*measured.FOLDERS, tmp_path))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: one-shot -->\nold\n<!-- end of table -->\nbelow\n")
    text = tables.renewed(page)
    assert "commit abc1234, 2027-01-02 ([data](2027-01-02_h200x2_one_shot_abc1234.json))" in text
    assert "| 9.99 |" in text and "old" not in text and text.endswith("-->\nbelow\n")


def made_up(folder: Path, monkeypatch, piece: str, **told) -> Path:
    """A newer result of a piece, and a page of the folder for its table."""
    about = {"piece": piece, "gpu": "NVIDIA H200", "commit": "0", "date": "2030-01-01"}
    (folder / f"2030-01-01_h200_{piece}.json").write_text(json.dumps(about | told))
    monkeypatch.setattr(measured, "FOLDERS", (*measured.FOLDERS, folder))
    page = folder / "page.md"
    page.write_text(f"<!-- table: {piece.replace('_', '-')} -->\n<!-- end of table -->\n")
    return page


def test_requests_of_both_sizes_stand_side_by_side(tmp_path, monkeypatch):
    """They have no steps: the tables of steps stay as they are."""
    records = [
        {"model": model, "tp": 1, "requests": requests, "in": given, "out": 256}
        | {"seconds": seconds, "new_tokens_per_s": requests * 256 / seconds}
        for requests, given, seconds in ((1000, 1024, 20.5), (32, 32768, 40))
        for model in ("mlra4", "gqa6")
    ]
    steps = measured.TABLES["serving"]()
    page = made_up(tmp_path, monkeypatch, "serving_throughput", records=records)
    assert tables.renewed(page).splitlines()[2:6] == [
        "| | 1,000 x 1K in, 256 out: new tokens/s | 1,000 x 1K in, 256 out: s"
        " | 32 x 32K in, 256 out: new tokens/s | 32 x 32K in, 256 out: s |",
        "|---|---|---|---|---|",
        "| MLRA-4 | 12,488 | 20.5 | 205 | 40.0 |",
        "| GQA-6 | 12,488 | 20.5 | 205 | 40.0 |",
    ]
    assert measured.TABLES["serving"]() == steps


def test_memory_of_experts_has_the_columns_of_memory(tmp_path, monkeypatch):
    row = {"tokens_per_second": 5e4, "layers": 4, "activations_gib": 3.0, "peak_gib": 90.0}
    rows = [row | {"variant": "MLRA-4", "form": form} for form in ("absorbed", "materialized")]
    rows.append(row | {"variant": "stock-mla_moe_16b", "form": "materialized"})
    told = {"rows": rows, "matmul_tflops": 700.0, "gpus": 2}
    text = tables.renewed(made_up(tmp_path, monkeypatch, "memory_experts", **told))
    head = measured.TABLES["memory"]().lines[0]
    assert text.splitlines()[2].strip("| ").split(" | ") == head[1:]
    assert "| MLRA-4, absorbed | 50,000 | 3.0 | 768 | 90.0 |" in text
    assert "| Megatron's MLA | 50,000 |" in text and "\n2 x NVIDIA H200, commit 0" in text


def test_the_number_of_compared_losses_is_that_of_the_result(tmp_path, monkeypatch):
    found = {"losses": [5.0] * 50, "loss": 0.0, "grad_norm": 0.0, "steps": [2e-3, 7]}
    found["gradients"] = {"weight": [0.01, 0.02, 0.02]}
    cases = {"bf16-one": figures(found), "bf16-cp2": figures(found)}
    text = tables.renewed(made_up(tmp_path, monkeypatch, "equality", cases=cases))
    assert "| losses of 50 steps |" in text and "| 2.0e-3 |" in text


def fake_queue(folder: Path, **pieces: dict) -> Path:
    file = folder / "queue.yaml"
    entries = [{"name": n, "gpus": 0, "estimated_seconds": 1} | p for n, p in pieces.items()]
    file.write_text(yaml.safe_dump({"pieces": entries}))
    return file


def test_a_rehearsed_queue(tmp_path, capsys, monkeypatch):
    """One piece fails, one hangs; the others are done, and are not done again."""
    monkeypatch.setenv("PATH", "/nowhere")
    pieces = {
        "fails": {"command": FAILS},
        "hangs": {"command": HANGS, "timeout": 0.3},
        "good": {"command": WRITES},
        "large": {"command": WRITES, "gpus": 1},
        "long": {"command": WRITES, "estimated_seconds": 6000},
    }
    queue = fake_queue(tmp_path, **pieces)
    flags = [f"--queue={queue}", f"--results={tmp_path / 'results'}", f"--work={tmp_path / 'work'}"]
    monkeypatch.setattr(measure.signal, "signal", lambda *_: None)
    call = lambda *more: measure.main([*flags, "--commit", "abc1234", *more])  # noqa: E731
    assert call("--minutes", "1") == 1
    said = capsys.readouterr().out
    assert "fails: failed: exit code 1: error: no such thing (" in said
    assert "hangs: failed: ended after 0.3 s: " in said
    assert "long: not begun, takes about 6000 s" in said
    (file,) = (tmp_path / "results").glob("*.json")
    assert file.name.endswith("_cpu_good_abc1234.json")
    told = json.loads(file.read_text())
    assert told["records"] == [1] and told["commit"] == "abc1234" and told["gpu"] == "CPU"
    assert told["torch"] and told["command"].endswith(")'")

    pieces["fails"]["command"] = WRITES
    fake_queue(tmp_path, **pieces)
    assert call("--only", "fails", "good", "large", "--minutes", "1") == 0
    said = capsys.readouterr().out
    assert "[1/1] fails: done in" in said and "good: begun" not in said
    assert call("--status") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"hangs: left, about 1 s (estimate); failed: ended after 0.3 s: {last_line(tmp_path)}",
        "good: done",
        "large: needs 1 GPUs, 0 here, about 1 s (estimate)",
        "long: left, about 6000 s (estimate)",
        "commit abc1234: 2 pieces are done, 3 are left; what can run here takes about 100 minutes",
    ]


def last_line(folder: Path) -> str:
    log = folder / "work/abc1234/hangs/log.txt"
    return f"{log.read_text().splitlines()[-1][:200]} ({log})"


def test_nothing_that_a_piece_started_outlives_it(tmp_path):
    """As torchrun's workers, the grandchild has a session of its own."""
    sleep = "import time; time.sleep(600)"
    script = (
        "import subprocess, sys; command = [sys.executable, '-c', sys.argv[1]];"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True);"
        "exec(sys.argv[1])"
    )
    began = time.monotonic()
    assert run_to_end([sys.executable, "-c", script, sleep], {}, tmp_path / "log.txt", 1) is None
    worker = int((tmp_path / "log.txt").read_text().splitlines()[-1])
    state = Path(f"/proc/{worker}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_piece_ends_with_what_measures_it(number, tmp_path):
    """SIGHUP is what a lost terminal sends."""
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    queue = fake_queue(tmp_path, hangs={"command": f'{sys.executable} -c "{script}"'})
    log = tmp_path / "work/abc1234/hangs/log.txt"
    flags = [f"--queue={queue}", f"--results={tmp_path}", f"--work={tmp_path / 'work'}"]
    command = [sys.executable, ROOT / "examples/measure/measure.py", "--commit", "abc1234", *flags]
    measuring = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        env=ENV,
        # The tests may run under nohup, and children would ignore SIGHUP.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    try:
        for _ in range(600):
            if log.exists() and len(lines := log.read_text().split()) > 3 and lines[-1].isdigit():
                break
            time.sleep(0.1)
        measuring.send_signal(number)
        assert measuring.wait(60) == 128 + number
    finally:
        measuring.kill()
        measuring.wait()
    state = Path(f"/proc/{lines[-1]}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("piece", "says"),
    [
        ({"gpus": "two"}, "gpus of piece a is 'two'; give a whole number; a piece may have name, "),
        ({"estimated_seconds": "x"}, "estimated_seconds of piece a is 'x'; give a number"),
        ({"timeout": -5}, "timeout of piece a is -5; give a number"),
        ({"command": ""}, "command of piece a is ''; name a program"),
        ({"command": "A=1 B=2"}, "command of piece a is 'A=1 B=2'; name a program"),
        ({"command": "echo 'x"}, "command of piece a: No closing quotation"),
        ({"name": "a/b"}, "a piece is named 'a/b', and files after it; give a word"),
        ({"name": 5}, "name of piece 5 is 5; give text"),
    ],
)
def test_a_wrong_piece_is_refused_before_any_is_measured(piece, says, tmp_path):
    file = tmp_path / "queue.yaml"
    entries = [{"name": "good", "gpus": 0, "estimated_seconds": 1, "command": "x"}]
    entries.append(entries[0] | {"name": "a"} | piece)
    file.write_text(yaml.safe_dump({"pieces": entries}))
    with pytest.raises(ValueError) as refused:
        read_queue(file)
    assert str(refused.value).startswith(f"queue {file}: {says}")
    file.write_text(yaml.safe_dump({"pieces": entries[:1] * 2}))
    with pytest.raises(ValueError, match="two pieces are named good; name one otherwise"):
        read_queue(file)


def test_a_program_that_is_not_there_fails_its_piece_alone(tmp_path):
    pieces = [Piece("gone", 0, 1, "nosuchprogram --flag"), Piece("good", 0, 1, WRITES)]
    queue = Queue(pieces, "abc1234", [], "", tmp_path / "results", tmp_path / "work")
    (tmp_path / "results").mkdir()
    assert queue.run(time.monotonic() + 60) == ["gone"]
    assert "No such file or directory: 'nosuchprogram'" in queue.why_failed(pieces[0])
    assert queue.done() >= {"good"}


def test_a_checkout_that_changes_under_a_piece_fails_it(tmp_path):
    said = iter(["abc1234", "abc1234-dirty-0123456", "abc1234"])
    pieces = [Piece(name, 0, 1, WRITES) for name in ("one", "two", "three")]
    (tmp_path / "results").mkdir()
    folders = tmp_path / "results", tmp_path / "work"
    queue = Queue(pieces, "abc1234", [], "", *folders, now=lambda: next(said))
    assert queue.run(time.monotonic() + 60) == ["two"]
    assert queue.why_failed(pieces[1]).startswith("the checkout became abc1234-dirty-0123456 meanw")
    assert {file.name.split("_")[2] for file in folders[0].iterdir()} == {"one", "three"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is no JSON"),
        ('{"piece": "a"', "is no JSON"),
        ("[1]", "is no result: it holds no object; move it away"),
        ('{"piece": ["a"]}', r"is no result: piece is \['a'\]; move it away"),
        ('{"date": 5}', "is no result: date is 5; move it away"),
        ('{"seconds": "long"}', "is no result: seconds is 'long'; move it away"),
    ],
)
def test_a_broken_result_file_is_named(content, says, tmp_path):
    file = tmp_path / "2026-01-01_h200_a.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} {says}"):
        measured.results("a", [tmp_path])


@pytest.mark.parametrize("records", [[1], [{}], None, {"us": 1}], ids=str)
def test_a_result_without_its_numbers_names_page_and_table(records, tmp_path, monkeypatch):
    about = {"gpu": "NVIDIA H200", "commit": "0", "date": "2030-01-01", "records": records}
    for name in ("decoding", "one_shot", "latent_decode", "products"):
        (tmp_path / f"2030-01-01_h200_{name}.json").write_text(json.dumps(about | {"piece": name}))
    monkeypatch.setattr(measured, "FOLDERS", (*measured.FOLDERS, tmp_path))
    page = tmp_path / "page.md"
    for name in ("decoding", "one-shot", "latent-decode", "products"):
        page.write_text(f"<!-- table: {name} -->\n<!-- end of table -->\n")
        with pytest.raises(ValueError, match=f"{page}: table {name}: "):
            tables.renewed(page)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "error: measuring needs a GPU, and nvidia-smi lists none"),
        (["--only", "decodin"], "error: --only decodin is no piece; choose of latent_decode, deco"),
        (["--minutes", "0"], "error: --minutes 0 is no time; give more than 0"),
        (["--vllm-python", "/no"], "error: --vllm-python /no is no program; give a Python's path"),
        (["--vllm-python", "/bin/true"], "error: --vllm-python /bin/true is no Python; give"),
        (["--vllm-python", sys.executable], f"error: --vllm-python {sys.executable} has no vLLM; "),
        (["--queue", "/nowhere.yaml"], "error: queue /nowhere.yaml: [Errno 2] No such file"),
    ],
)
def test_refusals_are_one_line(flags, says, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as ended:
        measure.main(["--commit", "abc1234", *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(says) and error.count("\n") == 1


def test_the_status_of_this_checkout(capsys):
    assert measure.main(["--status"]) == 0
    *pieces, last = capsys.readouterr().out.splitlines()
    assert len(pieces) > 15 and last.startswith("commit ")


def test_changes_of_the_checkout_are_refused_or_named(tmp_path):
    def git(*words: str) -> None:
        user = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *user, *words], check=True, capture_output=True)

    with pytest.raises(ValueError, match="is no checkout of git; name its commit by --commit"):
        commit_of(tmp_path, dirty=False)
    git("init")
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "result.json").write_text("{}")
    clean = commit_of(tmp_path, dirty=False)
    (tmp_path / "code.py").write_text("2\n")
    with pytest.raises(ValueError, match=rf"code.py differs from commit {clean}; commit changes"):
        commit_of(tmp_path, dirty=False)
    two = commit_of(tmp_path, dirty=True)
    (tmp_path / "code.py").write_bytes(b"3 \xe9\n")  # no UTF-8
    assert two.startswith(f"{clean}-dirty-") and two != commit_of(tmp_path, dirty=True)


def test_expected_seconds_are_those_of_the_same_gpu(tmp_path):
    piece = Piece("other", 1, 100, "mlra x")
    queue = Queue([piece], "abc1234", H200, "", tmp_path, tmp_path)
    assert queue.seconds(piece) == (100, "estimate")
    for gpu, seconds in (("NVIDIA H200", 42), ("NVIDIA H100", 77)):
        told = {"piece": "other", "gpu": gpu, "seconds": seconds, "commit": "0", "date": "2026"}
        (tmp_path / f"2026_{seconds}.json").write_text(json.dumps(told))
    assert queue.seconds(piece) == (42, "measured")


def test_commands_of_the_queue_exist(monkeypatch):
    """Every module is there, and `mlra` takes every flag, as the piece's processes see it."""
    pieces = read_queue(measure.HERE / "queue.yaml")
    for piece in pieces:
        words, _ = piece.started_by("python3", Path("out"))
        assert words[0] == "python3" and not any("{" in word for word in words), piece.name
        module, *rest = words[len(words) - words[::-1].index("-m") :]
        if module == "megatron_mlra.command_line":
            command, *flags = rest
            parser = COMMANDS[command].parser()
            args, _ = parser.parse_known_args(flags)
            monkeypatch.setenv("WORLD_SIZE", str(piece.gpus))
            for check in parser.together:
                check(args)
            assert "--json" in flags or "--out" in flags
        else:
            file = f"{module.replace('.', os.sep)}.py"
            if module == "torch.distributed.run":
                file = next(word for word in rest if word.endswith(".py"))
            assert any((ROOT / place / file).is_file() for place in (".", "kernels", "tests"))
    by_name = {piece.name: piece for piece in pieces}
    words, env = by_name["layouts"].started_by("py", Path("out"))
    start = "py -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3"
    assert " ".join(words).startswith(f"{start} -m megatron_mlra.command_line benchmark-training")
    assert env == {"NCCL_NVLS_ENABLE": "0"} and words[-2:] == ["--out", "out"]


def test_a_piece_needs_its_gpus_and_its_python(tmp_path):
    queue = Queue([], "abc1234", H200[:1], "", tmp_path, tmp_path)
    assert queue.why_not(Piece("a", 2, 1, "x")) == "needs 2 GPUs, 1 here"
    assert queue.why_not(Piece("a", 1, 1, "x", vllm=True)).startswith("needs --vllm-python")
    assert not queue.why_not(Piece("a", 1, 1, "x"))
