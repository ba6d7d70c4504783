"""What is freed of CUDA graphs. Capturing needs a GPU, so the graphs here are plain objects."""

import gc
import weakref

import torch
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

from megatron_mlra.training import cuda_graphs


class Graph:
    """In place of torch.cuda.CUDAGraph."""


def test_captured_graphs_are_freed_though_a_cycle_keeps_their_model():
    runner = _CudaGraphRunner.__new__(_CudaGraphRunner)
    torch.nn.Module.__init__(runner)
    runner.fwd_graph, runner.bwd_graph = Graph(), Graph()
    held = [weakref.ref(runner.fwd_graph), weakref.ref(runner.bwd_graph)]
    hook = [runner]  # as a gradient hook, which Python's collector cannot reach
    del runner
    gc.collect()
    assert all(graph() for graph in held)
    cuda_graphs.free()
    assert not any(graph() for graph in held) and hook


def test_graphs_of_whole_iterations_are_freed():
    held = []
    for stage in FullCudaGraphWrapper.cuda_graph:
        graph = FullCudaGraphWrapper.cuda_graph[stage] = Graph()
        held.append(weakref.ref(graph))
    del graph
    assert len(held) == 2 and all(graph() for graph in held)
    cuda_graphs.free()
    assert not any(graph() for graph in held)
    assert set(FullCudaGraphWrapper.cuda_graph.values()) == {None}
