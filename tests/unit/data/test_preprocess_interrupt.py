"""Preprocessing that is cut short: nothing new is left behind, earlier output stays."""

import json
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_mlra.data import pipeline
from megatron_mlra.data.cli import main
from megatron_mlra.data.errors import InputError
from megatron_mlra.data.writer import DatasetWriter

BYTE = ("--tokenizer", "byte")


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, which holds one good input."""
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text('{"text": "good"}\n')


def earlier_output() -> dict[str, bytes]:
    assert main(["--input", "good.jsonl", "--output-prefix", "out", *BYTE]) == 0
    return {name: Path(name).read_bytes() for name in ("out.bin", "out.idx", "out.json")}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_exception_keeps_earlier_output(monkeypatch, error):
    earlier = earlier_output()
    before = sorted(os.listdir())
    read_batches = pipeline.read_batches

    def interrupted(*arguments, **keywords):
        yield from read_batches(*arguments, **keywords)
        raise error

    monkeypatch.setattr(pipeline, "read_batches", interrupted)
    with pytest.raises(error):
        main(["--input", "good.jsonl", "--output-prefix", "out", "--overwrite", *BYTE])
    assert sorted(os.listdir()) == before
    assert {name: Path(name).read_bytes() for name in earlier} == earlier


def test_full_disk(capsys):
    """A file size limit makes write fail as a full disk does."""
    earlier = earlier_output()
    capsys.readouterr()
    Path("a.txt").write_text("x" * 300_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        argv = ["--input", "a.txt", "--output-prefix", "out", "--overwrite", *BYTE]
        assert main(argv) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error.endswith("File too large: 'out.bin'; nothing written\n") and error.count("\n") == 1
    assert sorted(os.listdir()) == ["a.txt", "good.jsonl", *sorted(earlier)]
    assert {name: Path(name).read_bytes() for name in earlier} == earlier


@pytest.fixture
def long_run(entry, tmp_path_factory):
    """A run with two workers in a session of its own, stopped once it has written tokens.

    Yields the process, its children, what waits for its end and returns exit code and last line,
    and a check that the folder is as it was.
    """
    earlier = earlier_output()
    tokenizer = Tokenizer(models.BPE({chr(i): i for i in range(97, 123)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("t.json")
    line = json.dumps({"text": "some words of a document " * 40}) + "\n"
    Path("big.jsonl").write_text(line * 40_000)
    argv = ["--input", Path("big.jsonl").absolute(), "--output-prefix", Path("out").absolute()]
    argv += ["--overwrite", "--workers", "2", "--eod-token", "a"]
    argv += ["--tokenizer", "hf", "--tokenizer-model", Path("t.json").absolute()]
    before = sorted(os.listdir())
    said = tmp_path_factory.mktemp("said")

    def check() -> None:
        assert sorted(os.listdir()) == before
        assert {name: Path(name).read_bytes() for name in earlier} == earlier

    def end() -> tuple[int, str]:
        """Behind lines of progress on a machine that is slow enough for some."""
        run = entry.wait(said, [pid])
        *progress, last = run.err.splitlines()
        assert all(line.startswith("tokenising:") for line in progress), run.err
        return run.code, last

    job = {"module": "megatron_mlra.command_line", "timeout": 600, "session": True}
    (pid,) = entry.start(said, "preprocess", *argv, **job)
    process = psutil.Process(pid)
    try:
        deadline = time.monotonic() + 300
        while not any(part.stat().st_size for part in Path().glob("out.bin.partial-*")):
            assert process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline
            time.sleep(0.02)
        yield process, process.children(recursive=True), end, check
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def stop_with_half_a_result(process: psutil.Process) -> int:
    """Stop a run that reads no results from now on; the worker that writes in vain."""
    process.suspend()
    deadline = time.monotonic() + 300
    while True:
        for child in process.children():
            if "pipe_write" in Path(f"/proc/{child.pid}/wchan").read_text():
                return child.pid
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group(long_run, number):
    """As a terminal's Ctrl-C or a scheduler's kill: parent and workers all get the signal; SIGTERM
    kills one in the middle of a result."""
    process, children, end, check = long_run
    if number == signal.SIGTERM:
        stop_with_half_a_result(process)
    os.killpg(process.pid, number)
    process.resume()
    assert end() == (128 + number, "error: interrupted; temporary files removed")
    check()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert len(children) >= 2 and not alive


def test_signal_during_the_renames_waits_for_their_end(monkeypatch):
    earlier = earlier_output()
    Path("good.jsonl").write_bytes(b'{"text": "other"}\n')
    replace = os.replace

    def signalled(source, target):
        replace(source, target)
        if target.endswith(".bin"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", signalled)
    argv = ["--input", "good.jsonl", "--output-prefix", "out", "--overwrite", *BYTE]
    assert main(argv) == 128 + signal.SIGTERM
    assert all(Path(name).read_bytes() != content for name, content in earlier.items())
    assert sorted(os.listdir()) == ["good.jsonl", *sorted(earlier)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_of_one_process_number_write_files_of_their_own(overwrite):
    """As in two containers that share a folder: each publishes its own tokens or none."""
    with (
        DatasetWriter("out", np.uint16, overwrite=overwrite) as first,
        DatasetWriter("out", np.uint16, overwrite=overwrite) as second,
    ):
        first.add(np.arange(30, dtype=np.uint16), np.array([10, 20]))
        second.add(np.full(50, 7, dtype=np.uint16), np.array([50]))
        first.publish({"tokenizer": {}})
        assert np.fromfile("out.bin", np.uint16).tolist() == list(range(30))
        if overwrite:
            second.publish({"tokenizer": {}})
        else:
            with pytest.raises(InputError, match=r"out\.bin exists: pass --overwrite"):
                second.publish({"tokenizer": {}})
    there = np.fromfile("out.bin", np.uint16).tolist()
    assert there == ([7] * 50 if overwrite else list(range(30)))
    assert sorted(os.listdir()) == ["good.jsonl", "out.bin", "out.idx", "out.json"]


@pytest.mark.parametrize("half", [False, True], ids=["working", "half a result"])
def test_killed_worker(long_run, half):
    """As the kernel does when memory runs out."""
    process, children, end, check = long_run
    workers = [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
    os.kill(stop_with_half_a_result(process) if half else workers[0], signal.SIGKILL)
    process.resume()
    code, said = end()
    assert code == 1
    assert said.startswith("error: a worker process died")
    check()
