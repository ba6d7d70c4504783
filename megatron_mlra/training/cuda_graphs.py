"""The CUDA graphs of `--cuda-graph-impl local`, freed before communicators are destroyed."""

from __future__ import annotations

import gc

from megatron.core.transformer.cuda_graphs import _CudaGraphRunner, delete_cuda_graphs


def free() -> None:
    """Free every captured graph of this process.

    A communicator whose collectives are in a living graph cannot be destroyed: NCCL waits for the
    graph, and the process with it. Megatron's `delete_cuda_graphs` finds only the graphs that are
    recorded and not captured yet, and gradient hooks keep a model and its graphs alive when no
    variable holds them.
    """
    for found in gc.get_objects():
        if type(found) is _CudaGraphRunner:
            found.fwd_graph = found.bwd_graph = None
    delete_cuda_graphs()
