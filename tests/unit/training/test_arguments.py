"""Presets as argparse defaults, and how a run's flags become one namespace."""

from __future__ import annotations

import argparse
import re
import shutil
from argparse import Namespace

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_mlra.checkpoint.files.tracker import TRACKER
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.training import arguments, console, muon
from megatron_mlra.training.all_flags import PATTERNS
from megatron_mlra.training.argument_checks import check_fp8_tokens
from megatron_mlra.training.arguments import parse, validate
from megatron_mlra.training.cpu_backend import CPU_DEFAULTS
from megatron_mlra.training.flags import add_mlra_arguments
from megatron_mlra.training.presets import load_preset
from megatron_mlra.training.progress import recomputed
from megatron_mlra.training.rope import check_rope
from support import CONFIGS
from support.random_checkpoint import RandomFolder, latent

DEBUG = str(CONFIGS / "debug.yaml")


@pytest.fixture(scope="module")
def parser():
    return add_mlra_arguments(add_megatron_arguments(argparse.ArgumentParser()))


def load(parser, tmp_path, text):
    (tmp_path / "preset.yaml").write_text(text)
    return load_preset(tmp_path / "preset.yaml", parser)


def test_values_are_what_flags_would_store(parser, tmp_path):
    assert load(
        parser,
        tmp_path,
        "num_layers: 2\n"
        "lr: 1e-3\n"
        "qk_rope_head_dim: 16\n"
        "disable_bias_linear: true\n"
        "swiglu: true\n"
        "variance_scaling: false\n"
        "data_path: 0.5 a 0.5 b\n"
        "recompute_modules: [core_attn, mlp]\n"
        "train_data_path: [a, b]\n"
        "moe_layer_freq: 2\n"
        "save: 7\n"
        "q_lora_rank: null\n",
    ) == {
        "num_layers": 2,
        "lr": 1e-3,
        "qk_pos_emb_head_dim": 16,
        "add_bias_linear": False,
        "swiglu": True,
        "variance_scaling": False,
        "data_path": ["0.5", "a", "0.5", "b"],
        "recompute_modules": ["core_attn", "mlp"],
        "train_data_path": ["a", "b"],
        "moe_layer_freq": 2,
        "save": "7",
    }


def test_a_preset_overrides_its_base(parser, tmp_path):
    (tmp_path / "base.yaml").write_text("num_layers: 2\nhidden_size: 64")
    values = load(parser, tmp_path, "base: base.yaml\nnum_layers: 3")
    assert values == {"num_layers": 3, "hidden_size": 64}


def test_command_line_overrides_presets_and_presets_defaults():
    args = parse(["--config", DEBUG, "--num-layers", "2", "--log-interval", "7"])
    assert (args.num_layers, args.hidden_size, args.log_interval) == (2, 256, 7)
    assert args.exit_signal_handler
    assert args.kv_channels == args.v_head_dim == 32
    assert args.tensorboard_dir == "runs/debug/tensorboard"


def test_a_padding_of_the_command_line_is_refused_not_dropped_where_the_data_have_more(tmp_path):
    (tmp_path / "data.json").write_text('{"version": 1, "vocab_size": 1000, "eod_id": 999}')
    argv = ["--config", DEBUG, "--data-path", str(tmp_path / "data")]
    assert parse(argv).padded_vocab_size is None  # the preset's 272
    with pytest.raises(ValueError, match="padded_vocab_size 272 is smaller than --vocab-size 1000"):
        parse([*argv, "--padded-vocab-size", "272"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("3", "3 does not divide --num-attention-heads 8; use 2"),
        ("16", "16 does not divide --num-attention-heads 8; use 8"),
        ("4", "4 needs a multiple of 4 processes and there are 1; launch with torchrun"),
    ],
)
def test_more_processes_are_asked_for_where_they_help(asked, said):
    with pytest.raises(ValueError, match=f"--tensor-model-parallel-size {said}"):
        parse(["--config", DEBUG, "--mock-data", "--tensor-model-parallel-size", asked])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--expert-model-parallel-size 2", "ranks, and there are none; add --num-experts"),
        ("--num-experts 4 --expert-model-parallel-size 3", "divide --num-experts 4; use 2"),
        ("--num-experts 4 --expert-model-parallel-size 0", "is 0; it must be at least 1"),
        (
            "--num-experts 4 --expert-model-parallel-size 2",
            "2 needs a multiple of 2 processes and there are 1; launch with torchrun",
        ),
        (
            "--num-experts 4 --expert-model-parallel-size 2 --tensor-model-parallel-size 2"
            " --sequence-parallel --dry-run 2",
            "2, that of other layers, needs a multiple of 4 processes and there are 2; use"
            " --expert-tensor-parallel-size 1",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused_at_once(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(["--config", DEBUG, "--mock-data", *words.split()])


def test_every_switch_has_an_opposite(tmp_path):
    on = ["bf16", "no_check_for_nan_in_loss_and_grad", "disable_bias_linear", "variance_scaling"]
    text = "".join(f"{name}: true\n" for name in on)
    (tmp_path / "preset.yaml").write_text(f"base: {DEBUG}\n{text}")
    argv = ["--config", str(tmp_path / "preset.yaml")]
    args = parse(argv)
    assert args.bf16 and not (args.check_for_nan_in_loss_and_grad or args.add_bias_linear)
    opposites = ["--no-bf16", "--check-for-nan-in-loss-and-grad", "--no-disable-bias-linear"]
    opposites += ["--no-variance-scaling"]
    args = parse([*argv, *opposites])
    assert not args.bf16 and args.check_for_nan_in_loss_and_grad and args.add_bias_linear
    assert not args.variance_scaling, "an opposite of its own is kept"
    assert parse([*argv, "--no-bf16", "--bf16"]).bf16, "the last one counts"


@pytest.mark.parametrize(
    ("bf16", "known", "slow"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bf16_on_a_cpu_without_it_is_said_to_be_slow(bf16, known, slow, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: known)
    line = console.on_cpu(Namespace(bf16=bf16))
    assert line.startswith("no GPU found: training on the CPU")
    assert ("try --no-bf16" in line) == slow


def test_without_a_gpu_the_cpu_settings_are_defaults(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = vars(parse(["--config", DEBUG]))
    assert {name: args[name] for name in CPU_DEFAULTS} == CPU_DEFAULTS


@pytest.mark.parametrize(
    ("granularity", "modules", "expected"),
    [
        (None, None, None),
        ("full", None, "full"),
        ("selective", None, "core"),
        ("selective", ["core_attn", "mlp"], "core"),
        ("selective", ["mla_up_proj"], "up_proj"),
        ("selective", ["mlp"], None),
    ],
)
def test_recomputed(granularity, modules, expected):
    args = Namespace(attention="mlra", recompute_granularity=granularity, recompute_modules=modules)
    assert recomputed(args) == expected


YARN = {"rope_type": "yarn", "yarn_original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (
            {"rope_type": "yarn"},
            "--rope-type yarn needs --yarn-original-max-position-embeddings, the sequence length"
            " that the model was trained at",
        ),
        (
            YARN | {"attention": "gqa"},
            "--rope-type yarn needs --attention mlra; a longer context of --attention gqa comes by"
            " --rotary-base",
        ),
        (
            {"position_embedding_type": "yarn"},
            "--position-embedding-type yarn: use --rope-type yarn",
        ),
        (
            {"position_embedding_type": "none"},
            "--position-embedding-type none: use --qk-rope-head-dim 0",
        ),
        (
            {"rotary_scaling_factor": 4.0},
            "--rotary-scaling-factor 4.0 has no effect without --rope-type yarn; add it, or leave"
            " --rotary-scaling-factor out",
        ),
        (
            {"yarn_beta_fast": 16.0, "rope_type": "rope"},
            "--yarn-beta-fast 16.0 has no effect without --rope-type yarn; add it, or leave"
            " --yarn-beta-fast out",
        ),
        (
            {"use_rope_scaling": True},
            "--use-rope-scaling does not reach --attention mlra; use --rotary-base, or --rope-type"
            " yarn",
        ),
        (
            {"rotary_seq_len_interpolation_factor": 4, "attention": "mfa"},
            "--rotary-seq-len-interpolation-factor does not reach --attention mfa; use"
            " --rotary-base",
        ),
        (
            YARN | {"yarn_correction_range_round_to_int": False},
            "--no-yarn-correction-range-round-to-int is not supported; leave it out",
        ),
    ],
)
def test_rope_flags_without_effect_are_refused(parser, asked, error):
    args = parser.parse_args([])
    vars(args).update({"position_embedding_type": "rope"} | asked)
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        check_rope(args)


def test_yarn_reaches_the_model(parser):
    args = parser.parse_args([])
    vars(args).update({"position_embedding_type": "rope"} | YARN)
    check_rope(args)
    assert args.original_max_position_embeddings == 2048 and not hasattr(args, "beta_fast")
    check_rope(
        argparse.Namespace(
            **vars(args)
            | {"attention": "gqa", "rope_type": None}
            | {"yarn_original_max_position_embeddings": None, "use_rope_scaling": True}
        )
    )


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"seq_length": 2048, "micro_batch_size": 1}, None),
        ({"seq_length": 12, "micro_batch_size": 4}, None),
        ({"seq_length": 12, "micro_batch_size": 2}, "use --seq-length 16"),
        ({"seq_length": 72, "sequence_parallel": True}, "use --seq-length 96"),
    ],
)
def test_fp8_needs_sixteen_tokens_a_rank(settings, wanted):
    args = {"seq_length": 64, "micro_batch_size": 1, "sequence_parallel": False}
    args |= {"tensor_model_parallel_size": 2, "context_parallel_size": 1}
    args |= {"eval_micro_batch_size": None} | settings
    if wanted is None:
        check_fp8_tokens(Namespace(**args))
        return
    with pytest.raises(ValueError, match=f"^--seq-length .*; {wanted}$"):
        check_fp8_tokens(Namespace(**args))


def test_the_lists_of_flags_and_keys_are_the_parsers():
    from megatron_mlra.description.presets import KEYS
    from megatron_mlra.training.all_flags import FLAGS, lines
    from megatron_mlra.training.presets import keys

    run = "run python -m megatron_mlra.training.all_flags"
    assert KEYS.read_text().split() == keys(), run
    assert FLAGS.read_text().split("\n") == [*lines(), ""], run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--train-samples 0", "--train-samples is 0; it must be at least 1"),
        (
            "--train-samples 7 --lr-warmup-samples 7",
            "leaves nothing of the 7 samples the rate decays over; use at most",
        ),
        ("--lr-decay-iters 0", "--lr-decay-iters is 0; it must be at least 1"),
        ("--seed -1", "--seed is -1; it must be at least 1"),
        ("--num-workers -1", "--num-workers is -1; it must be at least 0"),
        ("--eval-iters -1", "--eval-iters is -1; it must be at least 0"),
        ("--init-method-std -1", "--init-method-std is -1.0; it must be at least 0"),
        ("--hidden-dropout 1.5", "--hidden-dropout is 1.5; it must be at least 0 and below 1"),
        ("--distributed-timeout-minutes 0", "-minutes is 0; it must be at least 1"),
        ("--exit-duration-in-mins -1", "--exit-duration-in-mins is -1; it must be at least 0"),
        ("--split 0,0,0", "--split 0,0,0 gives nothing to any part; use e.g. 969,30,1"),
        ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters, the length"),
        (
            "--start-weight-decay 0.1 --end-weight-decay 0 --weight-decay-incr-style linear",
            "--end-weight-decay 0 is below --start-weight-decay 0.1",
        ),
        (
            "--attention gqa --num-query-groups 1",
            "--num-query-groups 1 has no effect without --group-query-attention; add it",
        ),
        ("--lr-warmup-iters -1", "--lr-warmup-iters is -1; it must be at least 0"),
        ("--adam-beta1 2", "--adam-beta1 is 2.0; it must be at least 0 and below 1"),
        ("--clip-grad -1", "--clip-grad is -1.0; it must be at least 0"),
        ("--weight-decay nan", "--weight-decay is nan; it must be a finite number"),
        ("--init-method-std inf", "--init-method-std is inf; it must be a finite number"),
        (
            "--mtp-loss-scaling-factor -1",
            "--mtp-loss-scaling-factor is -1.0; it must be at",
        ),
        ("--mtp-use-repeated-layer", "--mtp-use-repeated-layer has no effect without --mtp-num-"),
        ("--mtp-detach-heads", "--mtp-detach-heads has no effect without --mtp-num-layers; add it"),
        ("--muon-momentum nan", "--muon-momentum is nan; it must be a finite number"),
        ("--muon-extra-scale-factor 0", "--muon-extra-scale-factor is 0.0; it must be above 0"),
        ("--muon-num-ns-steps -1", "--muon-num-ns-steps is -1; it must be at least 1"),
        (
            "--optimizer muon --muon-coefficient-type foo",
            "--muon-coefficient-type is foo; use one of",
        ),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(["--config", DEBUG, *words.split()])


def test_what_an_optimizer_refuses_is_no_fault_to_start_again_after(capsys, monkeypatch):
    def build(*_):
        raise ValueError("no such flag")

    def build_silently(*_):
        raise AssertionError

    args = Namespace(verbose_optimizer=False, rank=0)
    with pytest.raises(ValueError, match=r"--optimizer adam: Megatron refuses .*raise Asserti"):
        muon.around_optimizer(build_silently, args)(Namespace(optimizer="adam"), [])
    with pytest.raises(ValueError, match="--optimizer adam: no such flag") as refused:
        muon.around_optimizer(build, args)(Namespace(optimizer="adam"), [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert console.fail(refused.value, None, started=True) == 2
    # All ranks of a host meet it; one says it.
    assert capsys.readouterr().err == "error: --optimizer adam: no such flag\n"
    assert console.fail(ValueError("a fault"), None, started=True) == 1


def test_checkpoint_args_are_those_of_the_checkpoint_that_is_loaded(tmp_path, monkeypatch):
    """The newest is damaged: a run continues from the one before."""
    write_megatron(RandomFolder(latent(4, 4, rotary_base=5000)), tmp_path / "saved", progress=False)
    run = tmp_path / "run"
    for step in (4, 8):
        shutil.copytree(tmp_path / "saved/release", run / f"iter_{step:07d}")
    (run / TRACKER).write_text("8")
    (run / "iter_0000008/.metadata").write_bytes(b"junk")
    monkeypatch.setattr("sys.argv", ["pretrain"])
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(variable, value)
    args = parse(["--config", DEBUG, "--load", str(run), "--use-checkpoint-args"])
    validate(args)
    assert args.rotary_base == 5000 and args.ckpt_step is None
    (run / "iter_0000004/.metadata").write_bytes(b"junk")
    args = parse(["--config", DEBUG, "--load", str(run), "--use-checkpoint-args"])
    with pytest.raises(ValueError, match=r"^[^\n]*iter_0000008: \.metadata cannot be read[^\n]*$"):
        validate(args)


@pytest.mark.parametrize(
    ("flag", "value", "fix"),
    [
        ("--no-rope-freq", "foo", "a number N, or a 0 or 1 for each layer"),
        ("--no-rope-freq", "([0]*", "a number N, or a 0 or 1 for each layer"),
        ("--moe-layer-freq", "[1", "a number N, or a 0 or 1 for each layer"),
        ("--linear-attention-freq", "x", "a number N, or a 0 or 1 for each layer"),
        ("--window-size", "a,b", "two numbers, as 128,0"),
        ("--cuda-graph-modules", "attention", "names of modules, as attn or mlp"),
    ],
)
def test_a_value_that_megatron_converts_itself_is_named_with_the_fix(flag, value, fix, tmp_path):
    with pytest.raises(ValueError) as refused:
        arguments.parse(["--config", "debug", "--mock-data", flag, value])
    assert str(refused.value).startswith(f"argument {flag}: {value!r} is not valid; use {fix}")
    preset = tmp_path / "a.yaml"
    preset.write_text(f"base: debug\n{flag[2:].replace('-', '_')}: '{value}'\n")
    with pytest.raises(ValueError) as refused:
        arguments.parse(["--config", str(preset), "--mock-data"])
    assert f"{value!r} is not valid; use {fix}" in str(refused.value)


def test_every_conversion_of_megatron_is_explained():
    """A new one of another version would print its function's name."""
    types = {action.type for action in add_megatron_arguments(argparse.ArgumentParser())._actions}
    names = {getattr(kind, "__name__", "") for kind in types - {None}}
    known = {"int", "float", "str", "bool", "enum_type_handler", *arguments.OWN_TYPES, *PATTERNS}
    assert names <= known and {*arguments.OWN_TYPES} <= names
