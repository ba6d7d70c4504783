"""The place of a decoding benchmark: one GPU, all GPUs of a world, or CPUs for a rehearsal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_mlra.description.model import ModelDescription
from megatron_mlra.fault_tolerance.handshake import Fingerprint
from megatron_mlra.inference import world
from megatron_mlra.inference.parallel import TensorParallel


@dataclass(frozen=True)
class Place:
    """The ranks of a run, with device, dtype and backend."""

    ranks: int = 1
    rank: int = 0
    rehearsal: bool = False
    """Run on CPUs, at tiny sizes, in float32, without timing."""
    products: str = "auto"
    """See `LoadOptions.products`."""
    cuts: dict[tuple, TensorParallel] = field(default_factory=dict, compare=False)
    """Cache of `parallel`, since each set of process groups takes memory of the GPU."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def dtype(self) -> str:
        return "float32" if self.rehearsal else "bfloat16"

    @property
    def backend(self) -> str:
        return "torch" if self.rehearsal else "mlra_kernels"

    def parallel(self, model: ModelDescription, tp: int, context: int) -> TensorParallel | None:
        """This rank's part and collectives in a world; on one GPU a share without collectives, or
        None for a whole model."""
        if self.ranks > 1:
            key = tp, context, model.attention, model.num_branches
            if key not in self.cuts:
                self.cuts[key] = TensorParallel.over_world(model, context)
            return self.cuts[key]
        return None if tp * context == 1 else TensorParallel.share(tp, context=context)

    def most(self, value: float) -> float:
        """The largest value of all ranks."""
        if self.ranks == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared)

    def say(self, *text: object) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(*text, flush=True)


@contextlib.contextmanager
def joined(
    rehearsal: bool, products: str = "auto", told: Callable[[], Fingerprint] = dict
) -> Iterator[Place]:
    """The place of this process, in torchrun's world if there is one.

    Args:
        told: see `world.meet`.
    """
    if dist.is_initialized():
        yield Place(dist.get_world_size(), dist.get_rank(), rehearsal, products)
        return
    met = world.meet(told)
    if not rehearsal:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if met is None:
        yield Place(rehearsal=rehearsal, products=products)
        return
    # A rank may wait for another that has run out of memory.
    with world.formed(met, "gloo" if rehearsal else "nccl", world.LONGEST_WAIT):
        yield Place(world.size(), world.rank(), rehearsal, products)


def tiny(model: ModelDescription) -> ModelDescription:
    """A model of the same attention that a CPU runs in milliseconds. Its heads are as many, so that
    it can be cut as the model can."""
    sizes = {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 192,
        "softmax_scale": None, "no_rope_pattern": model.no_rope_pattern[:2],
    }  # fmt: skip
    if model.attention == "gqa":
        return model.replace(**sizes, head_dim=16)
    return model.replace(
        **sizes, q_lora_rank=model.q_lora_rank and 32, kv_lora_rank=64, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
