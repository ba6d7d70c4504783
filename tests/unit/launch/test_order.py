"""Ranks follow the numbers of the hosts; the hosts meet at an address of the first, once each."""

import ipaddress
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_mlra.launch.network import is_here
from megatron_mlra.launch.ports import reserve_port
from support import ENV
from support.runs import wait_for

RANK = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['RANK'])"
UP = (
    "import pathlib, sys, time\n"
    "print('up', flush=True)\n"
    "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.1)\n"
)
"""A rank that says that it runs, and ends once a file is there."""


@pytest.mark.parametrize("numbers", [(2, 1, 0), (0, 0, 0)])
def test_ranks_follow_the_numbers(numbers, tmp_path):
    """Hosts that share a number, or have none, are in torchrun's order: here that of their
    processes' ids."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launchers = []
    with reserve_port() as kept:
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


def start(meet: str, out: Path, *words: object) -> subprocess.Popen:
    """Start one of two launchers, with torchrun's default of a rendezvous."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mlra.launch", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-endpoint", meet, *map(str, words)]
    with out.open("w") as file:
        return subprocess.Popen(command, env=ENV, stdout=file, stderr=file)


def test_a_host_that_is_started_twice_is_refused_and_the_run_goes_on(tmp_path):
    script, end = tmp_path / "rank.py", tmp_path / "end"
    script.write_text(UP)
    outs = [tmp_path / f"{number}.txt" for number in range(3)]
    with reserve_port() as kept:
        meet = f"localhost:{kept.getsockname()[1]}"
        hosts = [start(meet, out, script, end) for out in outs[:2]]
        try:
            for out in outs[:2]:
                wait_for(out, "up", 120)
            hosts.append(start(meet, outs[2], script, end))
            assert hosts[2].wait(120) == 2, outs[2].read_text()
            time.sleep(1)
            end.touch()
            assert [host.wait(120) for host in hosts[:2]] == [0, 0]
        finally:
            for host in hosts:
                host.kill()
    assert [out.read_text().count("up\n") for out in outs] == [1, 1, 0]
    assert "error" not in outs[0].read_text() + outs[1].read_text()
    assert "was started twice: there are more launchers than NODES" in outs[2].read_text()


NAMED = (
    "import socket, sys\n"
    "name = sys.argv.pop(1)\n"
    "socket.gethostname = lambda: name\n"
    "from megatron_mlra.launch.cli import start\n"
    "start()\n"
)
"""A launcher, on a host of the name that it is given."""


def start_named(out: Path, meet: str, *words: object) -> subprocess.Popen:
    """Start the launcher of one of two hosts, whose name is that of the file `out`."""
    command = [sys.executable, "-W", "ignore", "-c", NAMED, out.stem, "--nnodes", 2]
    command += ["--nproc-per-node", 1, "--rdzv-endpoint", meet, *words]
    with out.open("w") as file:
        return subprocess.Popen([*map(str, command)], env=ENV, stdout=file, stderr=file)


def test_hosts_that_share_a_number_are_refused(tmp_path):
    outs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    script = tmp_path / "rank.py"
    script.write_text("import time; time.sleep(60)")
    with reserve_port() as kept:
        meet = f"localhost:{kept.getsockname()[1]}"
        hosts = [start_named(out, meet, "--node-rank", 1, script) for out in outs]
        codes = [host.wait(120) for host in hosts]
    # This machine has no such names: its address is noted.
    said = [[line for line in out.read_text().splitlines() if "note:" not in line] for out in outs]
    line = "error: NODE_RANK (--node-rank) is 1 on the hosts a, b; give each host its own, or all 0"
    assert (codes, said) == ([2, 2], [[line], [line]])


def test_another_host_takes_the_place_of_one_that_has_just_died(tmp_path):
    """With its number, and before its silence is noticed."""
    script, end = tmp_path / "rank.py", tmp_path / "end"
    script.write_text(UP)
    outs = [tmp_path / f"{name}.invalid.txt" for name in "abc"]
    with reserve_port() as kept:
        meet = f"localhost:{kept.getsockname()[1]}"
        hosts = [start_named(outs[0], meet, script, end)]
        wait_for(outs[0], "note:", 60)  # the first, which has the store
        words = ("--node-rank", 1, script, end)
        hosts.append(start_named(outs[1], meet, *words))
        try:
            for out in outs[:2]:
                wait_for(out, "up", 120)
            for process in (*psutil.Process(hosts[1].pid).children(), hosts[1]):
                process.kill()
            hosts.append(start_named(outs[2], meet, *words))
            wait_for(outs[2], "up", 120)
            end.touch()
            codes = [host.wait(120) for host in hosts]
        finally:
            for host in hosts:
                host.kill()
    assert codes == [0, -9, 0], [out.read_text() for out in outs]
    assert [out.read_text().count("up\n") for out in outs] == [2, 1, 1]


def test_addresses_of_this_host(monkeypatch):
    """Of every network, and where its own name is unknown or a loopback address."""
    monkeypatch.setattr(socket, "gethostname", lambda: "no.such.host.invalid")
    own = {e.address.partition("%")[0] for found in psutil.net_if_addrs().values() for e in found}
    assert all(is_here(address) for address in own if is_address(address))
    assert is_here("localhost") and is_here("::1")
    assert (
        not is_here("203.0.113.7") and not is_here("2001:db8::1") and not is_here("nobody.invalid")
    )


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:  # of the hardware
        return False
    return True
