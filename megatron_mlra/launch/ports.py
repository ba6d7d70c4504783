"""TCP ports that are kept free for a server which this process, or one that it starts, opens later.

Asking the system for a free port and closing the socket again leaves time in which another process
may get the same port. Here the socket stays open: it does not listen, so that a server which sets
SO_REUSEADDR (torch's stores, vLLM) can, and the system gives the port to nobody who asks for any.
"""

from __future__ import annotations

import socket


def reserve_port(host: str = "127.0.0.1") -> socket.socket:
    """A socket that keeps a free port until it is closed: `.getsockname()[1]`.

    Raises:
        OSError: no port is free.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind((host, 0))
    return kept
