"""What is refused before torch is imported, and that nothing is that the whole parser takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_mlra.training import early_checks
from support import ENV

LONG = "x" * 300
DEBUG = ("--config", "debug", "--mock-data")

RUN = """
import io, json, sys
from contextlib import redirect_stderr
from megatron_mlra.training import cli
said, codes = [], []
for argv in json.loads(sys.argv[1]):
    sys.argv = ["mlra pretrain", *argv]
    with redirect_stderr(io.StringIO()) as error:
        codes.append(cli.main())
    said += error.getvalue().splitlines()
heavy = {"torch", "megatron.core"} & {*sys.modules}
print(json.dumps([codes, said, sorted(heavy)]))
"""


def test_refused_in_a_moment(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "key.yaml").write_text("base: debug\nnum_heads: 4\n")
    (tmp_path / "saves.yaml").write_text("base: debug\nsave: [1]\n")
    (tmp_path / "steps.yaml").write_text("base: debug\ntrain_iters: many\n")
    (tmp_path / "shape.yaml").write_text("base: debug\nattention: nope\n")
    (tmp_path / "layers.yaml").write_text("base: debug\nno_rope_freq: '[x]'\n")
    (tmp_path / "two.yaml").write_text("base: debug\nmock_data: true\ndata_path: x\n")
    (tmp_path / "data.yaml").write_text("base: debug\ndata_path: 0.5 gone 0.5 lost\n")
    for name in ("file", "a book.txt", "whole.json", "whole.idx"):
        (tmp_path / name).touch()
    (tmp_path / "run/iter_0000004").mkdir(parents=True)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("4")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    cases = {
        ("--num-heads", "4"): "unknown flag --num-heads; did you mean --num-attention-heads?",
        ("--num_layers", "4"): "unknown flag --num_layers; did you mean --num-layers?",
        ("--no_bf16",): "unknown flag --no_bf16; did you mean --no-bf16?",
        ("--train_iters=4",): "unknown flag --train_iters; did you mean --train-iters?",
        ("--num_layer", "4"): "unknown flag --num_layer; did you mean --num-layers?",
        ("--learning-rate=1"): "unknown flag --learning-rate; did you mean --lr?",
        (
            *DEBUG,
            "--rampup-batch-size",
            "2",
            "2",
            "8",
        ): "--rampup-batch-size is ignored by Megatron",
        (*DEBUG, "--step-batch-size-schedule", "0-8"): "--step-batch-size-schedule: '0-8' is no ",
        (*DEBUG, "--multiple-validation-sets"): "--multiple-validation-sets needs --full-valid",
        (*DEBUG, "--non-persistent-save-interval", "2"): "2 needs --non-persistent-ckpt-type; add",
        (*DEBUG, "--non-persistent-save-interval", "0"): "-interval is 0; it must be at least 1",
        (*DEBUG, "--non-persistent-ckpt-type", "in_memory"): "in_memory is not in Megatron",
        (*DEBUG, "--non-persistent-ckpt-type", "global"): "-ckpt-type global: a resume would load",
        (*DEBUG, "--non-persistent-ckpt-type", "local"): "-ckpt-type local: a resume would load",
        (*DEBUG, "--non-persistent-global-ckpt-dir", "x"): "-global-ckpt-dir is of checkpoints t",
        (*DEBUG, "--rerun-mode", "report_stats"): "--rerun-mode report_stats ends Megatron 0.19.2",
        (*DEBUG, "--exit-signal", "SIGKILL"): "--exit-signal SIGKILL cannot be caught by a process",
        (*DEBUG, "--dataloader-type", "external"): "--dataloader-type external takes data from a ",
        (*DEBUG, "--sharp-enabled-group", "dp"): "--sharp-enabled-group dp has no effect without",
        (*DEBUG, "--fake-process-group"): "--fake-process-group is for tests of Megatron; plan ",
        (*DEBUG, "--adlr-autoresume"): "--adlr-autoresume needs a package of NVIDIA's own clusters",
        (*DEBUG, "--moe-use-upcycling"): "--moe-use-upcycling fails in Megatron 0.19.2; leave it",
        (*DEBUG, "--tokenizer-type", "MultimodalTokenizer"): "is for images; use NullTokenizer",
        (*DEBUG, "--gpu-sniff-test-interval", "0"): "-test-interval is 0; it must be at least 1",
        (*DEBUG, "--lazy-mpu-init"): "--lazy-mpu-init leaves the process groups to a program of",
        (*DEBUG, "--rl-profile"): "--rl-profile needs Megatron's RL package; leave it out",
        (*DEBUG, "--decoupled-lr", "0"): "--decoupled-lr 0 is not positive; use e.g. 3e-4",
        ("--config", "none.yaml"): "--config none.yaml: no such file",
        ("--config", "mlra4_2.9"): "did you mean mlra4_2.9b?",
        (
            "--config",
            "bad.yaml",
        ): "--config bad.yaml: while parsing a flow sequence",
        ("--config", "key.yaml"): "unknown key 'num_heads'; did you mean num_attention_heads?",
        ("--config", "debug"): "no data: give --data-path PREFIX (mlra preprocess writes",
        ("--lr", "1"): "--num-layers is missing; give it, or a preset with --config",
        (
            *("--load", "run", "--use-checkpoint-args"),
        ): "--num-layers is missing, and --use-checkpoint-args takes no sizes of latent attention",
        (*DEBUG, "--use-checkpoint-args"): "--use-checkpoint-args has no effect without --load",
        ("--config",): "argument --config: expected one argument",
        ("--config", "data.yaml"): "data file gone.idx does not exist; make it with mlra preproc",
        (
            "--config",
            "debug",
            "--data-path",
            "file.bin",
        ): "--data-path file.bin names a file; leave",
        (
            "--config",
            "debug",
            "--data-path",
            "a book.txt",
        ): "a book.txt is no data yet; mlra preprocess --input 'a book.txt' --output-prefix",
        (
            "--config",
            "debug",
            "--data-path",
            "whole.json",
        ): "--data-path whole.json names a file; leave .json out: whole",
        (*DEBUG, "--save", "file"): "--save file cannot be written: file is not a folder",
        (
            *DEBUG,
            "--save",
            "run",
        ): "--save run holds a checkpoint of step 4, which",
        (
            *DEBUG,
            "--load",
            "none",
        ): "--load none is not a folder; give the --save of",
        (
            *DEBUG,
            "--load",
            "run/iter_0000004",
        ): "no checkpoint of its own; give run, and --ckpt-step 4",
        (
            *DEBUG,
            "--held-out",
            "books=gone",
        ): "data file gone.idx does not exist; make it with mlra",
        (*DEBUG, "--train-iters", "abc"): "argument --train-iters: invalid int value: 'abc'",
        (*DEBUG, "--train-iters", "-5"): "--train-iters is -5; it must be at least 1",
        (*DEBUG, "--lr", "fast"): "argument --lr: invalid float value: 'fast'",
        (*DEBUG, "--lr", "0"): "--lr 0 is not positive; use e.g. 3e-4",
        (*DEBUG, "--lr", "--"): "argument --lr: expected one argument",
        (*DEBUG, "--clip-grad", "nan"): "--clip-grad is nan; it must be a finite number",
        (*DEBUG, "--split", "most"): "--split most is not three shares such as 969,30,1",
        (*DEBUG, "--split", "0,0,0"): "--split 0,0,0 gives nothing to any part; use e.g.",
        (*DEBUG, "--attention", "gqo"): "argument --attention: invalid choice: 'gqo' (choose from",
        (
            *DEBUG,
            "--normalization",
            "RMS",
        ): "invalid choice: 'RMS' (choose from 'LayerNorm', 'RMSNorm')",
        (
            *DEBUG,
            "--attention-backend",
            "x",
        ): "--attention-backend: invalid choice 'x'; use one of flash",
        (*DEBUG, "--no-rope-freq", "[1"): "argument --no-rope-freq: '[1' is not valid; use a num",
        (*DEBUG, "--moe-layer-freq", "[1]*99999999999"): "'[1]*99999999999' is not valid; use a n",
        (*DEBUG, "--moe-layer-freq", "0"): "argument --moe-layer-freq: '0' is not valid; use a nu",
        (*DEBUG, "--moe-layer-freq", "[1,0]"): "--moe-layer-freq is of 2 layers, not 4; use a nu",
        ("--config", "layers.yaml"): "--config layers.yaml: no_rope_freq: '[x]' is not valid; use",
        (
            *DEBUG,
            "--data-path",
            "x",
        ): "command line names data by --mock-data and by --data-path",
        (
            "--config",
            "two.yaml",
        ): "preset names data by --mock-data and by --data-path; leave on",
        (*DEBUG, "--multi-latent-attention"): "is Megatron's own MLA; use --attention mlra",
        (
            *DEBUG,
            "--yaml-cfg",
            "a.yaml",
        ): "--yaml-cfg: a.yaml would replace all flags; use",
        (*DEBUG, "runs/my"): "unknown argument runs/my",
        ("--config", "saves.yaml"): "--config saves.yaml: save is [1], not a valid str",
        ("--config", "steps.yaml"): "steps.yaml: train_iters is 'many', not a valid int",
        ("--config", "shape.yaml"): "attention is 'nope'; use one of mlra, gqa, gta, mfa, tpa",
        (*DEBUG, "--save", ""): "--save is given an empty name, as of a variable that is not set",
        (*DEBUG, "--save", LONG): f"--save {LONG}: File name too long",
        (*DEBUG, "--load", "hf", "--save", "hf"): "holds no checkpoint (no latest_checkpointed_ite",
        (
            *DEBUG,
            *("--load", "run/iter_0000004", "--save", "run/iter_0000004"),
        ): "no checkpoint of its own; give run, and --ckpt-step 4",
        (*DEBUG, "--load", "hf"): "an exported folder is made one by mlra convert import-hf",
    }
    argvs = json.dumps([[argv] if isinstance(argv, str) else argv for argv in cases])
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", RUN, argvs], capture_output=True, text=True, env=ENV, cwd=tmp_path
    )
    after = os.times()
    codes, said, heavy = json.loads(done.stdout)
    assert codes == [2] * len(cases) and heavy == [], done.stderr
    for line, wanted in zip(said, cases.values(), strict=True):
        assert line.startswith("error: ") and wanted in line
    assert after.children_user - before.children_user < 3  # all of them


def test_python_without_assertions_is_refused():
    # Megatron's checks of flags are assertions: --start-weight-decay 0.1 alone would train.
    command = [sys.executable, "-O", "-c", RUN, json.dumps([DEBUG, ["--help"]])]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    codes, said, heavy = json.loads(done.stdout.splitlines()[-1])
    assert codes == [2, 0] and heavy == [] and len(said) == 1
    assert said[0].startswith("error: Python runs without assertions (-O, or PYTHONOPTIMIZE), by")


def test_what_is_left_to_the_whole_parser(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("base: debug\nmoe_layer_freq: [1, 0, 0, 1]\nsplit: '1,0,0'\n")
    (tmp_path / "path.yaml").write_text("base: debug\ndata_path: gone\n")
    for argv in (
        [*DEBUG, "--no-bf16"],
        ["--config", "debug", "--data-args-path", "x"],
        [*DEBUG, "--save", "new", "--load", "new"],
        [*DEBUG, "--save", "new", "--load", "./new/"],
        ["--config", "debug", "--data-path", "gone", "--dry-run", "8", "--load", "there"],
        ["--config", "a.yaml", "--mock-data"],
        ["--config", "path.yaml", "--mock-data"],
        [*DEBUG, "--no-rope-freq", "([0]*3+[1])", "--window-size", "a,b"],
        [*DEBUG, "--train-iters=4", "--no-bf16", "--no-rl-partial-rollouts", "--rope-fusion"],
        ["--help-megatron", "--what"],
    ):
        early_checks.check(argv)


def test_every_flag_of_the_whole_parser_is_known():
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_mlra.training.flags import add_mlra_arguments
    from megatron_mlra.training.presets import add_opposites

    parser = add_mlra_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    add_opposites(parser)
    flags = [name for name in parser._option_string_actions if name.startswith("--")]
    assert len(flags) > 1000
    early_checks._check_flags(flags)
    assert {*early_checks._UNDERSCORED} <= {*flags}
    for flag in flags:
        if (other := flag[:4] + flag[4:].replace("-", "_")) not in flags:
            meant = flag.replace("_", "-")
            with pytest.raises(ValueError, match=rf"^unknown flag {other}; did you mean {meant}\?"):
                early_checks._check_flags([other])
    for wrong in ("--num-layer", "--no-such"):
        with pytest.raises(ValueError):
            early_checks._check_flags([wrong])
