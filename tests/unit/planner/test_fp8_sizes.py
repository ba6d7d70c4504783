"""Sizes that FP8 takes, beside the command of a plan."""

from __future__ import annotations

from megatron_mlra.planner import cli


def last_line(capsys, *argv: object) -> str:
    assert cli.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out.splitlines()[-1].strip()


def test_a_plan_in_fp8_names_sizes_that_fp8_takes(capsys):
    flags = ("--config", "mlra4_2.9b", "--gpus", 8, "--seq-length", 5000)
    # The preset has fewer positions than either length.
    fits = "--ffn-hidden-size 9888, --seq-length 5008, --max-position-embeddings 5008"
    said = last_line(capsys, *flags, "--fp8")
    assert said == f"# FP8 takes multiples of 16 on a rank: with {fits}"
    said = last_line(capsys, *flags[:-1], 2041, "--fp8")
    assert "--seq-length 204" in said and "--max-position-embeddings" not in said  # it has enough
    moe = ("--config", "mlra4_moe_16b", "--gpus", 64, "--fp8")
    for argv in (flags, moe):
        assert "FP8 takes" not in last_line(capsys, *argv)
