"""The benchmark of vLLM's throughput around vLLM: workloads, records, picture, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import ENV, ROOT

BENCHMARK = [sys.executable, "-m", "mlra_vllm.benchmarks.throughput"]
VLLM = """
import json
from pathlib import Path


def add_cli_args(parser):
    for flag in ("model", "output-json"):
        parser.add_argument(f"--{flag}")
    for flag in ("num-prompts", "max-num-seqs", "max-model-len", "random-output-len"):
        parser.add_argument(f"--{flag}", type=int)


def main(args):
    if "num_key_value_heads" in (Path(args.model) / "config.json").read_text():
        raise SystemExit(3)
    seen = 10_000 * args.max_num_seqs + args.max_model_len
    told = {"elapsed_time": args.num_prompts / 10, "requests_per_second": 10}
    Path(args.output_json).write_text(json.dumps(told | {"tokens_per_second": seen}))
"""
"""A vLLM whose benchmark takes a tenth of a second a request, tells some of its flags, and fails
with GQA."""
ARGUMENTS = """
import argparse


class FlexibleArgumentParser(argparse.ArgumentParser):
    def parse_args(self, flags):
        return self.parse_known_args(flags)[0]
"""
RECORD = {"model": "mlra4", "tp": 1, "requests": 1000, "in": 1024, "out": 256, "seconds": 20.5}
RECORD |= {"requests_per_s": 48.8, "tokens_per_s": 62439.0, "new_tokens_per_s": 12487.8}
PNG = b"\x89PNG"


def run(folder: Path, *flags: str | Path, python: list[str] = BENCHMARK):
    path = f"{folder}:{ROOT / 'kernels'}:{ENV.get('PYTHONPATH', '')}"
    env = ENV | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*python, *flags], capture_output=True, text=True, env=env, cwd=folder)


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A folder of modules with the vLLM above."""
    for name, text in (("benchmarks/throughput", VLLM), ("utils/argparse_utils", ARGUMENTS)):
        file = tmp_path / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    about = tmp_path / "vllm-0.99.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Name: vllm\nVersion: 0.99\n")
    return tmp_path


def test_every_model_runs_every_set_of_requests(vllm):
    sets = ("--requests", "512", "1K", "256", "--requests", "32", "2K", "100")
    done = run(vllm, "--models", "mlra4", "gqa6", *sets, "--json", "a.json", "--png", "a.png")
    failed = "error: not measured: gqa6 512 1024 256, gqa6 32 2048 100\n"
    assert done.returncode == 1 and done.stderr.endswith(failed), done.stderr
    records = json.loads((vllm / "a.json").read_text())
    assert [(r["model"], r["requests"], r["in"], r["out"]) for r in records] == [
        *(("mlra4", 512, 1024, 256), ("gqa6", 512, 1024, 256)),
        *(("mlra4", 32, 2048, 100), ("gqa6", 32, 2048, 100)),
    ]
    seen = [256_0000 + 1024 + 256 + 1024, 32_0000 + 2048 + 100 + 1024]
    assert [r["tokens_per_s"] for r in records[::2]] == seen
    assert [r["new_tokens_per_s"] for r in records[::2]] == [2560.0, 1000.0]
    assert [r["error"] for r in records[1::2]] == ["exit code 3"] * 2
    assert (vllm / "a.png").read_bytes().startswith(PNG)
    assert "| mlra4, 1 | 512 | 1024 | 256 | 51.2 |" in done.stdout


@pytest.mark.parametrize("whole", [False, True], ids=["records", "a result of measure.py"])
def test_a_file_is_drawn_without_vllm(whole, tmp_path):
    records = [RECORD, RECORD | {"requests": 32, "in": 32768, "new_tokens_per_s": 205.0}]
    records.append({k: RECORD[k] for k in ("model", "tp", "requests", "in", "out")})
    about = {"gpu": "NVIDIA H200", "gpus": 1, "vllm": "0.26.0", "commit": "abc1234"}
    (tmp_path / "a.json").write_text(json.dumps(about | {"records": records} if whole else records))
    done = run(tmp_path, "--draw", "a.json", "--png", "a.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1", "a.json is no JSON file (Expecting"),
        ("[1]", "a.json has no records of throughput; give what --json wrote"),
        ('{"rows": []}', "a.json has no records of throughput"),
        (json.dumps([RECORD | {"new_tokens_per_s": "many"}]), "a.json has no records of throu"),
        ("[]", "a.png is not drawn: no record has new tokens per second"),
        (None, "a.json is no JSON file ([Errno 2] No such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(content, says, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    done = run(tmp_path, "--draw", "a.json", "--png", "a.png")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {says}"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "a.png").exists()


NO_NUMBER = "is no number of requests or tokens; give"
WRONG = {
    ("throughput", "--tp", "0"): "--tp: 0 is no whole number from 1 to",
    ("throughput", "--tp", "1", "x"): "--tp: x is no whole number from 1 to",
    ("throughput", "--tp", "5"): "--tp 5 of mlra4: tensor parallel size 5 does not fit 24 heads",
    ("throughput", "--models", "gqa6", "--tp", "2", "4"): "--tp 4 does not fit 24 heads, 6 of",
    ("throughput", "--timeout", "-1"): "--timeout: -1 is no number of seconds above 0",
    ("throughput", "--timeout", "nan"): "--timeout: nan is no number of seconds above 0",
    ("throughput", "--requests", "8", "K", "8"): f"K {NO_NUMBER} 1 or up",
    ("throughput", "--requests", "8", "9" * 20, "8"): f"{'9' * 20} {NO_NUMBER} 1 or up",
    ("steps", "--tp", "0"): "--tp: 0 is no whole number from 1 to",
    ("steps", "--models", "mla", "mlra4", "--tp", "3"): "--tp 3 of mlra4: tensor parallel size",
    ("steps", "--timeout", "0"): "--timeout: 0 is no number of seconds above 0",
    ("steps", "--contexts", "0x8K"): f"--contexts: 0 {NO_NUMBER} 1 or up",
    ("steps", "--contexts", "8x0"): f"--contexts: 0 {NO_NUMBER} 1 or up",
    ("steps", "--contexts", "8"): "--contexts: 8 is no batch and context such as 32x8K",
    ("steps", "--profile", "1xmany"): f"--profile: many {NO_NUMBER} 1 or up",
    ("steps", "--prompt", "-1"): f"--prompt: -1 {NO_NUMBER} 0 or up",
    ("steps", "--chunk", "0"): f"--chunk: 0 {NO_NUMBER} 1 or up",
    ("steps", "--requests", "0", "1K", "256"): f"--requests: 0 {NO_NUMBER} 1 or up",
}


ENDS = """
import io, json, sys
from contextlib import redirect_stderr
from mlra_vllm.benchmarks import steps, throughput
for name, *flags in json.loads(sys.argv.pop()):
    sys.argv[1:] = [*flags, "--json", "a.json"]
    with redirect_stderr(io.StringIO()) as said:
        try:
            {"steps": steps, "throughput": throughput}[name].main()
        except SystemExit as end:
            print(end.code if isinstance(end.code, str) else said.getvalue().splitlines()[-1])
"""


def test_numbers_that_make_no_sense_are_refused_before_anything_runs(tmp_path):
    program = [sys.executable, "-c", ENDS, json.dumps([*WRONG])]
    done = run(tmp_path, python=program)
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRONG), done.stderr
    for argv, line in zip(WRONG, lines, strict=True):
        assert WRONG[argv] in line, argv
    assert not (tmp_path / "a.json").exists()


def test_flags_are_refused_before_anything_runs(vllm):
    done = run(vllm, "--draw", "a.json")
    assert done.stderr == "error: --draw a.json needs a picture's name: add --png FILE.png\n"
    done = run(vllm, "--requests", "0", "1K", "256")
    assert done.stderr.endswith("0 is no number of requests or tokens; give 1 or up\n")
    start = "import sys; sys.modules['matplotlib'] = None; import mlra_vllm.benchmarks.throughput"
    without = [sys.executable, "-c", f"{start} as benchmark; benchmark.main()"]
    done = run(vllm, "--models", "mlra4", "--png", "a.png", "--json", "a.json", python=without)
    said = "error: --png needs matplotlib: pip install matplotlib, or leave --png out\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert not (vllm / "a.json").exists()
