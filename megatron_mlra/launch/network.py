"""Checks of names, addresses and ports before torchrun, whose own errors come late and are long."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
from torch.distributed import TCPStore

PATIENCE = 20.0
"""Seconds of silence from the first host before a line says so."""
_PROBE = 10.0


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """(host, port) of a text HOST:PORT.

    Raises:
        ValueError: the text is not HOST:PORT.
    """
    if not endpoint:
        raise ValueError(
            "several hosts need RDZV_ENDPOINT (--rdzv-endpoint): HOST:PORT of one of them, for"
            " example node001:29500"
        )
    host, colon, port = endpoint.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"RDZV_ENDPOINT {endpoint} is not HOST:PORT, for example node001:29500")
    return host.strip("[]"), int(port)


def resolve(host: str, port: int, here: str) -> None:
    """Check that the name of a host can be resolved.

    Args:
        here: name of this host, for messages.

    Raises:
        ValueError: the name is unknown.
    """
    try:
        socket.getaddrinfo(host, port)
    except socket.gaierror:
        raise ValueError(
            f"RDZV_ENDPOINT {host}:{port}: there is no host {host}, as {here} sees it"
        ) from None


def meet(host: str, port: int, join_timeout: float, say: Callable[[str], None], here: str) -> bool:
    """Check that the hosts can meet at host:port; waits for the first host.

    Args:
        join_timeout: most seconds to wait.
        say: called with a line when the wait is long.
        here: name of this host, for messages.

    Returns:
        Whether this host is the first one, which has the store.

    Raises:
        ValueError: another program has the port.
        TimeoutError: nothing answered.
    """
    taken = f"port {port} of {host} is taken by another program; choose another (RDZV_ENDPOINT)"
    if is_here(host) and _is_free(port):
        return True
    begin, said = time.monotonic(), False
    while not _answers(host, port):
        waited = time.monotonic() - begin
        hint = "is it the first host's name, and is the run started there?"
        if waited > join_timeout:
            raise TimeoutError(
                f"nothing answered at RDZV_ENDPOINT {host}:{port} for {join_timeout:.0f} s"
                f" (JOIN_TIMEOUT), as {here} sees it; {hint}"
            )
        if waited > PATIENCE and not said:
            said = True
            say(
                f"note: nothing answers at RDZV_ENDPOINT {host}:{port} yet; {hint}"
                f" Waiting {join_timeout:.0f} s in all (JOIN_TIMEOUT)"
            )
        time.sleep(1)
    if not _is_store(host, port):
        raise ValueError(taken)
    return False


def is_here(host: str) -> bool:
    """Whether a name or an address is this host's.

    torch compares the addresses of this host's own name alone. Those of its other networks, and all
    of them where the own name is a loopback address, would be no host's, and nobody would open the
    store.
    """
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        found = {item[4][0].partition("%")[0] for item in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return False
    own = {entry.address.partition("%")[0] for e in psutil.net_if_addrs().values() for entry in e}
    return any(ipaddress.ip_address(one).is_loopback or one in own for one in found)


def own_address(endpoint: tuple[str, int], chosen: str | None) -> tuple[str, str] | None:
    """(address, interface) of this host for the other hosts, if its name does not tell.

    On Debian a host's own name resolves to 127.0.1.1 on that host. gloo would give that address to
    the other hosts.

    Args:
        endpoint: host and port where all meet.
        chosen: the address that the user chose (`--local-addr`, LOCAL_ADDR).

    Returns:
        None if the name of this host resolves to an address that others can reach.

    Raises:
        ValueError: `chosen` is no address of this host; or there are no addresses or several.
    """
    if chosen is None and not _is_loopback(socket.gethostname()):
        return None
    addresses = _addresses()
    if chosen is not None:
        if chosen not in addresses:
            there = ", ".join(addresses) or "none"
            raise ValueError(f"LOCAL_ADDR {chosen} is no address of this host; there are: {there}")
        return chosen, addresses[chosen]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(endpoint)
            way_out = probe.getsockname()[0]
        except OSError:
            way_out = ""
    if way_out in addresses:
        return way_out, addresses[way_out]
    if len(addresses) == 1:
        return next(iter(addresses.items()))
    there = ", ".join(f"{address} ({name})" for address, name in addresses.items()) or "none"
    raise ValueError(
        f"this host's own name, {socket.gethostname()}, is a loopback address, which other hosts"
        f" cannot reach; set LOCAL_ADDR to one of: {there}"
    )


def _is_loopback(name: str) -> bool:
    """Whether a name resolves to loopback addresses only, or to none."""
    try:
        found = {item[4][0] for item in socket.getaddrinfo(name, None, socket.AF_INET)}
    except socket.gaierror:
        return True
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _addresses() -> dict[str, str]:
    """Address -> interface of all IPv4 addresses that other hosts may reach."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up
        and entry.family is socket.AF_INET
        and not ipaddress.ip_address(entry.address).is_loopback
    }


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ValueError(f"port {port} cannot be used: {os.strerror(error.errno)}") from None
    return True


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _is_store(host: str, port: int) -> bool:
    """Whether torch's store answers. A thread asks, since another program may never answer."""
    answer: list[bool] = []

    def ask() -> None:
        try:
            timeout = timedelta(seconds=_PROBE)
            store = TCPStore(host, port, None, False, timeout, wait_for_workers=False)
            store.add("mlra/probe", 1)
            answer.append(True)
        except (RuntimeError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE)
    return bool(answer)
