"""What is freed of CUDA graphs. Capturing needs a GPU, so the graphs here are plain objects; real
ones are in tests/gpu/test_hang_gpu.py."""

import pytest
import torch.distributed as dist

from megatron_mlra.fault_tolerance.handshake import World
from megatron_mlra.inference import graphs, world


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    freed_in_a_world = None

    def reset(self):
        self.freed_in_a_world = dist.is_initialized()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_graphs_are_freed_before_their_world_ends(error):
    held = []

    def serve():
        graph = graphs.keep(Graph())  # which the traceback of an error keeps alive
        held.append(graph)
        if error:
            raise error("in a step")

    def run():
        with world.formed(World(["here"], dist.HashStore()), "gloo"):
            serve()

    if error:
        with pytest.raises(error, match="in a step"):
            run()
    else:
        run()
    assert held[0].freed_in_a_world is True and not dist.is_initialized()


def test_a_world_ends_where_a_graph_cannot_be_freed():
    class Lost(Graph):
        def reset(self):
            raise RuntimeError("CUDA error: the device is lost")

    graph = graphs.keep(Lost())
    with (
        pytest.raises(RuntimeError, match="is lost"),
        world.formed(World(["here"], dist.HashStore()), "gloo"),
    ):
        pass
    assert graph and not dist.is_initialized()
