"""The CUDA graphs of decoding steps, freed before communicators are destroyed.

A communicator whose collectives are in a living graph cannot be destroyed: NCCL waits for the
graph, and the process with it. An exception keeps graphs alive, by the locals in its traceback.
"""

from __future__ import annotations

from weakref import WeakSet

import torch

_KEPT: WeakSet[torch.cuda.CUDAGraph] = WeakSet()


def keep(graph: torch.cuda.CUDAGraph) -> torch.cuda.CUDAGraph:
    """Make `free` free this graph too; returns the graph."""
    _KEPT.add(graph)
    return graph


def free() -> None:
    """Free every kept graph of this process; none can be replayed again."""
    for graph in list(_KEPT):
        graph.reset()
    _KEPT.clear()
