"""Train the tiny model in many parallel layouts and compare each with one rank: one JSON per case.

Usage: python -m support.drivers.parity FOLDER [PATTERN]
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import sys
import traceback
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.variants import VARIANTS, fits

STEPS = 3
DOCUMENTS = {"MLRA-4 odd documents": (0, 5, 6, 19, 32), "MLRA-4 even documents": (0, 8, 32)}
"""Models whose sequences are packed: cumulative lengths. Context parallel cuts even documents, and
sequences of odd ones."""

COPIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "distributed": {"distributed_optimizer": True},
    "overlapped": {"distributed_optimizer": True, "overlap": True},
}
"""Optimizers whose float32 copies of bf16 weights lie in different places."""


@dataclass
class Case:
    """One layout of one model, to be compared with the single rank of `reference`."""

    name: str
    layout: dict[str, Any]
    config: dict[str, Any]
    reference: str
    errors: dict[str, float] = field(default_factory=dict)


def references() -> dict[str, dict[str, Any]]:
    """Models trained on one rank: name -> config."""
    models = {name: dict(variant) for name, variant in VARIANTS.items()}
    models["MLRA-4 gated"] = {**VARIANTS["MLRA-4"], "output_gate": True}
    models["MLRA-4 unscaled, no q latent"] = {
        **VARIANTS["MLRA-4"],
        "variance_scaling": False,
        "q_lora_rank": None,
    }
    models["MLRA-4 query norm"] = {**VARIANTS["MLRA-4"], "query_head_norm": True}
    models["MLRA-4 NoPE"] = {**VARIANTS["MLRA-4"], "qk_pos_emb_head_dim": 0}
    # Stages must know which of their layers rotate.
    models["MLRA-4 deep"] = {**VARIANTS["MLRA-4"], "num_layers": 4, "no_rope_freq": [0, 1, 1, 0]}
    models["GLA-2 deep"] = {**VARIANTS["GLA-2"], "num_layers": 4}
    models["MLRA-4 MoE"] = {
        **VARIANTS["MLRA-4"],
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 48,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }
    models |= dict.fromkeys(DOCUMENTS, VARIANTS["MLRA-4"])
    models["MLRA-4 MTP"] = {**VARIANTS["MLRA-4"], "mtp_num_layers": 2}
    models["MLRA-4 MTP odd documents"] = {**VARIANTS["MLRA-4"], "mtp_num_layers": 2}
    models["GQA"] = {"attention": "gqa", "num_query_groups": 4}
    models["GTA"] = {"attention": "gta", "num_query_groups": 4, "qk_pos_emb_head_dim": 8}
    models["MFA"] = {"attention": "mfa", "q_lora_rank": 32}
    models["TPA"] = {"attention": "tpa"}
    return models


def cases() -> list[Case]:
    """All comparisons."""
    found = []

    def add(reference: str, layout: dict[str, Any], **config: Any) -> None:
        parts = [reference] + [f"{k}{v}" for k, v in layout.items()]
        parts += [str(v) if isinstance(v, str) else k for k, v in config.items() if v]
        found.append(Case(" ".join(parts), layout, config, reference))

    for number, variant in enumerate(VARIANTS):
        for tp in (2, 4):
            for style in ("head", "latent"):
                if fits(VARIANTS[variant], tp, style):
                    # Pairwise: every two values of variant, size, layout and sequence parallelism
                    # occur together.
                    sp = (number + (tp == 4) + (style == "latent")) % 2 == 1
                    add(variant, {"tp": tp}, latent_tp_layout=style, sequence_parallel=sp)
    # More ranks than branches, more than latents of a branch.
    add("MLRA-4", {"tp": 8}, latent_tp_layout="latent", sequence_parallel=True)
    add("MLRA-2", {"tp": 8}, latent_tp_layout="head")
    both = ["core_attn", "mla_up_proj"]
    recomputed = {"head": (both[:1], both), "latent": (both[1:], both)}
    for style in ("head", "latent"):
        add("MLRA-4 gated", {"tp": 2}, latent_tp_layout=style, sequence_parallel=True)
        add("MLRA-4 unscaled, no q latent", {"tp": 2}, latent_tp_layout=style)
        sp = style == "head"
        add("MLRA-4 query norm", {"tp": 2}, latent_tp_layout=style, sequence_parallel=sp)
        add("MLRA-4 NoPE", {"tp": 2}, latent_tp_layout=style, sequence_parallel=True)
        add("MLRA-4", {"tp": 2}, latent_tp_layout=style, core_form="materialized")
        for modules in recomputed[style]:
            recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
            add("MLRA-4", {"tp": 2}, latent_tp_layout=style, **recompute)
            found[-1].name += " " + " ".join(modules)
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    add("MLRA-4", {"tp": 2}, sequence_parallel=True, **full)
    add("MLRA-4 deep", {"pp": 2})
    add("GLA-2 deep", {"pp": 2})
    add("MLRA-4 deep", {"pp": 2, "vpp": 2})
    add("MLRA-4 deep", {"tp": 2, "pp": 2}, sequence_parallel=True)
    add("MLRA-4 deep", {"tp": 2, "pp": 2}, latent_tp_layout="latent")
    add("MLRA-4", {"dp": 2})
    add("MLRA-4", {"dp": 2, "distributed_optimizer": True})
    add("MLRA-4", {"tp": 2, "dp": 2, "distributed_optimizer": True}, sequence_parallel=True)
    add("MLRA-4 MoE", {"tp": 2}, sequence_parallel=True)
    add("MLRA-4 MoE", {"dp": 2, "ep": 2})
    add("MLRA-4", {"cp": 2})
    add("MLRA-4", {"cp": 4})
    for variant in ("MLA", "GLA-2", "MLRA-2"):
        add(variant, {"cp": 2})
    add("MLRA-4", {"cp": 2}, core_form="materialized")
    add("MLRA-4 gated", {"cp": 2})
    add("MLRA-4 NoPE", {"cp": 2})
    add("MLRA-4", {"cp": 2}, recompute_absorbed_query=False)
    for modules in (both[:1], both):
        recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
        add("MLRA-4", {"cp": 2}, **recompute)
        found[-1].name += " " + " ".join(modules)
    add("MLRA-4", {"cp": 2}, **full)
    for style in ("head", "latent"):
        add("MLRA-4", {"tp": 2, "cp": 2}, latent_tp_layout=style, sequence_parallel=True)
    add("MLRA-4", {"tp": 2, "cp": 4}, core_form="materialized")
    add("MLRA-4 deep", {"pp": 2, "cp": 2})
    add("MLRA-4", {"cp": 2, "dp": 2, "distributed_optimizer": True})
    add("MLRA-4 MoE", {"cp": 2, "ep": 2})
    for documents in DOCUMENTS:
        add(documents, {"cp": 2})
        add(documents, {"cp": 2}, core_form="materialized")
        add(documents, {"cp": 4})
        add(documents, {"tp": 2, "cp": 2}, latent_tp_layout="latent")
    add("MLRA-4 odd documents", {"tp": 2}, sequence_parallel=True)
    add("MLRA-4 MTP", {"tp": 2}, latent_tp_layout="latent", sequence_parallel=True)
    add("MLRA-4 MTP", {"tp": 2, "pp": 2}, sequence_parallel=True)
    add("MLRA-4 MTP", {"tp": 2, "cp": 2}, sequence_parallel=True)
    add("MLRA-4 MTP odd documents", {"cp": 4})
    for baseline in ("GQA", "GTA", "MFA", "TPA"):
        add(baseline, {"tp": 2}, sequence_parallel=True)
    return found


def main(folder: Path, pattern: str) -> None:
    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from megatron_mlra.training import hooks
    from megatron_mlra.training.cpu_backend import enable_cpu_backend
    from support.world import run_world

    enable_cpu_backend()
    # A world that is killed while it builds torch's extension must not stop later ones.
    hooks.apply(hooks.BEFORE_TRAINING[:1], hooks.Run(Namespace()))
    hooks.apply(hooks.MULTI_TOKEN[1:4], hooks.Run(Namespace()))
    logging.disable(logging.WARNING)
    wanted = [case for case in cases() if fnmatch.fnmatch(case.name, pattern)]
    models = {n: c for n, c in references().items() if any(case.reference == n for case in wanted)}

    def train_references(_rank: int) -> None:
        import torch

        from support.multi_token import expected_gradients
        from support.tensors import norms_drawn
        from support.tiny import Layout, Tiny, make_config

        layout = Layout()
        layout.initialize()
        for name, overrides in models.items():
            config = make_config(layout, **overrides, zero_init_output=False)
            tiny = Tiny.build(config, layout, _packing(name))
            start = norms_drawn(tiny.collect("weight"))
            tiny.load(start)
            if "MTP" in name:
                torch.save(expected_gradients(tiny, 0), folder / f"{_file(name)}-oracle.pt")
            clipped = _clip_reference(tiny, start)
            steps = [tiny.step(seed) for seed in range(STEPS)]
            torch.save(
                {"start": start, "steps": steps, "end": tiny.collect("weight"), **clipped},
                folder / f"{_file(name)}.pt",
            )

    run_world(1, train_references, folder / "world-references")
    if pattern in ("*", "copies"):
        run_world(2, lambda rank: _clip_copies(folder, rank), folder / "world-copies")
    by_layout: dict[str, list[Case]] = {}
    for case in wanted:
        by_layout.setdefault(json.dumps(case.layout), []).append(case)
    for i, (layout, group) in enumerate(by_layout.items()):
        size = _size(json.loads(layout))

        def train(rank: int, group: list[Case] = group) -> None:
            _train_group(group, folder, rank)

        try:
            run_world(size, train, folder / f"world-{i}")
        except RuntimeError as error:
            for case in group:
                path = folder / f"{_file(case.name)}.json"
                if not path.exists():
                    path.write_text(json.dumps({"failed": str(error)}))


def _clip_reference(tiny, start: dict[str, Any]) -> dict[str, Any]:
    """The largest logits of the start, and the weights that QK-clip makes of it."""
    from support.clipping import clip

    attention = getattr(tiny.config, "attention", "mlra")
    if attention == "gqa":
        return {}
    largest = clip(tiny, None).largest
    if attention != "mlra":
        return {"largest": largest}
    threshold = 0.8 * min(largest)
    clipped = clip(tiny, threshold).clipped
    found = {"threshold": threshold, "largest": largest, "heads": clipped}
    found |= {"clipped": tiny.collect("weight"), "after": clip(tiny, None).largest}
    tiny.load(start)
    return found


def _compare_clip(tiny, reference: dict[str, Any]) -> dict[str, Any]:
    """How far the largest logits, and the weights behind a clip, are from the reference's."""
    from support.clipping import clip

    if "largest" not in reference:
        return {}
    watch = clip(tiny, reference.get("threshold"))
    found: dict[str, Any] = {"largest": _relative(watch.largest, reference["largest"])}
    if "clipped" in reference:
        found["heads"] = [watch.clipped, reference["heads"]]
        found["clipped"] = _farthest(tiny.collect("weight"), reference["clipped"])
        tiny.load(reference["start"])
    return found


def _clip_copies(folder: Path, rank: int) -> None:
    """QK-clip behind a step in bf16, under each optimizer that keeps float32 copies elsewhere."""
    import torch

    from support.clipping import clip
    from support.tiny import Layout, Tiny, make_config

    found: dict[str, Any] = {}
    for name, options in COPIES.items():
        layout = Layout(dp=2, **options)
        if not found:
            layout.initialize()
        bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
        config = make_config(layout, **VARIANTS["MLRA-4"], **bf16, zero_init_output=False)
        tiny = Tiny.build(config, layout)
        if found:
            tiny.load(found["plain"]["weights"][0])
        weights = [tiny.collect("weight")]
        largest = clip(tiny, None).largest
        watch = clip(tiny, 0.8 * min(largest), step=True)
        clip(tiny, None)  # its forward waits for weights still being gathered
        weights.append(tiny.collect("weight"))
        after = clip(tiny, None).largest
        clip(tiny, None, step=True, learn=False)
        clip(tiny, None)
        weights.append(tiny.collect("weight"))
        digests: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(digests, tiny.replicas())
        found[name] = {"weights": weights, "largest": [largest, after], "heads": watch.clipped}
        found[name]["alike"] = digests[0] == digests[1]
    if rank == 0:
        torch.save(found, folder / "copies.pt")


def _packing(reference: str):
    from support.tiny import Packing

    bounds = DOCUMENTS.get(reference.replace(" MTP", ""))
    return Packing(bounds, cut_documents="even" in reference) if bounds else None


def _size(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def _train_group(group: list[Case], folder: Path, rank: int) -> None:
    """Train all cases of one layout in one world; rank 0 writes their results."""
    from support.tiny import Layout

    layout = Layout(**group[0].layout)
    layout.initialize()
    for case in group:
        result = _compare(case, layout, folder)
        if rank == 0:
            (folder / f"{_file(case.name)}.json").write_text(json.dumps(result))


def _compare(case: Case, layout, folder: Path) -> dict[str, Any]:
    import torch

    from support.tiny import Tiny, make_config

    reference = torch.load(folder / f"{_file(case.reference)}.pt")
    overrides = {**references()[case.reference], **case.config}
    config = make_config(layout, **overrides, zero_init_output=False)
    tiny = Tiny.build(config, layout, _packing(case.reference))
    tiny.load(reference["start"])
    clipped = _compare_clip(tiny, reference)
    steps = [tiny.step(seed) for seed in range(STEPS)]
    expected = reference["steps"]

    theirs, ours = expected[0]["gradients"], steps[0]["gradients"]
    gradients = {}
    for name in theirs.keys() | ours.keys():
        if name not in theirs or name not in ours:
            gradients[name] = float("inf")
            continue
        largest = theirs[name].abs().max()
        assert largest > 0, f"the reference gradient of {name} is zero: nothing is compared"
        difference = float((theirs[name] - ours[name]).abs().max() / largest)
        gradients[name] = float("inf") if difference != difference else difference
    end = tiny.collect("weight")
    weights = _farthest(end, reference["end"])

    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, tiny.replicas())
    seen: dict[Any, str] = {}
    split = sorted(
        {
            place[0]
            for part in digests
            for place, digest in part
            if seen.setdefault(place, digest) != digest
        }
    )
    return {
        "loss": _relative([s["loss"] for s in steps], [s["loss"] for s in expected]),
        "gradients": gradients,
        "grad_norm": _relative(
            [s["grad_norm"] for s in steps[:1]], [s["grad_norm"] for s in expected[:1]]
        ),
        "weights": weights,
        "replicas": split,
        **clipped,
        "num_gradients": len(theirs),
    }


def _farthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return max(float((ours[n] - w).abs().max() / w.abs().max()) for n, w in theirs.items())


def _relative(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "*")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
