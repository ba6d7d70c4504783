"""What somebody meant by a name that is none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_mlra.command_line import flags_page
from megatron_mlra.command_line.commands import COMMANDS, there
from megatron_mlra.command_line.suggest import ELSEWHERE, did_you_mean
from megatron_mlra.description.presets import KEYS
from megatron_mlra.training import flags
from support import ENV
from support.programs import program

PRESET_KEYS = KEYS.read_text().split()
PRETRAIN = [f"--{key.replace('_', '-')}" for key in PRESET_KEYS]
PRETRAIN += flags.parser()._option_string_actions


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        # What other programs call it.
        ("--num-heads", "--num-attention-heads"),
        ("--n_head", "--num-attention-heads"),
        ("--learning-rate", "--lr"),
        ("--num-key-value-heads", "--num-query-groups"),
        ("--rope-theta", "--rotary-base"),
        ("--batch-size", "--micro-batch-size"),
        ("--max-steps", "--train-iters"),
        ("--output-dir", "--save"),
        ("--tp", "--tensor-model-parallel-size"),
        ("--gradient-checkpointing", "--recompute-granularity"),
        ("--preset", "--config"),
        # Words that it has, and slips of the keyboard.
        ("--num-layer", "--num-layers"),
        ("--latent-heads", "--num-latent-heads"),
        ("--learning-rate-warmup-iters", "--lr-warmup-iters"),
        ("--optimizr", "--optimizer"),
        ("--presett", "--config"),
        ("--wandb_project", "--wandb-project"),
        ("--no-such-flag", None),
        ("--zzz", None),
        ("--", None),
    ],
)
def test_a_flag_of_training(given, meant):
    assert did_you_mean(given, PRETRAIN) == (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train", "pretrain"),
        ("trian", "pretrain"),
        ("eval", "evaluate"),
        ("exprot", "convert"),
        ("torchrun", "launch"),
        ("zzz", None),
    ],
)
def test_a_command(given, meant):
    assert did_you_mean(given, COMMANDS) == (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("given", "known", "meant"), [("--plot", "--png", "--png"), ("--png", "--plot", "--plot")]
)
def test_a_flag_of_another_command(given, known, meant):
    """Some commands draw to `--png`, others to `--plot`."""
    assert did_you_mean(given, ["--json", "--last", known]) == f"; did you mean {meant}?"


def test_a_key_of_a_preset():
    assert did_you_mean("num_heads", PRESET_KEYS) == "; did you mean num_attention_heads?"


def test_names_of_other_programs_lead_somewhere():
    known = {*COMMANDS, *(name.lstrip("-") for name in PRETRAIN), "nproc-per-node", "nnodes"}
    for name, command in there().items():
        if name not in flags_page.THEIRS:
            for parser in (command.parser(), *flags_page.subcommands(command.parser()).values()):
                known |= {option.lstrip("-") for option in parser._option_string_actions}
    assert {*ELSEWHERE} <= known


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("plan --config debug --num-gpus 8", "unknown flag --num-gpus; did you mean --gpus?"),
        ("plan --config debug --gpus 8 --context-parallel-size 2", "; did you mean --cp?"),
        ("plan --config debug --gpus 8 --batch-size 2", "; did you mean --global-batch-size?"),
        (
            "plan --config debug --gpus 8 --output-gate",
            "--output-gate is a flag of mlra pretrain; plan a preset of your own that has it"
            " (base: PRESET, output_gate: ...), or give it to mlra pretrain --config PRESET",
        ),
        ("plan --config debug --gpus 8 --no-bf16", "--bf16 is a flag of mlra pretrain; plan a"),
        ("generate x hello", "argument hello; give a prompt as --prompt 'TEXT', in quotes"),
        ("generate x --max-tokens 9", "unknown flag --max-tokens; did you mean --max-new-tokens?"),
        ("generate x --tensor-parallel-size 2", "; it is the number of processes: torchrun --npr"),
        ("convert exprot-hf a b", "; did you mean export-hf?"),
        ("convert export-hf a b --shard-gb 3", "--shard-gb; did you mean --max-shard-gb?"),
        ("plan --gpus 8 --config mlra4_2.9", "did you mean mlra4_2.9b?"),
        ("launch --gpus 8 x.py", "unknown flag --gpus; did you mean --nproc-per-node?"),
        ("launch --nproc-per-node 2", "give what to start: -m megatron_mlra.training, or a script"),
    ],
)
def test_every_command_says_it_in_one_line(argv, said):
    done = subprocess.run([program("mlra"), *argv.split()], capture_output=True, text=True, env=ENV)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and said in done.stderr


@pytest.mark.parametrize("argv", ["presets", "pretrain --help", "plan --help", "launch --help"])
def test_a_reader_that_leaves_is_no_error(argv):
    """As `mlra COMMAND | head -n 0`, which leaves before anything is written."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT, program("mlra"), *argv.split()],
        capture_output=True, text=True, env=ENV, timeout=120,
    )  # fmt: skip
    code, _, said = done.stdout.partition(" ")
    assert int(code) in (0, 141) and said == "''\n", done.stdout


LEFT = """
import os, subprocess, sys
ours, theirs = os.pipe()
os.close(ours)
done = subprocess.run(sys.argv[1:], stdout=theirs, stderr=subprocess.PIPE, text=True)
print(done.returncode, repr(done.stderr))
"""
