"""The training benchmark's path from cases to its tables, on the CPU with tiny models.

Usage: python -m support.drivers.training_benchmark FOLDER. `FOLDER/one` has the results of one
process, `FOLDER/two` those of two, `FOLDER/ended` those of one that is ended in its second case.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

MODEL = """
base: {preset}
num_layers: 2
hidden_size: 32
ffn_hidden_size: 48
num_attention_heads: 4
q_lora_rank: 16
kv_lora_rank: 32
qk_nope_head_dim: 16
qk_rope_head_dim: 8
v_head_dim: 16
init_method_std: 0.2
"""
EXPERTS = """
num_experts: 4
moe_layer_freq: ([0]+[1]*3)
moe_ffn_hidden_size: 32
moe_router_topk: 2
moe_router_load_balancing_type: seq_aux_loss
moe_aux_loss_coeff: 1.0e-3
moe_token_dispatcher_type: alltoall
expert_model_parallel_size: 8
"""


LAYOUTS = ("tp2-latent", "cp2", "pp2", "dp2-half", "one-wide4")


def main(folder: Path) -> None:
    from megatron_mlra.training.cli import has_gpu

    has_gpu()
    from megatron_mlra.benchmarks.training import cli
    from megatron_mlra.benchmarks.training.cases import Case
    from megatron_mlra.benchmarks.training.layouts import Layout
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support import CONFIGS
    from support.world import launch

    enable_cpu_backend()
    models = {}
    for name, text in (("dense", MODEL), ("experts", MODEL + EXPERTS)):
        models[name] = str(folder / f"{name}.yaml")
        Path(models[name]).write_text(text.format(preset=CONFIGS / "debug.yaml"))

    def case(model: str, layout: str = "one", form: str = "auto") -> Case:
        return Case(models[model], "bf16", form, 32, Layout.parse(layout))

    def measure(name: str, cases: list[Case], *flags: str) -> int:
        small = [
            "--num-layers",
            "2",
            "--tokens",
            "64",
            "--steps",
            "1",
            "--warmup",
            "0",
            "--profile",
        ]
        out = folder / name
        out.mkdir(exist_ok=True)
        args, more = cli.parser().parse_known_args([*small, "--out", str(out), *flags])
        return cli.measure_all(cases, args, more, "gloo")

    def ended() -> None:
        whole, calls = cli._measure, iter((cli._measure, None))

        def second(*args):
            if (run := next(calls)) is None:
                raise KeyboardInterrupt
            return run(*args)

        cli._measure = second
        with contextlib.suppress(KeyboardInterrupt):
            measure("ended", [case("dense", form=form) for form in ("absorbed", "materialized")])
        cli._measure = whole

    launch(1, ended, folder)
    one = [case("dense", form=form) for form in ("absorbed", "materialized")]
    launch(1, lambda: measure("one", [*one, case("experts")]), folder)
    two = [case("dense", layout) for layout in LAYOUTS]
    two += [case("experts", "dp2-ep2", form) for form in ("absorbed", "materialized")]
    two += [case("dense", "dp3")]
    launch(2, lambda: measure("two", two, "--micro-batches", "4"), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
