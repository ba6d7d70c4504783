"""One model on two GPUs in every layout, from one GPU's checkpoint: gradients, then 50 steps.

Usage: torchrun --nproc-per-node 2 --max-restarts 3 -m support.drivers.two_gpus FOLDER SCRATCH
       (PYTHONPATH=tests; a JSON per case in FOLDER, weights in SCRATCH, a table at the end, and
       FOLDER/all.json if every case is right)
       python -m support.drivers.two_gpus FOLDER
       (rehearsal of some: gloo, torch layers in float32, a tiny model)

For every model rank 0 alone trains it twice (`one`, `again`), from weights that it saves as a
torch_dist checkpoint, and computes the first step's gradients in float32 with torch layers. Every
layout loads the checkpoint, and is compared with `one`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mlra.command_line.parser import write_json
from support.changed_gradients import CHANGES, change_gradients

STEPS = 50
MODEL = {
    "num_layers": 4,
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_attention_heads": 8,
    "num_latent_heads": 4,
    "num_branches": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "init_method_std": 0.05,
    "zero_init_output": False,
}
TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 24,
    "init_method_std": 0.2,
}
"""What the rehearsal changes."""

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 512,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
}
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
PRECISIONS: dict[str, dict[str, Any]] = {"bf16": {}, "fp8": FP8, "experts": EXPERTS}
"""Models, by what they differ in."""

FLOOR = {"bf16": 5e-3, "fp8": 5e-2, "experts": 1e-2}
"""Distances of gradients that are always allowed, relative to the gradient's norm: products of
other shapes are rounded otherwise."""

FARTHEST = {"bf16": 6e-2, "fp8": 0.45, "experts": 0.15}
"""Distances that are never allowed: twice the tolerances of tests/gpu/test_transformer_engine.py,
and for FP8 that of the training benchmark's gate. A missing sum over ranks is 0.3 and more."""

BANDS = {"bf16": 1e-2, "fp8": 2e-2, "experts": 2e-2}
"""Differences of losses at any step, in parts of the first loss. Relative to a step's own loss they
would grow as that comes near to zero. bf16 on one GPU parts from itself by 2e-3 (one H200)."""


@dataclass(frozen=True)
class Case:
    """A model in a layout; `one`, `again` and the changed ones are of one GPU."""

    model: str
    name: str
    layout: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"

    @property
    def alone(self) -> bool:
        return self.name in ("one", "again", *CHANGES)


def cases() -> list[Case]:
    """All cases, the most important first, and one GPU's of a model before its layouts."""
    sharded = {"dp": 2, "distributed_optimizer": True}
    layouts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "one": ({}, {}),
        "again": ({}, {}),
        "tp2-head": ({"tp": 2}, {"sequence_parallel": True, "latent_tp_layout": "head"}),
        "tp2-latent": ({"tp": 2}, {"sequence_parallel": True, "latent_tp_layout": "latent"}),
        "cp2": ({"cp": 2}, {}),
        "pp2": ({"pp": 2}, {}),
        "dp2": (sharded, {}),
        "dp2-overlap": (sharded | {"overlap": True}, {}),
        "ep2": ({"dp": 2, "ep": 2}, {}),
    }
    order = {
        "bf16": "one again tp2-head tp2-latent cp2 pp2 dp2 dp2-overlap",
        "experts": "one ep2",
        "fp8": "one tp2-head again tp2-latent dp2 cp2 pp2 dp2-overlap",
    }
    chosen = [(model, name) for model, names in order.items() for name in names.split()]
    chosen += [("experts", "again"), ("experts", "tp2-head")]
    return [Case(model, name, *layouts[name]) for model, name in chosen]


def rehearsed_cases() -> list[Case]:
    """Those that are of use without FP8, where a run repeats itself to the bit."""
    left_out = ("again", "dp2")
    return [case for case in cases() if case.model != "fp8" and case.name not in left_out]


def changed_cases() -> list[Case]:
    """One rank whose gradients are changed, to rehearse what a comparison passes and finds."""
    return [Case("bf16", name) for name in CHANGES]


class Bench:
    """What all cases of a launch share."""

    def __init__(self, folder: Path, scratch: Path, rehearsed: bool) -> None:
        from support.samples import Sizes

        self.folder, self.scratch, self.rehearsed = folder, scratch, rehearsed
        self.sizes = Sizes(chain=16) if rehearsed else Sizes(4096, 512, 2, chain=64)

    def steps(self, case: Case) -> int:
        """How many steps a case trains."""
        if not self.rehearsed:
            return STEPS
        return 16 if case.alone and case.model == "bf16" else 3

    def build(self, case: Case, reference: bool = False):
        """The case's model on this rank; `reference`: in float32, of torch layers."""
        import torch

        from megatron_mlra.training.upstream_fixes import accumulate_weight_gradients_in_products
        from support.tiny import Layout, Tiny, make_config

        layout = Layout(**case.layout)
        sizes = MODEL | PRECISIONS[case.model] | case.config
        if self.rehearsed:
            sizes |= TINY | {"moe_grouped_gemm": False}
            sizes |= {"moe_ffn_hidden_size": 48} if case.model == "experts" else {}
        if reference or self.rehearsed:
            for name in (*FP8, "moe_grouped_gemm"):
                sizes.pop(name, None)
        else:
            sizes |= {
                "transformer_impl": "transformer_engine",
                "bf16": True,
                "params_dtype": torch.bfloat16,
                "pipeline_dtype": torch.bfloat16,
                "gradient_accumulation_fusion": accumulate_weight_gradients_in_products(),
            }
        sizes["use_cpu_initialization"] = self.rehearsed
        return Tiny.build(make_config(layout, **sizes), layout, sizes=self.sizes)

    def reference(self, case: Case) -> None:
        """Save the model's start, and its first gradients in float32."""
        import torch
        from megatron.core import dist_checkpointing

        from support.tensors import norms_drawn

        tiny = self.build(case)
        tiny.load(norms_drawn(tiny.collect("weight")))
        start = tiny.collect("weight")
        path = self.scratch / f"{case.model}.checkpoint"
        path.mkdir()
        dist_checkpointing.save(tiny.sharded_weights(), str(path))
        exact = self.build(case, reference=True)
        exact.load(start)
        first = exact.step(0)
        first["weights"] = start
        torch.save(first, self.scratch / f"{case.model}-float32.pt")

    def measure(self, case: Case, rank: int) -> dict[str, Any] | None:
        """Train a case; what differs from one GPU, on rank 0."""
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        began = time.monotonic()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        if case.name == "one":
            self.reference(case)
        tiny = self.build(case)
        stored = str(self.scratch / f"{case.model}.checkpoint")
        loaded = dist_checkpointing.load(tiny.sharded_weights(), stored)
        tiny.chunks[0].module.load_state_dict(loaded, strict=True)
        tiny.optimizer.reload_model_params()
        exact = torch.load(self.scratch / f"{case.model}-float32.pt")
        weights = tiny.collect("weight")
        if case.name in CHANGES:
            change_gradients(tiny, CHANGES[case.name])
        steps = [tiny.step(seed) for seed in range(self.steps(case))]
        if rank:
            return None
        own = {name: [step[name] for step in steps] for name in ("loss", "grad_norm")}
        own["gradients"] = steps[0]["gradients"]
        path = self.scratch / f"{case.model}-one.pt"
        if case.name == "one":
            torch.save(own, path)
        return compare(own, torch.load(path), exact, weights) | {
            "model": case.model,
            "grad_norms": own["grad_norm"],
            "seconds": time.monotonic() - began,
        }


def compare(own: dict, one: dict, exact: dict, weights: dict) -> dict[str, Any]:
    """A layout's first step and losses against one GPU's.

    Returns:
        `gradients`: name -> distance to one GPU's, and of both to float32, each relative to the
        norm of the second; `loss`, `grad_norm`: relative differences of the first step; `steps`:
        the largest difference of losses, in parts of the first loss, and the step;
        `weights_alike`: whether the checkpoint gave the same weights.
    """
    gradients = {}
    for name in own["gradients"].keys() | one["gradients"].keys():
        if name not in own["gradients"] or name not in one["gradients"]:
            gradients[name] = [float("inf")] * 3
            continue
        ours, theirs, true = (x["gradients"][name] for x in (own, one, exact))
        assert theirs.norm() > 0, f"the gradient of {name} is zero: nothing is compared"
        gradients[name] = [distance(ours, theirs), distance(ours, true), distance(theirs, true)]
    first = one["loss"][0]
    losses = [abs(a - b) / first for a, b in zip(own["loss"], one["loss"], strict=False)]
    return {
        "gradients": gradients,
        "losses": own["loss"],
        "loss": losses[0],
        "grad_norm": abs(own["grad_norm"][0] / one["grad_norm"][0] - 1),
        "steps": max(zip(losses, range(1, len(losses) + 1), strict=True)),
        "weights_alike": all(w.equal(exact["weights"][n]) for n, w in weights.items()),
    }


def distance(a, b) -> float:
    """|a - b| / |b|; infinite where one of them is no number."""
    found = float((a.double() - b.double()).norm() / b.double().norm())
    return found if found == found else float("inf")


def main(folder: Path, scratch: Path, backend: str) -> None:
    """Every case that has no result yet, in this rank of the launch."""
    import torch

    from megatron_mlra.benchmarks.training.layouts import Layout
    from megatron_mlra.benchmarks.training.measure import free_memory
    from megatron_mlra.benchmarks.training.worlds import Worlds

    logging.disable(logging.WARNING)
    worlds = Worlds(backend, 60)
    bench = Bench(folder, scratch, backend == "gloo")
    chosen = [*rehearsed_cases(), *changed_cases()] if bench.rehearsed else cases()
    for case in chosen:
        path = folder / f"{case}.json"
        if not worlds.agree(not path.exists()):
            continue
        if worlds.rank == 0:
            path.write_text(json.dumps({"failed": "it ended its process"}))
        axes = {a: n for a, n in case.layout.items() if a in ("tp", "cp", "pp", "dp", "ep")}
        found, failed = None, None
        try:
            if worlds.enter(Layout(tuple(axes.items()))):
                found = bench.measure(case, worlds.rank)
        except Exception:
            failed = traceback.format_exc()
        if worlds.rank == 0:
            path.write_text(json.dumps({"failed": failed} if failed else found))
            print(line(case, json.loads(path.read_text())), flush=True)
        if worlds.agree(failed is not None):
            worlds.leave()
        free_memory()
    worlds.leave()
    if worlds.rank == 0:
        told = [(case, json.loads((folder / f"{case}.json").read_text())) for case in chosen]
        print("\n".join(line(case, found) for case, found in told))
        told = [(case, found) for case, found in told if case.name not in CHANGES]
        if not any("failed" in found or verdict(case, found) for case, found in told):
            write_json(folder / "all.json", {"cases": {str(c): figures(f) for c, f in told}})
    torch.cuda.synchronize()


def verdict(case: Case, found: dict[str, Any]) -> str:
    """What is wrong with a case's results; empty if nothing is.

    A gradient must be as near to one GPU's as that is to float32's, within a factor of two: of two
    computations with rounding errors of one size, neither is farther from the other than the sum of
    both errors.
    """
    floor, farthest, band = (table[case.model] for table in (FLOOR, FARTHEST, BANDS))
    largest, step = found["steps"]
    wrong = [] if found["weights_alike"] else ["the checkpoint gave other weights"]
    for name, (to_one, to_float32, ones) in found["gradients"].items():
        if not to_one <= min(farthest, max(floor, 2 * ones)):
            wrong.append(f"gradient of {name} is {to_one:.1e} from one GPU's ({ones:.1e} allows)")
        if not to_float32 <= max(floor, 1.5 * ones):
            wrong.append(f"gradient of {name} is {to_float32:.1e} from float32's, not {ones:.1e}")
    if not found["loss"] <= 2e-3:
        wrong.append(f"first losses differ by {found['loss']:.1e}")
    if not found["grad_norm"] <= floor:
        wrong.append(f"gradient norms differ by {found['grad_norm']:.1e}")
    if not largest <= band:
        wrong.append(f"losses of step {step} differ by {largest:.1e} of the first loss")
    if not found["losses"][-1] < found["losses"][0]:
        wrong.append("the loss does not fall")
    return "; ".join(wrong)


def worst_gradient(found: dict[str, Any]) -> tuple[str, list[float]]:
    """The parameter whose gradient is farthest from one GPU's, and its distances (`compare`)."""
    return max(found["gradients"].items(), key=lambda item: item[1][0])


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """A case's result as examples/measure tabulates it, to two digits."""
    parameter, distances = worst_gradient(found)
    values = {"first_loss": found["loss"], "grad_norm": found["grad_norm"]}
    keys = ("worst_gradient", "to_float32", "one_gpu_to_float32")
    values |= dict(zip(keys, distances, strict=True)) | {"steps": found["steps"][0]}
    rounded = {name: float(f"{value:.2g}") for name, value in values.items()}
    last = {"losses": len(found["losses"]), "last_loss": round(found["losses"][-1], 4)}
    return rounded | {"parameter": parameter} | last


def line(case: Case, found: dict[str, Any]) -> str:
    """A case's result in one line."""
    if "failed" in found:
        return f"{case!s:22} failed: {found['failed'].strip().splitlines()[-1][:200]}"
    name, (worst, own, ones) = worst_gradient(found)
    largest, step = found["steps"]
    return (
        f"{case!s:22} loss {found['loss']:.1e}, grad norm {found['grad_norm']:.1e}, worst gradient"
        f" {worst:.1e} ({name}; to float32 {own:.1e}, one GPU's {ones:.1e}), losses of"
        f" {len(found['losses'])} steps {largest:.1e} (step {step}), last"
        f" {found['losses'][-1]:.4f}, {found['seconds']:.0f} s;"
        f" {verdict(case, found)[:300] or 'ok'}"
    )


def rehearse(folder: Path) -> None:
    """The same on two gloo ranks, with torch layers in float32."""
    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import launch

    enable_cpu_backend()
    scratch = folder / "scratch"
    scratch.mkdir()
    launch(2, lambda: main(folder, scratch, "gloo"), folder)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        rehearse(Path(sys.argv[1]))
    else:
        warnings.simplefilter("ignore")
        # Compiling small functions takes longer than all steps here.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        places = [Path(word) for word in sys.argv[1:3]]
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        main(*places, "nccl")
        # Writers of checkpoints would be waited for.
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(0)
