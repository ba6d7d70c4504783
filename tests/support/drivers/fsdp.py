"""Shard exported models over two gloo ranks by FSDP, fully_shard and gathering hooks; write logits
and gradients of each rank, and of the unsharded models.

Usage: python -m support.drivers.fsdp FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from megatron_mlra.hf.attention_mlra import LatentUpProjection, MLRARMSNorm
from megatron_mlra.hf.mlp_mlra import MLRARouter
from megatron_mlra.hf.modeling_mlra import MLRADecoderLayer
from support.hf_models import build

RANKS = 2
MODELS = {
    "MLRA-4": {},
    # Latents wider than a head: keys and values are expanded by the module.
    "GLA-2": {},
    "MLRA-4 experts": {"tie_word_embeddings": False},
}
OWNERS = (nn.Linear, nn.Embedding, LatentUpProjection, MLRARMSNorm, MLRARouter)
"""Modules that own weights."""
HOW = ("layers", "modules", "FSDP1", "hooks")


def tokens_of(rank: int) -> torch.Tensor:
    """Few tokens, so that ranks choose different experts."""
    return torch.randint(1, 97, (1, 3), generator=torch.Generator().manual_seed(10 + rank))


def main(folder: Path) -> None:
    from support.world import run_world

    run_world(RANKS, lambda rank: torch.save(_run(rank), folder / f"{rank}.pt"), folder / "world")


def _run(rank: int) -> dict[tuple[str, str], dict]:
    found = {}
    for name, changes in MODELS.items():
        found[name, "whole"] = _step(_make(name, changes), range(RANKS))[rank]
        for how in HOW:
            model = _sharded(_make(name, changes), how)
            found[name, how] = _step(model, [rank])[0]
            if how == "hooks":
                for gradient in found[name, how]["gradients"].values():
                    torch.distributed.all_reduce(gradient)
                    gradient /= RANKS
    return found


def _make(name: str, changes: dict) -> nn.Module:
    model = build(name, initializer_range=0.2, **changes)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, MLRARouter):
            module.register_forward_hook(
                lambda router, _, out: setattr(router, "last", out[1].unique().tolist())
            )
    return model


def _sharded(model: nn.Module, how: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    if how == "layers":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if how == "modules":
        tied = {model.model.embed_tokens, model.lm_head}
        for module in list(model.modules()):
            if isinstance(module, OWNERS) and not (
                module in tied and model.config.tie_word_embeddings
            ):
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if how == "FSDP1":
        policy = ModuleWrapPolicy({MLRADecoderLayer})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    _gather_in_forward(model)
    return model


def _gather_in_forward(model: nn.Module) -> None:
    """As ZeRO-3 does: a weight is there while its own module's forward runs, and at no other time;
    every rank takes part in every gathering."""
    rank = torch.distributed.get_rank()
    wholes = {weight: weight.data for weight in model.parameters()}
    for module in model.modules():
        for weight in list(module.parameters(recurse=False)):
            whole = wholes[weight]
            share = whole.flatten().tensor_split(RANKS)[rank].clone()

            def gather(*_, weight=weight, share=share, like=whole) -> None:
                sizes = [len(part) for part in like.flatten().tensor_split(RANKS)]
                parts = [torch.empty(size) for size in sizes]
                torch.distributed.all_gather(parts, share)
                weight.data = torch.cat(parts).view(like.shape)

            def leave(*_, weight=weight) -> None:
                # A read of the weight from now on must fail.
                weight.data = torch.full_like(weight.data, float("nan"))

            leave()
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(leave)
            module.register_full_backward_pre_hook(gather)
            module.register_full_backward_hook(leave)


def _step(model: nn.Module, ranks) -> list[dict]:
    """Each rank's logits, with and without gradients, and the gradients of the mean over ranks."""
    found = []
    for rank in ranks:
        logits = model(tokens_of(rank)).logits
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(rank))
        ((logits * direction).sum() / len(ranks)).backward()
        found.append({"logits": logits.detach()})
    gradients = _gradients(model)
    with torch.no_grad():
        for rank, each in zip(ranks, found, strict=True):
            each |= {"inference": model(tokens_of(rank)).logits, "gradients": gradients}
            each |= {"chosen": _chosen(model)}
    return found


def _chosen(model: nn.Module) -> set[int]:
    """The experts of the tokens of the last forward."""
    chosen: set[int] = set()
    for module in model.modules():
        if isinstance(module, MLRARouter):
            chosen |= set(getattr(module, "last", []))
    return chosen


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by name."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {n: p.grad.clone() for n, p in model.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): g for name, g in found.items()}
    found = {n: p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
