"""Ranks of inference that were told different things: none waits, and all end with one line."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.command_line import ranks
from megatron_mlra.inference import world
from megatron_mlra.launch.ports import reserve_port
from support import ENV
from support.random_checkpoint import RandomFolder, latent

HOST = socket.gethostname()
SHORT = ("--max-new-tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two checkpoints, `one` and `other`."""
    root = tmp_path_factory.mktemp("told")
    for name in ("one", "other"):
        write_megatron(RandomFolder(latent(4, 4)), root / name, progress=False)
    return root


@pytest.fixture
def ends(warm_mlra, folder):
    """Start a rank with each of these command lines; (exit code, stdout, stderr) of each."""

    def run(
        *lines: list[str], env: dict[str, str] | None = None, given: tuple[str, str] = ("", "")
    ) -> list[tuple[int, str, str]]:
        with reserve_port() as kept:
            common = ENV | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(len(lines))}
            common["MASTER_PORT"] = str(kept.getsockname()[1])
            ranks = [
                subprocess.Popen(
                    [warm_mlra, *map(str, line)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=folder,
                    env=common
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    | (env if env and rank else {}),
                )
                for rank, line in enumerate(lines)
            ]
            for rank, text in zip(ranks, given, strict=True):
                rank.stdin.write(text)
                rank.stdin.close()
                rank.stdin = None
            said = [rank.communicate(timeout=120) for rank in ranks]
        return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]

    return run


GENERATE = ["generate", "one", "--prompt", "def ", *SHORT]
BENCHMARK = ["benchmark-decoding", "--rehearse", "--batches"]
DIFFERENT = {
    "generate": (
        [*GENERATE, "--all-reduce", "auto"],
        ["generate", "other", *GENERATE[2:], "--all-reduce", "nccl", "--prompt", "class "],
        "--all-reduce: nccl, where rank 0 has auto; checkpoint: other, where rank 0 has one;"
        " --prompt: ['def ', 'class '], where rank 0 has ['def ']",
    ),
    "benchmark": ([*BENCHMARK, "1"], [*BENCHMARK, "2"], "--batches: [2], where rank 0 has [1]"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_were_told_different_things(ends, what):
    *lines, said = DIFFERENT[what]
    first, second = ends(*lines)
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert first[2] == (
        f"error: rank 1 (host {HOST}) differs from rank 0 (host {HOST}) in {said}; start every host"
        " with the same command, code and data\n"
    )
    assert first[1] == second[1] == second[2] == ""


def test_an_environment_that_differs(ends):
    first, second = ends(GENERATE, GENERATE, env={"NCCL_ALGO": "Tree"})
    assert (first[0], second[0]) == (2, 2)
    assert "in the environment variable NCCL_ALGO: Tree, where rank 0 has not set;" in first[2]


def test_files_of_one_name_that_differ(ends):
    """Each rank has its own standard input, as each host may have its own file."""
    line = ["generate", "one", "--prompt-file", "/dev/stdin", *SHORT]
    first, second = ends(line, line, given=("a\n", "b\n"))
    assert (first[0], second[0]) == (2, 2)
    assert "in the prompts: SHA-256 " in first[2] and second[2] == ""
    first, second = ends(line, line, given=("a\n", ""))
    assert (first[0], second[0]) == (2, 2)
    assert "in the prompts: there is no prompt; use --prompt TEXT or" in first[2]


def test_ranks_that_were_told_the_same_go_on(ends):
    first, second = ends(GENERATE, GENERATE)
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert second[1] == second[2] == "" and first[1].startswith("def ")


def test_files_of_other_content_have_another_fingerprint(tmp_path):
    def found() -> dict:
        return world.of_inputs(str(tmp_path / "one"), str(tmp_path / "t.tiktoken"))

    write_megatron(RandomFolder(latent(4, 4)), tmp_path / "one", progress=False)
    (tmp_path / "t.tiktoken").write_text("x")
    before = found()
    assert before == found() and before["step"] == {f"the checkpoint of {tmp_path}/one": "release"}
    (tmp_path / "t.tiktoken").write_text("y")
    changed = {key for key, value in found()["files"].items() if before["files"][key] != value}
    assert changed == {f"the content of {tmp_path}/t.tiktoken"}
    weights = max((tmp_path / "one/release").glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[5] ^= 1
    weights.write_bytes(data)
    changed |= {key for key, value in found()["files"].items() if before["files"][key] != value}
    assert changed == {f"the content of {file}" for file in (weights, tmp_path / "t.tiktoken")}


def test_a_world_without_a_place_is_refused(folder, monkeypatch, capsys):
    from megatron_mlra.inference.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    assert main([str(folder / "one"), "--prompt", "x"]) == 2
    assert capsys.readouterr().err == (
        "error: WORLD_SIZE is 2 and MASTER_ADDR is not set; start the ranks with torchrun, or unset"
        " WORLD_SIZE for a single process\n"
    )


def test_who_says_an_error(monkeypatch, capsys):
    """All ranks may have it, and torchrun ends them when the first exits; or one alone has it."""
    waits = []
    monkeypatch.setattr(ranks.time, "sleep", waits.append)
    for rank, local, error, said in (
        (0, 0, ValueError("a"), "error: a\n"),
        (1, 1, ValueError("a"), "error (rank 1): a\n"),
        (0, 0, world.Refused("b"), "error: b\n"),
        (1, 1, world.Refused("b"), ""),
        (8, 0, world.Refused("b"), "error: b\n"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert world.refuse(error) == 2
        assert capsys.readouterr().err == said
    assert waits == [5, 1]


ALONE = 'if [ "$LOCAL_RANK" = 1 ]; then exec "$@"; else exec sleep 60; fi'
"""A rank whose fellow has been refused nothing: it waits for the meeting."""
LAUNCHERS = {"torchrun": "torch.distributed.run", "launch": "megatron_mlra.launch"}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("program", ["generate", "pretrain"])
def test_what_one_rank_alone_refuses_it_says_itself(
    launcher, program, folder, warm_python, warm_mlra
):
    argv = {
        "generate": ["generate", "one", "--prompt-file", "gone.txt"],
        "pretrain": ["pretrain", "--config", "gone.yaml"],
    }[program]
    start = [warm_python, "-m", LAUNCHERS[launcher], "--standalone", "--nproc-per-node"]
    for count, words in (("2", ["bash", "-c", ALONE, "bash"]), ("3", [])):
        command = [*start, count, "--no-python", *words, warm_mlra, *argv]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=ENV, timeout=120
        )
        said = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert done.returncode != 0 and len(said) == 1 and "gone" in said[0], done.stderr
        assert launcher == "launch" or ("(rank 1)" in said[0]) == (count == "2"), said


def test_an_error_stands_for_a_result():
    def fails() -> str:
        raise FileNotFoundError(2, "No such file or directory", "x")

    refused = world.Once(fails)
    assert refused.text() == "x: No such file or directory"
    with pytest.raises(FileNotFoundError):
        refused()
    assert world.Once(lambda: ["a"]).text() == world.Once(lambda: ["a"]).text() != "a"
