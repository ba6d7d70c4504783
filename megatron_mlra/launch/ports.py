"""TCP ports that are kept free for a server which this process, or one that it starts, opens later.

Asking the system for a free port and closing the socket again leaves time in which another process
may get the same port. Here the socket stays open: it does not listen, so that a server which sets
SO_REUSEADDR (torch's stores, vLLM) can, and the system gives the port to nobody who asks for any.
"""

from __future__ import annotations

import socket


def reserve_port() -> socket.socket:
    """A socket that keeps a free port until it is closed: `.getsockname()[1]`.

    The port is kept at every address of this host, IPv4 and IPv6: a store listens at all of them,
    and cannot where a program has the port at one.

    Raises:
        OSError: no port is free.
    """
    both = socket.has_dualstack_ipv6()
    kept = socket.socket(socket.AF_INET6 if both else socket.AF_INET)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if both:
        kept.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    kept.bind(("", 0))
    return kept


_kept: list[socket.socket] = []


def keep_port() -> int:
    """A port that no other program is given before the next call or the end of this process.

    For the store that rank 0 opens some seconds after torchrun's agent has chosen its port. torch's
    own `get_free_port` lets go of the port: on a busy host a connection may have it by then, and
    all ranks end with EADDRINUSE.
    """
    while _kept:
        _kept.pop().close()
    _kept.append(reserve_port())
    return _kept[0].getsockname()[1]
