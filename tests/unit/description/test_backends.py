"""Old names of implementations: understood, with one line that says the new one."""

import argparse

import pytest

from megatron_mlra.description.backends import (
    CORE_BACKENDS,
    DECODE_BACKENDS,
    LATENT_KERNELS,
    OLD_NAMES,
    current_name,
)
from megatron_mlra.inference import cli
from megatron_mlra.layers.config import MLRAConfig
from megatron_mlra.training.flags import add_mlra_arguments

SIZES = {
    "num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": 64,
    "kv_lora_rank": 128, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16, "v_head_dim": 32,
    "normalization": "RMSNorm", "add_bias_linear": False, "attention_dropout": 0.0,
}  # fmt: skip
OLD = [(choice, old, new) for choice, names in OLD_NAMES.items() for old, new in names.items()]
OF_TRAINING = [case for case in OLD if case[0] != "backend"]


def test_one_vocabulary():
    names = {"auto", "torch", "te", "mlra_kernels"}
    assert {*CORE_BACKENDS, *LATENT_KERNELS, *DECODE_BACKENDS} == names


@pytest.mark.parametrize(("choice", "old", "new"), OLD)
def test_an_old_name_is_said_once(choice, old, new, capsys):
    from megatron_mlra.description import backends

    backends._say.cache_clear()
    assert current_name(choice, old) == current_name(choice, old) == new
    assert capsys.readouterr().err == f"{choice} {old} is now called {new}: use {choice} {new}\n"
    assert current_name(choice, new) == new and current_name(choice, "fast") == "fast"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("choice", "old", "new"), OF_TRAINING)
def test_a_config_and_a_command_line_take_old_names(choice, old, new):
    assert getattr(MLRAConfig(**SIZES, **{choice: old}), choice) == new
    parser = add_mlra_arguments(argparse.ArgumentParser())
    flag = "--" + choice.replace("_", "-")
    assert getattr(parser.parse_args([flag, old]), choice) == new


def test_inference_takes_old_names():
    for old, new in OLD_NAMES["backend"].items():
        args = cli.parser().parse_args(["checkpoint", "--prompt", "x", "--backend", old])
        assert args.backend == new
