"""The CUDA graphs of `--cuda-graph-impl local` and `full_iteration`, freed before communicators are
destroyed. (Megatron frees those of `transformer_engine` behind its last step.)"""

from __future__ import annotations

import gc

from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer.cuda_graphs import _CudaGraphRunner, delete_cuda_graphs


def free() -> None:
    """Free every captured graph of this process.

    A communicator whose collectives are in a living graph cannot be destroyed: NCCL waits for the
    graph, and the process with it. Megatron's `delete_cuda_graphs` finds only the graphs that are
    recorded and not captured yet, and gradient hooks keep a model and its graphs alive when no
    variable holds them. Graphs of whole iterations lie in a class, and Megatron frees them nowhere.
    """
    for found in gc.get_objects():
        if type(found) is _CudaGraphRunner:
            found.fwd_graph = found.bwd_graph = None
    FullCudaGraphWrapper.cuda_graph.update(dict.fromkeys(FullCudaGraphWrapper.cuda_graph))
    delete_cuda_graphs()
