"""Calls: a launcher's report on itself to the other hosts, and a way to send one without torch.

    python call.py HOST:PORT NODES RDZV_ID TEXT    this host is refused; TEXT is the reason

Only the standard library is used, so that a host without torch can tell the others.
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
"""A number of calls that no run reaches."""
LONGEST = 4000
"""Most letters of a text in a call."""

PATIENCE = 20.0
"""Seconds for which a refused host tries to reach the first host."""

# The protocol of torch's TCPStore (TCPStoreBackend.hpp); clients put a "/" in front of keys.
_VALIDATE, _SET, _ADD = 0, 1, 4
_MAGIC = 0x3C85F7CE


@dataclass
class Call:
    """A launcher's report on itself."""

    host: str
    pid: int
    nodes: str
    """NODES of the launcher."""
    run: str
    """RDZV_ID of the launcher."""
    beat: int = 0
    """Counts the reports."""
    asked: str = ""
    """The signal that asked the launcher to stop, or empty."""
    code: int | None = None
    """The launcher's exit code, once it has ended."""
    why: str = ""
    """The reason of an exit code that is not 0."""
    node_rank: int = 0
    """NODE_RANK of the launcher."""


def read_call(text: str | bytes) -> Call:
    """Another launcher's call; unknown fields are ignored.

    Raises:
        ValueError: the text is no call. Any program that reaches the port could have written it.
    """
    said = read_fields(text, {"host", "pid", "nodes", "run"})
    call = Call(**{name: said[name] for name in Call.__dataclass_fields__ if name in said})
    texts = (call.host, call.nodes, call.run, call.asked, call.why)
    if not (
        all(isinstance(value, str) and len(value) <= LONGEST for value in texts)
        and type(call.pid) is int
        and type(call.beat) is int
        and type(call.node_rank) is int
        and is_code(call.code)
        and (call.code is not None or re.fullmatch("[0-9]{1,6}", call.nodes, re.ASCII))
    ):
        raise ValueError("this is no call")
    return call


def read_fields(text: str | bytes, needed: set[str]) -> dict:
    """A JSON object from the hosts' store, with at least the needed fields.

    Raises:
        ValueError: the text is something else.
    """
    try:
        said = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(said, dict) or not said.keys() >= needed:
        raise ValueError("this is neither a call nor news")
    return said


def is_code(code: object) -> bool:
    """Whether the value is an exit code, or None (the launcher still runs)."""
    return code is None or (type(code) is int and 0 <= code <= 255)


def key(number: int) -> str:
    """The store's key of the call of this number."""
    return f"mlra/call/{number}"


def refuse(endpoint: str, nodes: str, run: str, why: str) -> bool:
    """Tell the other hosts, which wait for this host, that it is refused.

    Args:
        endpoint: host:port of the store.
        nodes: NODES of this host.
        run: RDZV_ID of this host.
        why: the reason, one line.

    Returns:
        Whether the call is in the store. It is not if no host answers, or if another program does.
    """
    # Then srun itself ends the other hosts, and shows the output of all (examples/slurm.sh).
    if os.environ.get("SLURM_KILL_BAD_EXIT") == "1":
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
    """Write a call to the store under the next number."""
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
    """Whether a name means this host. Then this is the first host, and there is no store yet."""
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
