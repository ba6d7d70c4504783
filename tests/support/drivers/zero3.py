"""Checks exported folders under DeepSpeed's ZeRO-3, as transformers loads them, on two gloo ranks:
weights, losses and gradients against those of the unsharded model; a step; generation. Run by hand,
because DeepSpeed is no dependency of the project:

    pip install --target SITE deepspeed einops hjson msgpack ninja py-cpuinfo
    PYTHONPATH=SITE DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 \
        tests/support/drivers/zero3.py EXPORTED_FOLDER ...
"""

from __future__ import annotations

import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # Shard small weights too.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
}
RANKS = 2


def main(folders: list[str]) -> None:
    """Print a line per folder and rank."""
    # DeepSpeed would compile its own collectives at the start.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    for folder in folders:
        print(f"rank {rank} {folder}: {compare(folder, rank)}", flush=True)


def tokens_of(rank: int) -> Tensor:
    """A short text, another one for each rank."""
    return torch.randint(1, 250, (1, 7), generator=torch.Generator().manual_seed(10 + rank))


def compare(folder: str, rank: int) -> str:
    """The differences between the sharded and the unsharded model, in words."""
    whole = load(folder)
    losses = [whole(tokens_of(each), labels=tokens_of(each)).loss for each in range(RANKS)]
    (sum(losses) / RANKS).backward()
    asked = HfDeepSpeedConfig(CONFIG)  # transformers shards while it loads, as long as this lives
    model = load(folder)
    assert all(hasattr(weight, "ds_id") for weight in model.parameters())
    weights = 0.0
    for own, other in zip(model.parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters(own):
            weights = max(weights, (own - other).abs().max().item())
    engine, *_ = deepspeed.initialize(
        model=model, config=CONFIG, model_parameters=model.parameters()
    )
    loss = engine(tokens_of(rank), labels=tokens_of(rank)).loss
    engine.backward(loss)
    gradients = 0.0
    for own, other in zip(engine.module.parameters(), whole.parameters(), strict=True):
        wanted = torch.zeros(1) if other.grad is None else other.grad
        largest = max(1e-6, wanted.abs().max().item())
        gradients = max(gradients, (safe_get_full_grad(own) - wanted).abs().max().item() / largest)
    engine.step()
    engine.eval()
    with torch.no_grad():
        after = engine(tokens_of(rank), labels=tokens_of(rank)).loss
        made = engine.module.generate(
            tokens_of(rank)[:, :4], max_new_tokens=5, do_sample=False, synced_gpus=True
        )
    del asked
    return (
        f"weights differ by {weights:.1e}, loss {loss:.6f} (whole: {losses[rank]:.6f}), gradients"
        f" differ by {gradients:.1e} of their largest, loss after a step {after:.4f},"
        f" {made.shape[1] - 4} tokens generated"
    )


def load(folder: str) -> torch.nn.Module:
    """The exported model by the code in its folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    return model.train()


if __name__ == "__main__":
    main(sys.argv[1:])
