"""Starts ranks that only meet (the handshake at a run's start), each with its own host name and
mounts.

Reads one world per line from stdin, as JSON: the folder, the seconds, and a list of ranks, each
{"host", "fingerprint", and optionally a fault: "absent", "dies", "blind" or "refuses"}. Answers
with one JSON line: a list of each rank's outcome.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

from megatron_mlra.fault_tolerance import handshake, shared_folder
from megatron_mlra.launch.ports import reserve_port


def main() -> None:
    """Serve worlds until stdin closes."""
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


def run(folder: str, seconds: float, ranks: list[dict]) -> list[dict | None]:
    """Fork the ranks and gather their outcomes."""
    kept = reserve_port()
    port = kept.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    said = []
    for rank, how in enumerate(ranks):
        if how.get("absent"):
            continue
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(be(rank, len(ranks), folder, seconds, how)).encode())
            os._exit(0)
        os.close(write)
        said.append(read)
    answers = []
    for read in said:
        with open(read) as pipe:
            answers.append(json.loads(pipe.read() or "null"))
        os.wait()
    kept.close()
    return answers


def be(rank: int, world_size: int, folder: str, seconds: float, how: dict) -> dict:
    """Be one rank; its outcome is the hosts that it met, or the line with which it was refused."""
    os.unshare(os.CLONE_NEWUTS | os.CLONE_NEWNS)
    socket.sethostname(how["host"])
    shared_folder.PATIENCE = 1.0
    if how.get("blind"):
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    if how.get("dies"):
        # Once it has said where it is.
        handshake._follow = lambda *_: os._exit(0)

    def enter() -> None:
        if how.get("refuses"):
            raise ValueError(how["refuses"])

    begin = time.monotonic()
    try:
        world = handshake.meet(
            rank, world_size, how["fingerprint"], seconds=seconds, save=folder, enter=enter
        )
    except ValueError as error:
        return {"line": str(error)}
    took = time.monotonic() - begin
    # Rank 0 hosts the store. In a run rank 0 lives on; here it waits until no other rank asks.
    world.store.set(f"done/{rank}", "")
    if rank == 0:
        world.store.wait([f"done/{i}" for i in range(world_size)])
    return {"hosts": world.hosts, "seconds": took}


if __name__ == "__main__":
    main()
