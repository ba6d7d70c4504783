"""Compare cached decoding of every variant with Megatron's full forward, on 1, 2, 4 and 8 ranks.

Usage: python -m support.drivers.inference FOLDER. One import of Megatron serves all worlds; each
case leaves `NAME.json` with the largest logit difference of each check.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mlra.description.backends import WEIGHT_MODES
from megatron_mlra.description.tensors import expected_tensors
from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.load import LoadOptions, load_model
from megatron_mlra.inference.parallel import TensorParallel
from megatron_mlra.inference.runner import Runner, pool_for
from megatron_mlra.maths.routing import choose_experts
from support.decoded_models import MODELS, PAGE, VOCAB

LENGTH = 301
"""Tokens of a sequence."""
EVERY_LENGTH = ("MLRA-4",)
"""Models that are decoded from a prompt of each length from 1 to 300."""
SOME_LENGTHS = (1, 2, 15, 16, 17, 33, 100, 299, 300)
PARALLEL = {
    2: (
        "MLA",
        "GLA-2",
        "MLRA-2-gated",
        "MLRA-4",
        "MLRA-4-no-q-lora",
        "MLRA-4-nope",
        "GQA-gated",
        "MLRA-4-experts",
    ),
    4: ("MLA", "GLA-2", "GLA-4", "MLRA-2", "MLRA-4", "MLRA-4-gated", "GQA", "GQA-experts"),
    8: ("MLA", "MLRA-2", "MLRA-4", "MLRA-8", "MQA"),
}


def parallel_cases() -> list[tuple[int, str, str]]:
    """(ranks, model, weight mode). Every model occurs in every mode, and every number of ranks with
    every mode; grouped attention has only one mode."""
    found = []
    for name in dict.fromkeys(name for names in PARALLEL.values() for name in names):
        sizes = [tp for tp, names in PARALLEL.items() if name in names]
        for place, tp in enumerate(sizes):
            modes = WEIGHT_MODES if len(sizes) == 1 else (WEIGHT_MODES[place % len(WEIGHT_MODES)],)
            if MODELS[name].attention != "mlra":
                modes = WEIGHT_MODES[:1]
            found += [(tp, name, mode) for mode in modes]
    return sorted(found, key=lambda case: case[0])


def random_tokens() -> list[list[int]]:
    """Four sequences of LENGTH tokens."""
    rng = random.Random(7)
    return [[rng.randrange(VOCAB) for _ in range(LENGTH)] for _ in range(4)]


def build_megatron(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Random global tensors of a model, and Megatron's logits `[4, LENGTH, VOCAB]` for them."""
    from megatron.core.models.gpt import GPTModel

    from megatron_mlra.layers.from_description import to_config
    from megatron_mlra.layers.specs import block_spec

    model = MODELS[name]
    overrides = {"pipeline_dtype": torch.float32, "use_cpu_initialization": True}
    overrides |= {"transformer_impl": "local", "gradient_accumulation_fusion": False}
    overrides |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "persist_layer_norm": False}
    overrides |= {"masked_softmax_fusion": False, "bias_activation_fusion": False}
    overrides |= {"moe_token_dispatcher_type": "alltoall"}
    config = to_config(model, **overrides)
    gpt = GPTModel(
        config,
        block_spec(config),
        VOCAB + 5,
        512,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
    ).eval()
    torch.manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, param in gpt.named_parameters():
            norm = "norm" in key
            param.normal_(1.0 if norm else 0.0, 0.2 if norm else param.shape[-1] ** -0.5)
        for key, buffer in gpt.named_buffers():
            if "expert_bias" in key:
                buffer.normal_(0.0, 0.2)
    state = {
        k.replace("local_experts", "experts"): v
        for k, v in gpt.state_dict().items()
        if isinstance(v, Tensor)
    }
    tensors = {}
    for key, shape in expected_tensors(model).items():
        tensors[key] = state.pop(key)[: shape[0]].clone()
        assert tensors[key].shape == shape, f"{key} is {tuple(tensors[key].shape)}, not {shape}"
    assert not state, f"no canonical name for {sorted(state)}"
    tokens = torch.tensor(random_tokens())
    positions = torch.arange(LENGTH)[None].expand(4, -1)
    with torch.no_grad():
        logits = gpt(tokens, positions, None)
    return tensors, logits[..., :VOCAB].clone()


class Session:
    """Decodes sequences without the scheduler, so that a test chooses chunks, batches and pages."""

    def __init__(self, name: str, tensors: dict[str, Tensor], cache_tokens: int, **more) -> None:
        parallel, static = more.pop("parallel", None), more.pop("static", False)
        options = LoadOptions(cache_tokens=cache_tokens, page_size=PAGE, backend="torch", **more)
        self.model = load_model(MODELS[name], tensors.__getitem__, options, parallel=parallel)
        self.model.static_decoding = static
        # Memory that was never written must not influence results.
        self.model.cache.data.fill_(float("nan"))
        self.runner = Runner(self.model, max_batch=4, max_pages=64)
        self.pool = pool_for(self.model)
        for free in self.pool._free:
            random.Random(3).shuffle(free)

    def prefill(self, tokens: list[int], pages: list[int], chunk: int) -> Tensor:
        """Logits of every prompt token `[n, vocab]`, cached `chunk` tokens at a time."""
        parts = [
            self.runner.prefill([Chunk(tokens[at : at + chunk], at, pages)], every_row=True)
            for at in range(0, len(tokens), chunk)
        ]
        return torch.cat(parts)

    def decode(self, rows: list[tuple[int, int, list[int]]]) -> Tensor:
        """Logits of one step for (token, cached length, pages)."""
        for row, (_, _, pages) in enumerate(rows):
            self.runner.tables.set(row, pages)
        tokens, lengths, pages = (list(part) for part in zip(*rows, strict=True))
        return self.runner.decode(tokens, lengths, pages)


def check_decoding(name: str, tensors: dict[str, Tensor], full: Tensor, **more) -> dict[str, float]:
    """Check -> largest difference to the full forward: chunked prefill, decoding at several
    lengths, a ragged batch, and reused pages."""
    session, sequences = Session(name, tensors, 4 * 320, **more), random_tokens()
    worst: dict[str, float] = {}

    def note(what: str, ours: Tensor, expected: Tensor) -> None:
        off = float((ours - expected).abs().max())
        worst[what] = max(worst.get(what, 0.0), off if off == off else float("inf"))

    # Whole and chunked prompts; each later one gets pages that another sequence has used.
    for chunk in (LENGTH, 64, 37):
        pages = session.pool.take(LENGTH)
        note("prefill", session.prefill(sequences[0], pages, chunk), full[0])
        session.pool.give_back(pages)
    lengths = range(1, LENGTH) if name in EVERY_LENGTH else SOME_LENGTHS
    for n in lengths:
        pages = session.pool.take(n + 1)
        note("lengths", session.prefill(sequences[1][:n], pages, n)[-1], full[1, n - 1])
        logits = session.decode([(sequences[1][n], n, pages)])
        note("lengths", logits[0], full[1, n])
        session.pool.give_back(pages)
    _ragged(session, sequences, full, note, steps=12)
    return worst


def _ragged(session: Session, sequences, full: Tensor, note, steps: int) -> None:
    """Decode a batch of four lengths. Halfway, one sequence leaves, another prompt gets its pages,
    and decoding continues."""
    cached = [1, 16, 90, 200]
    pages = [session.pool.take(LENGTH) for _ in cached]
    chunks = [
        Chunk(tokens[:n], 0, own) for tokens, n, own in zip(sequences, cached, pages, strict=True)
    ]
    logits = session.runner.prefill(chunks)
    note("ragged", logits, torch.stack([full[i, n - 1] for i, n in enumerate(cached)]))
    which = [0, 1, 2, 3]
    for step in range(steps):
        if step == steps // 2:
            session.pool.give_back(pages[2])
            pages[2] = session.pool.take(LENGTH)
            which[2], cached[2] = 0, 33
            session.prefill(sequences[0][:33], pages[2], 20)
        rows = [(sequences[which[i]][cached[i]], cached[i], pages[i]) for i in range(4)]
        expected = torch.stack([full[which[i], cached[i]] for i in range(4)])
        note("ragged" if step < steps // 2 else "reuse", session.decode(rows), expected)
        cached = [n + 1 for n in cached]
    for own in pages:
        session.pool.give_back(own)


def check_fp8(name: str, tensors: dict[str, Tensor], full: Tensor) -> dict[str, float]:
    """Relative error of the logits with an FP8 cache."""
    session, sequences = Session(name, tensors, 2 * 320, cache_dtype="fp8"), random_tokens()
    pages = session.pool.take(LENGTH)
    ours = session.prefill(sequences[0][:200], pages, 64)
    last = session.decode([(sequences[0][200], 200, pages)])
    ours = torch.cat((ours, last))
    return {"fp8": float((ours - full[0, :201]).norm() / full[0, :201].norm())}


def check_parallel(name: str, mode: str, tensors: dict[str, Tensor], full: Tensor) -> dict:
    """A short `check_decoding` on every rank of this world."""
    parallel = TensorParallel.over_world(MODELS[name])
    session = Session(name, tensors, 4 * 320, weight_mode=mode, parallel=parallel, static=True)
    sequences, worst = random_tokens(), {}

    def note(what: str, ours: Tensor, expected: Tensor) -> None:
        worst[what] = max(worst.get(what, 0.0), float((ours - expected).abs().max()))

    pages = session.pool.take(LENGTH)
    note("prefill", session.prefill(sequences[0][:100], pages, 37), full[0, :100])
    session.pool.give_back(pages)
    _ragged(session, sequences, full, note, steps=6)
    paths = {"all_reduce": session.model.reduction.path}
    return worst | {"bytes_per_token": session.model.cache.bytes_per_token} | paths


def check_joining() -> dict:
    """What the ranks of this world say to mapping each other's memory."""
    from mlra_kernels.one_shot import NoPeers, join_peers

    try:
        join_peers(torch.distributed.group.WORLD, 1, 64, torch.float32, "cpu")
    except NoPeers as error:
        return {"said": str(error)}
    return {"said": "joined"}


def check_routing() -> dict[str, bool]:
    """Case -> whether the chosen experts and their weights equal those of Megatron's router bit for
    bit, for bfloat16 tokens."""
    from megatron.core.transformer.moe.moe_utils import (
        router_gating_linear,
        topk_routing_with_score_function,
    )

    generator = torch.Generator().manual_seed(8)
    x = torch.randn(400, 64, generator=generator).bfloat16()
    weight = torch.randn(16, 64, generator=generator).bfloat16() / 8
    bias = torch.randn(16, generator=generator) / 4
    same = {}
    for score, pre, with_bias, k, scale, dtype in (
        ("softmax", True, False, 6, 1.0, None),
        ("softmax", True, False, 6, 16.0, "fp32"),
        ("softmax", False, False, 6, 1.0, None),
        ("softmax", True, False, 1, 1.0, None),
        ("sigmoid", False, True, 6, 2.5, "fp32"),
        ("sigmoid", False, False, 1, 1.0, None),
    ):
        sizes = argparse.Namespace(
            moe_router_topk=k,
            moe_router_score_function=score,
            moe_router_pre_softmax=pre,
            moe_router_topk_scaling_factor=scale,
            moe_router_dtype=dtype,
        )
        logits = router_gating_linear(x, weight, None, torch.float32 if dtype else x.dtype)
        expected, _ = topk_routing_with_score_function(
            logits,
            k,
            use_pre_softmax=pre,
            scaling_factor=None if scale == 1.0 else scale,
            score_function=score,
            expert_bias=bias if with_bias else None,
        )
        weights, chosen = choose_experts(x, weight, bias if with_bias else None, sizes)
        found = torch.zeros_like(expected).scatter(1, chosen, weights)
        same[f"{score} pre={pre} bias={with_bias} k={k} {dtype}"] = torch.equal(found, expected)
    return same


def main(folder: Path) -> None:
    """Run every case; the failure of a case is recorded, and the others run."""
    from megatron_mlra.training.cpu_backend import enable_cpu_backend

    enable_cpu_backend()

    import megatron_mlra.layers.specs  # noqa: F401  (loaded once, before the forks)
    from support.world import run_world

    logging.disable(logging.WARNING)

    def record(case: str, rank: int, work, *args: Any) -> None:
        try:
            result = work(*args)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"}
        (folder / f"{case}-{rank}.json").write_text(json.dumps(result))

    def alone(rank: int) -> None:
        from megatron.core import parallel_state as mpu
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        record("routing", rank, check_routing)
        for name in MODELS:
            tensors, full = build_megatron(name)
            torch.save((tensors, full), folder / f"{name}.pt")
            record(f"1-{name}", rank, check_decoding, name, tensors, full)
            if MODELS[name].num_experts:
                static = partial(check_decoding, static=True)
                record(f"static-{name}", rank, static, name, tensors, full)
            if name in ("MLRA-4", "MLA"):
                record(f"fp8-{name}", rank, check_fp8, name, tensors, full)

    def together(rank: int) -> None:
        for tp, name, mode in parallel_cases():
            if tp == torch.distributed.get_world_size():
                tensors, full = torch.load(folder / f"{name}.pt")
                record(f"{tp}-{name}-{mode}", rank, check_parallel, name, mode, tensors, full)
        if torch.distributed.get_world_size() == 2:
            record("joining", rank, check_joining)

    run_world(1, alone, folder / "world1")
    for tp in PARALLEL:
        run_world(tp, together, folder / f"world{tp}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
