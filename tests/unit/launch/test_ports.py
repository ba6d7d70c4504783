"""A reserved port: a store can listen at it, and nobody gets it by asking for any."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_mlra.launch.ports import reserve_port
from support import ENV, ROOT

IPV6 = ["::1"] if socket.has_dualstack_ipv6() else []
"""This host's own address, where the host has IPv6."""


@pytest.mark.parametrize("libuv", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", *IPV6])
def test_a_store_gets_a_reserved_port(libuv, host):
    with reserve_port() as kept:
        port = kept.getsockname()[1]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0  # nobody answers yet
        store = TCPStore(host, port, None, True, timedelta(seconds=9), False, use_libuv=libuv)
        store.set("key", "value")
        other = TCPStore(host, port, None, False, timedelta(seconds=9), use_libuv=libuv)
        assert other.get("key") == b"value"


def test_no_other_program_is_given_a_reserved_port():
    taken: list[socket.socket] = []
    with reserve_port() as kept:
        port = kept.getsockname()[1]
        try:
            for _ in range(3000):
                other = socket.socket()
                taken.append(other)
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, len(taken) % 2)
                other.bind(("127.0.0.1" if len(taken) % 3 else "", 0))
                assert other.getsockname()[1] != port
                if len(taken) >= 500:
                    taken.pop(0).close()
        finally:
            for other in taken:
                other.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", *IPV6])
def test_a_reserved_port_is_kept_at_every_address(address):
    """Behind another program at one address of the host, a store could not listen."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        reserve_port() as kept,
        socket.socket(family) as other,
        pytest.raises(OSError, match="in use"),
    ):
        other.bind((address, kept.getsockname()[1]))


def test_no_port_is_chosen_and_let_go():
    """The pattern of the race: `bind((..., 0))` in a `with`, and the number used behind it."""
    bound = r"with socket\.socket\(\) as (\w+):\n\s+\1\.bind\(\([^)]*, 0\)\)"
    race = re.compile(rf"{bound}(?!\s+\1\.listen)")
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "megatron_mlra").rglob("*.py")]
    assert not [str(path) for path in files if race.search(path.read_text())]


PROBE = """
import os, socket
port = int(os.environ["MASTER_PORT"])
try:
    socket.create_server(("", port), reuse_port=False).close()
    shared = "open to a store"
except OSError as error:
    shared = str(error)
with socket.socket() as plain:
    try:
        plain.bind(("", port))
        print("free for others,", shared)
    except OSError as error:
        print("kept,", shared)
"""


def test_the_port_of_the_ranks_store_is_kept_for_it(tmp_path):
    """create_server sets SO_REUSEADDR, as torch's store does; programs that are given a port do
    not get one that is bound."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    command = [sys.executable, "-m", "megatron_mlra.launch", "--standalone", str(script)]
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.run(command, env=ENV | own, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-1] == "kept, open to a store", run.stderr
