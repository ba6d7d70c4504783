"""Presets: what `null` means."""

from __future__ import annotations

from megatron_mlra.description.presets import preset_values
from megatron_mlra.training.arguments import parse


def test_null_takes_the_value_of_a_base_away(tmp_path):
    (tmp_path / "base.yaml").write_text("num_layers: 2\nbf16: true\nlog_interval: 5\nseed: 7\n")
    text = "base: base.yaml\nbf16: null\nlog_interval: null\nseed: ~\nclip_grad: null\n"
    (tmp_path / "null.yaml").write_text(text)
    assert preset_values(tmp_path / "null.yaml") == {"num_layers": 2}
    nothing = [
        "bf16",
        "log_interval",
        "eval_iters",
        "clip_grad",
        "seed",
        "num_workers",
        "optimizer",
    ]
    (tmp_path / "own.yaml").write_text("base: debug\n" + "".join(f"{x}: null\n" for x in nothing))
    args = parse(["--config", str(tmp_path / "own.yaml"), "--mock-data"])
    assert (args.bf16, args.log_interval, args.eval_iters, args.clip_grad) == (False, 10, 10, 1.0)
    assert (args.seed, args.num_workers, args.optimizer) == (1234, 1, "adam")
