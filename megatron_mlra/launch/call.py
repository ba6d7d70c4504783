"""What a launcher says of itself to the other hosts, and how a host that has no torch says it.

    python call.py HOST:PORT NODES RDZV_ID TEXT    this host is refused, and TEXT says why

The standard library is enough here, so that a host which lacks a package is heard as well.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass

COUNT = "mlra/count"
"""Key of the number of calls."""

MOST = 1 << 24
"""More calls than any run has."""
LONGEST = 4000
"""Most letters of a text in a call."""

PATIENCE = 20.0
"""Seconds for which a refused host waits for the first one, to be heard."""

# Of torch's TCPStore, as its clients say them (TCPStoreBackend.hpp); keys are stored behind a "/".
_VALIDATE, _SET, _ADD = 0, 1, 4
_MAGIC = 0x3C85F7CE


@dataclass
class Call:
    """What a launcher says of itself."""

    host: str
    pid: int
    nodes: str
    """Its NODES."""
    run: str
    """Its RDZV_ID."""
    beat: int = 0
    asked: str = ""
    code: int | None = None
    """Its exit code, once it has ended."""
    why: str = ""


def read_call(text: str | bytes) -> Call:
    """What another launcher said; fields that this version does not know are left out.

    Raises:
        ValueError: this is no call. Whoever reaches the port can write one.
    """
    said = read_fields(text, {"host", "pid", "nodes", "run"})
    call = Call(**{name: said[name] for name in Call.__dataclass_fields__ if name in said})
    texts = (call.host, call.nodes, call.run, call.asked, call.why)
    if not (
        all(isinstance(value, str) and len(value) <= LONGEST for value in texts)
        and type(call.pid) is int
        and type(call.beat) is int
        and is_code(call.code)
        and (call.code is not None or re.fullmatch("[0-9]{1,6}", call.nodes, re.ASCII))
    ):
        raise ValueError("this is no call")
    return call


def read_fields(text: str | bytes, needed: set[str]) -> dict:
    """A JSON object of a store that others write to, with the fields that are needed.

    Raises:
        ValueError: it is something else.
    """
    try:
        said = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(said, dict) or not said.keys() >= needed:
        raise ValueError("this is neither a call nor news")
    return said


def is_code(code: object) -> bool:
    """Whether this is an exit code, or the None of a launcher that goes on."""
    return code is None or (type(code) is int and 0 <= code <= 255)


def key(number: int) -> str:
    """Where the call of this number is."""
    return f"mlra/call/{number}"


def refuse(endpoint: str, nodes: str, run: str, why: str) -> bool:
    """Tell the other hosts, which wait for this one, that it is refused.

    Args:
        endpoint: host:port where all meet.
        nodes: NODES of this host.
        run: RDZV_ID of this host.
        why: the reason, one line.

    Returns:
        whether the first host has it: not if nobody is there, or if no torch is behind the port.
    """
    if "SLURM_STEP_ID" in os.environ:  # srun ends the other hosts, and their output is one
        return False
    nodes, run, why = (value[:LONGEST] for value in (nodes, run, why))
    call = Call(socket.gethostname(), os.getpid(), nodes, run, beat=1, code=2, why=why)
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as store:
                _leave(store, call)
            return True
        except (ValueError, socket.gaierror, struct.error, EOFError, OverflowError):
            return False
        except OSError:
            if time.monotonic() > deadline or _is_own(host.strip("[]")):
                return False
            time.sleep(1)


def _leave(store: socket.socket, call: Call) -> None:
    """Write a call under the next number."""
    store.sendall(struct.pack("=BI", _VALIDATE, _MAGIC))
    store.sendall(struct.pack("=B", _ADD) + _text(f"/{COUNT}") + struct.pack("=q", 1))
    answer = b""
    while len(answer) < 8:
        part = store.recv(8 - len(answer))
        if not part:
            raise EOFError
        answer += part
    (number,) = struct.unpack("=q", answer)
    if not 0 < number < MOST:
        raise ValueError("no number of a call")
    said = json.dumps(asdict(call))
    store.sendall(struct.pack("=B", _SET) + _text(f"/{key(number)}") + _text(said))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("=Q", len(data)) + data


def _is_own(host: str) -> bool:
    """Whether a name means this host, which then is the first: the others have not met."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.bind((address[0], 0))
                return True
    except OSError:
        pass
    return False


if __name__ == "__main__":
    refuse(*sys.argv[1:5])
