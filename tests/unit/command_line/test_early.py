"""What is refused before torch is imported; the line that says that it is being imported."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser

import pytest

from megatron_mlra.command_line import early, flags_page
from megatron_mlra.command_line.commands import COMMANDS, there
from megatron_mlra.command_line.parser import OneLineParser
from support import ENV

RUN = """
import contextlib, io, json, sys, time
from megatron_mlra.command_line.commands import COMMANDS
answers = []
for name, *argv in json.loads(sys.argv[1]):
    command, said, begin = COMMANDS[name], io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said):
        try:
            code = command.run([*command.first, *argv])
        except SystemExit as end:
            code = end.code
    answers.append([code, said.getvalue(), time.process_time() - begin])
print(json.dumps([answers, sorted({"torch", "transformers", "megatron.core"} & {*sys.modules})]))
"""
LONG = "x" * 300
REFUSED = {
    "generate gone --prompt x": "gone is not a folder; give a checkpoint's folder",
    "generate empty --prompt x": "empty holds no checkpoint: no latest_checkpointed_iteration.txt",
    "generate run": "there is no prompt; use --prompt TEXT or --prompt-file FILE",
    "generate run --prompt-file gone": "--prompt-file gone: No such file or directory",
    "generate run --prompt x --dtype fp4": "--dtype: invalid choice: 'fp4'",
    "generate run --prompt x --max-batch 0": "--max-batch: 0 is no whole number of at least 1",
    "generate run --prompt x --chunk-size 0": "--chunk-size: 0 is no whole number of at least 1",
    "generate run --prompt x --max-new-tokens 0": "0 is no whole number of at least 1",
    "generate run --prompt x --context-parallel 0": "0 is no whole number of at least 1",
    "generate run --prompt x --top-p 2": "--top-p: 2 is no number above 0 and at most 1",
    "generate run --prompt x --temperature nan": "--temperature: nan is no number of at least 0",
    "evaluate run --text file --batch-size 0": "--batch-size: 0 is no whole number of at least 1",
    "generate run --prompt x --logprobs": "--logprobs writes into --output; add --output FILE",
    "generate run --prompt x --output file/out": "file cannot be made (File exists)",
    "generate run --prompt x --temp 1": "unknown flag --temp; did you mean --temperature?",
    "generate run --prompt x --tokenizer hf": "the hf tokenizer needs --tokenizer-model",
    "generate run --prompt x --tokenizer hf --tokenizer-model gone": "model gone: no such file",
    "generate run --prompt x --tokenizer hf --tokenizer-model file/x": "file/x: Not a directory",
    "generate run --prompt x\udcff": "--prompt 'x\\udcff' is no text in UTF-8",
    "generate run --prompt x --stop \udcff": "--stop '\\udcff' is no text in UTF-8",
    "reshard run new --dtype float16": "--dtype float16 does not fit the optimizer's state; add",
    "evaluate gone --text file": "gone is not a folder",
    "evaluate run": "nothing to evaluate; give --text, --data or --task",
    "evaluate run --text gone": "--text gone: No such file or directory",
    "evaluate run --text empty": "--text empty is a folder; give a file",
    "evaluate run --task gone": "--task gone: No such file or directory",
    "evaluate run --data a=gone": "data file gone.idx does not exist; make it with mlra preprocess",
    "evaluate run --data a=x.idx": "--data x.idx names a file; leave .idx out: x",
    "evaluate run --text file --tokenizer gone": "--tokenizer gone: no such file or folder",
    "evaluate run --text file --tokenizer file/x": "--tokenizer file/x: Not a directory",
    "evaluate run --text file --dtype int4": "--dtype: invalid choice: 'int4'",
    "evaluate run --text file --json file/x": "file cannot be made (File exists)",
    "analyze gone --text file": "gone is not a folder",
    "analyze run --data gone": "data file gone.idx does not exist",
    "analyze run --text file --plot x.gif": "--plot x.gif ends in none of .png, .svg, .pdf",
    "serve gone": "gone is not a folder; give a run, a checkpoint or an exported folder",
    "serve empty": "empty holds no checkpoint",
    "serve run --chat-template gone -- --max-num-seqs 4": "--chat-template gone: No such file",
    "inspect gone": "gone is not a folder",
    "inspect empty": "empty holds no checkpoint",
    "verify run gone": "gone is not a folder",
    "verify run run --text gone": "--text gone: No such file or directory",
    "reshard gone new": "gone is not a folder",
    "reshard run file/new": "file/new cannot be written: ",
    "reshard run new --files 1000000": "1000000 is no whole number from 1 to 1000",
    "convert export-hf run run": "run exists already; remove it, or choose another folder",
    "convert export-hf run new --chat-template gone": "--chat-template gone: No such file",
    "convert export-official run new --tokenizer gone": "--tokenizer gone is not a folder; give a",
    "convert export-gguf run new": "invalid choice: 'export-gguf'",
    "benchmark-cpu --config nope": "--config nope: no preset of this name, and no file",
    "benchmark-decoding --configs nope": "--configs nope: no preset of this name, and no file",
    "benchmark-decoding --speculate gone": "--speculate gone is not a folder",
    "benchmark-decoding --speculate empty": "empty holds no checkpoint",
    "benchmark-decoding --json file/x": "file cannot be made (File exists)",
    "benchmark-training --case nope": "--case nope: use stock-mla or one of ",
    "benchmark-training --case mlra4/fp3": "--case mlra4/fp3: 'fp3'; use one of bf16, delayed, t",
    "benchmark-training --case mlra4@tp3x": "tp3x",
    "benchmark-training --case gone.yaml": "--case gone.yaml: gone.yaml: no such file",
    "benchmark-training --only x": "--only x leaves no case of stock-mla/bf16/auto/2048, mlra4/",
    "benchmark-training --hidden-sise 8": "unknown flag --hidden-sise; did you mean --hidden-size",
    "benchmark-training --hidden-size x": "argument --hidden-size: invalid int value: 'x'",
    "benchmark-training --out file/x": "--out file/x: the folder file/x cannot be made",
    "soak --config nope --work new --lr 1": "--config nope: no preset of this name, and no file",
    "plan --config nope --gpus 8": "--config nope: no preset of this name, and no file",
    "twin nope --attention gqa": "nope: no preset of this name, and no file",
    "presets nope": "nope: no preset of this name, and no file",
    "preprocess --input gone --output-prefix x --tokenizer byte": "gone",
    "demo-corpus file/x.jsonl": "file cannot be made (File exists)",
    "compare-losses a=gone --json new/x": "gone",
    "demo-corpus x.jsonl --max-mb inf": "argument --max-mb: inf is no number above 0",
    "plan --config debug --gpus 99999999999": "99999999999 is no whole number from 1 to 1000000",
    "preprocess --input a --output-prefix x --max-record-mb nan": "nan is no number above 0 and at",
    "plan --config debug --gpus 8 --contexts 1 0": "0 is no whole number of at least 1",
    "plan --config debug --gpus 8 --global-batch-size 0": "0 is no whole number of at least 1",
    "soak --config debug --work new --ranks 0": "--ranks: 0 is no whole number of at least 1",
    "soak --config debug --work new --kills -1": "--kills: -1 is no whole number of at least 0",
    "benchmark-cpu --config mlra4_2.9b": "2.9b: use an mlra preset in float32, one micro-batch pe",
    "benchmark-cpu --config part.yaml": "part.yaml says nothing of attention, global_batch_size, l",
    "benchmark-cpu --steps 0": "--steps: 0 is no whole number of at least 1",
    "benchmark-cpu --warmup x": "--warmup: x is no whole number of at least 0",
    "benchmark-training --steps 0": "--steps: 0 is no whole number of at least 1",
    "benchmark-training --seconds nan": "--seconds: nan is no number above 0",
    "benchmark-decoding --tp 4 0": "--tp: 0 is no whole number of at least 1",
    "benchmark-decoding --contexts 0": "--contexts: 0 is no whole number of at least 1",
    "benchmark-decoding --speculate run --data gone": "data file gone.idx does not exist",
    "benchmark-decoding --profile --rehearse": "timed alone, and --rehearse has none; leave one",
    "benchmark-decoding --profile --speculate": "timed alone, and --speculate has none; leave one",
    "benchmark-decoding --text file": "--text is for --speculate FOLDER; add it, or leave --text",
    "benchmark-decoding --speculate --text file": "--text is for --speculate FOLDER; add it, or",
    "benchmark-decoding --speculate --context-parallel 2": "leave --context-parallel out",
    "benchmark-decoding --speculate --tp 4": "--tp is not for --speculate; leave one of them out",
    "benchmark-decoding --speculate --png x.png": "--png is not for --speculate; leave one of",
    "benchmark-decoding --speculate --prefill 9": "--prefill is not for --speculate; leave one of",
    "benchmark-decoding --speculate --all-reduce nccl": "--all-reduce is not for --speculate;",
    "generate run --prompt x --seed 99999999999999999999": "999999999 is no whole number from -92",
    "generate run --prompt x --page-size 10": "page size is 10; use a multiple of 16, best 64",
    "generate run --prompt x --page-size 99999999999": "a multiple of 16, best 64, at most 1048576",
    "serve run --tp 0": "0 is no whole number of at least 1",
    "serve run --start-timeout nan": "--start-timeout: nan is no number above 0",
    "convert export-hf run new --max-shard-gb inf": "inf is no number above 0",
    "inspect =": "SRC is given an empty name, as of a variable that is not set",
    "evaluate run --text =": "--text is given an empty name, as of a variable that is not set",
    "evaluate run --text file --json =": "--json is given an empty name",
    f"generate {LONG} --prompt x": f"checkpoint {LONG}: File name too long",
}


def test_refused_without_torch_in_less_than_a_second(tmp_path):
    (tmp_path / "part.yaml").write_text("num_layers: 2\n")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    # A lone = stands for an empty word.
    argvs = json.dumps([["" if w == "=" else w for w in line.split()] for line in REFUSED])
    done = subprocess.run(
        [sys.executable, "-c", RUN, argvs], capture_output=True, text=True, env=ENV, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answers, heavy = json.loads(done.stdout)
    assert heavy == []
    wrong = [
        (line, wanted, code, said)
        for (line, wanted), (code, said, _) in zip(REFUSED.items(), answers, strict=True)
        if code != 2 or wanted not in said
    ]
    assert not wrong
    for line, (_, said, seconds) in zip(REFUSED, answers, strict=True):
        assert said.startswith("error: ") and said.count("\n") == 1, (line, said)
        assert seconds < 1, (line, seconds)


ALONE = {
    "presets": "",
    "plan": "--config debug --gpus 8",
    "twin": "debug --attention gqa",
    "preprocess": "--input file --output-prefix new/x --tokenizer byte",
    "demo-corpus": "new/x.jsonl",
    "compare-losses": "a=file",
    "evaluate": "run --text file",
    "analyze": "run --text file",
    "serve": "run",
    "inspect": "run",
    "verify": "run run",
    "reshard": "run new",
    "convert": "export-hf run new",
    "soak": "--config debug --work new",
    "benchmark-cpu": "",
}
"""Commands of one process, each with a line that is refused for nothing but its ranks."""


def test_commands_of_one_process_are_refused_as_ranks(tmp_path):
    together = {name for name, command in COMMANDS.items() if command.ranks or command.program}
    assert {*ALONE} == {*there()} - together
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    argvs = json.dumps([[name, *line.split()] for name, line in ALONE.items()])
    command = [sys.executable, "-c", RUN, argvs]
    env = ENV | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers, heavy = json.loads(done.stdout)
    assert heavy == []
    said = "error: this command runs in one process, and WORLD_SIZE is 2; start it without"
    said += " torchrun, or unset WORLD_SIZE\n"
    assert [[code, line] for code, line, _ in answers] == [[2, said]] * len(ALONE)


@pytest.mark.parametrize("argv", [["generate", "gone", "--prompt", "x"], ["generate", "--no"]])
def test_what_all_ranks_refuse_is_said_once_per_host(argv, tmp_path):
    for local, lines in (("0", 1), ("1", 0)):
        env = ENV | {"WORLD_SIZE": "2", "RANK": local, "LOCAL_RANK": local}
        command = [sys.executable, "-m", "megatron_mlra.command_line", *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, lines), done.stderr


PLACES = ("FILE", "FOLDER", "SRC", "DST", "A", "B", "PRESET", "FILE.png", "FILE.yaml", "OUT.jsonl")
LEFT = {
    ("preprocess", "input"): "globs too, and read at once",
    ("serve", "export_to"): "has a default that the source decides",
}
"""Arguments that name places and are not declared, each with its reason."""


def actions(parser: ArgumentParser):
    """Those of a parser and of its subcommands."""
    yield from parser._actions
    for below in flags_page.subcommands(parser).values():
        yield from actions(below)


@pytest.mark.parametrize("name", [n for n, command in there().items() if not command.program])
def test_each_place_on_a_command_line_is_declared(name):
    for action in actions(COMMANDS[name].parser()):
        if action.metavar in PLACES and (name, action.dest) not in LEFT:
            assert hasattr(action, "early"), f"mlra {name}: {action.dest} is not in reads or writes"


BOUND_LATER = {
    "plan": "bandwidth collective_us core dp_overlap gemm latent_core link memory network passes",
    "preprocess": "eod_id vocab_size workers",
    "demo-corpus": "seed",
    "generate": "seed",
    "serve": "port",
    "soak": "seed",
    "benchmark-decoding": "seed",
}
"""Numbers of a command that its body bounds, with others."""


@pytest.mark.parametrize("name", [n for n, command in there().items() if not command.program])
def test_each_number_on_a_command_line_has_bounds(name):
    raw = {each.dest for each in actions(COMMANDS[name].parser()) if each.type in (int, float)}
    assert raw <= {*BOUND_LATER.get(name, "").split()}, f"mlra {name}: see command_line/numbers.py"


def test_optimised_python_has_no_docstrings_and_all_helps():
    names = [n for n, command in there().items() if not command.program]
    code = "from megatron_mlra.command_line.commands import COMMANDS as all_"
    code += f"\nfor name in {names}: all_[name].parser().format_help()"
    command = [sys.executable, "-OO", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr


def test_inputs_come_before_outputs_and_both_before_the_rest(tmp_path):
    said = []
    parser = OneLineParser()
    below = parser.add_subparsers(dest="command").add_parser("do")
    early.writes(below.add_argument("--out"), lambda *args: said.append(args))
    early.reads(below.add_argument("--in", nargs="+"), lambda *args: said.append(args))
    parser.together.append(lambda args: said.append(args.command))
    early.check(parser, ["do", "--out", "c", "--in", "a", "b"])
    assert said == [("a", "--in"), ("b", "--in"), ("c", "--out"), "do"]
    passing = OneLineParser(passes_on=True)
    early.reads(passing.add_argument("--in"), early.a_file)
    early.check(passing, ["--other", "--", "--in", "gone"])
    with pytest.raises(ValueError, match=r"^--in gone: No such file or directory$"):
        early.check(passing, ["--other", "--in", "gone", "--"])
    locked = tmp_path / "pipe"
    locked.mkdir()
    with pytest.raises(ValueError, match="is a folder; give a file"):
        early.a_file(locked, "--in")


HOOKED = """
import sys
from importlib.util import find_spec
from megatron_mlra.command_line.loading import announce_loading

class Hook:
    def find_spec(self, name, path=None, target=None):
        print(name)

sys.meta_path.insert(0, Hook())
announce_loading("PyTorch", "some seconds")
find_spec("torch")
find_spec("torch")
"""


def test_the_announcement_leaves_other_hooks_on_imports_alone():
    done = subprocess.run(
        [sys.executable, "-c", HOOKED], capture_output=True, text=True, env=ENV, check=True
    )
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("loading PyTorch") == 1


TORCH = 'raise ImportError("not this one")'


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ("pretrain --config debug --mock-data", "PyTorch and Megatron-core: some 10 seconds"),
        ("launch --standalone x.py", "PyTorch: some seconds"),
        ("inspect run", "PyTorch: some seconds"),
        ("generate run --prompt x", "PyTorch: some seconds"),
        ("pretrain --help", None),
        ("pretrain --config debug", None),
        ("generate --version", None),
        ("plan --config debug --gpus 1", None),
    ],
)
def test_a_slow_start_is_announced_once(argv, what, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(TORCH)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    env = ENV | {"PYTHONPATH": f"{tmp_path}:{ENV['PYTHONPATH']}"}
    command = [sys.executable, "-m", "megatron_mlra.command_line", *argv.split()]
    for rank in ("0", "1"):
        done = subprocess.run(
            command, capture_output=True, text=True, env=env | {"RANK": rank}, cwd=tmp_path
        )
        said = [line for line in done.stderr.splitlines() if line.startswith("loading ")]
        wanted = [f"loading {what}, more on a busy machine"] if what and rank == "0" else []
        assert said == wanted, done.stderr
        if not what:
            break
