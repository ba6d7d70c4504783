import pytest
import torch


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):
    """One rank, with Megatron's groups."""
    from support.tiny import Layout

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    Layout().initialize()
    yield
    torch.distributed.destroy_process_group()
