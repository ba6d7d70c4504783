"""Worlds of different sizes and layouts, one behind another in the same processes.

Starting Python, importing Megatron and Transformer Engine takes longer than a measurement. So the
processes that torchrun starts stay, and form and leave process groups.
"""

from __future__ import annotations

import contextlib
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mlra.benchmarks.training.layouts import Layout


class Worlds:
    """The processes of one launch, which form one world at a time.

    Args:
        backend: `nccl` or `gloo`.
        seconds: after which a rank that waits for another gives up.
    """

    def __init__(self, backend: str, seconds: float = 120.0) -> None:
        self.backend = backend
        self.patience = timedelta(seconds=seconds)
        # torchrun's own store, so that its restarts find no keys of the processes before.
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=self.patience))
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"worlds-{start}", store)
        self.layout: Layout | None = None
        self._meetings = 0

    def enter(self, layout: Layout) -> bool:
        """Form the world of `layout` from the first ranks, and leave the world before.

        Returns:
            whether this rank belongs to the world; the others go on at once.

        Raises:
            ValueError: the layout needs more processes than there are.
        """
        if layout.world > self.size:
            raise ValueError(
                f"layout {layout} needs {layout.world} GPUs and {self.size} processes run; launch"
                f" with torchrun --nproc-per-node {layout.world}"
            )
        if self.layout is None or self.layout.sizes != layout.sizes:
            self.leave()
            self.layout = layout
            # Megatron reads the world's size from here.
            os.environ["WORLD_SIZE"] = str(layout.world)
            if self.rank < layout.world:
                self._form(layout)
        return self.rank < layout.world

    def _form(self, layout: Layout) -> None:
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(f"world-{self._meetings}", self.store),
            rank=self.rank,
            world_size=layout.world,
            timeout=self.patience,
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.size("tp"),
            pipeline_model_parallel_size=layout.size("pp"),
            context_parallel_size=layout.size("cp"),
            expert_model_parallel_size=layout.size("ep"),
        )

    def leave(self) -> None:
        """Leave the current world; every rank waits for all others."""
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            gc.collect()
            dist.destroy_process_group()
        self.layout = None
        self.meet()

    def meet(self) -> None:
        """Wait until every process of the launch is here."""
        self._meetings += 1
        keys = [f"meeting-{self._meetings}-{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], "here")
        self.store.wait(keys, 3 * self.patience)

    def agree(self, value: bool) -> bool:
        """What rank 0 of the launch says."""
        self.meet()
        key = f"said-{self._meetings}"
        if self.rank == 0:
            self.store.set(key, str(int(value)))
        return self.store.get(key) == b"1"


@contextlib.contextmanager
def user_buffers(args):
    """Transformer Engine's buffers for `--tp-comm-overlap`, in the current world.

    They overlap a row- or column-parallel product with its collective.
    """
    if not args.tp_comm_overlap:
        yield
        return
    # Multicast needs a right on the host's NVLink switch that not every machine gives.
    os.environ["UB_SKIPMC"] = "1"
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[args.seq_length * args.micro_batch_size // args.context_parallel_size,
               args.hidden_size],
        tp_size=args.tensor_model_parallel_size,
        quantization_modes=[modes.FP8 if args.fp8 else modes.NONE],
        ub_cfgs={},
        bootstrap_backend="nccl",
    )  # fmt: skip
    try:
        yield
    finally:
        torch.cuda.synchronize()
        base.destroy_ub()
