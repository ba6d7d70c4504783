"""Ranks follow the numbers of the hosts."""

import subprocess
import sys

import pytest

from megatron_mlra.launch.ports import reserve_port
from support import ENV

RANK = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['RANK'])"


@pytest.mark.parametrize("numbers", [(2, 1, 0), (0, 0, 0)])
def test_ranks_follow_the_numbers(numbers, tmp_path):
    """Hosts that share a number, or have none, are in torchrun's order: here that of their
    processes' ids."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launchers = []
    with reserve_port("") as kept:
        meet = f"localhost:{kept.getsockname()[1]}"
        for host, number in enumerate(numbers):
            flags = ["--nnodes", len(numbers), "--nproc-per-node", 1, "--node-rank", number]
            flags += [
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                meet,
                script,
                tmp_path / str(host),
            ]
            command = [sys.executable, "-m", "megatron_mlra.launch", *map(str, flags)]
            launchers.append(subprocess.Popen(command, env=ENV))
        assert [launcher.wait(120) for launcher in launchers] == [0] * len(numbers)
    ranks = [int((tmp_path / str(host)).read_text()) for host in range(len(numbers))]
    by_id = [launcher.pid for launcher in launchers]
    order = sorted(range(len(numbers)), key=lambda host: (numbers[host], by_id[host]))
    assert [ranks[host] for host in order] == [0, 1, 2]
