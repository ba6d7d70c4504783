"""The words behind `--`, which go to vLLM: those that would contradict what `mlra serve` says."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

_TAKEN = {
    "--model": "the source says what is served; leave it out",
    "--served-model-name": "use --name in front of --",
    "--host": "use --host in front of --",
    "--port": "use --port in front of --",
    "--uds": "mlra serve waits for --host and --port; leave it out, or start vLLM itself",
    "--ssl-keyfile": "mlra serve speaks HTTP; put a proxy in front, or start vLLM itself",
    "--ssl-certfile": "mlra serve speaks HTTP; put a proxy in front, or start vLLM itself",
}
"""Flag of vLLM -> what to do instead."""


def check_passed_on(words: Sequence[str]) -> None:
    """Check that no word for vLLM changes where it listens, or the model or its name: `mlra serve`
    would wait at another address, and say one.

    Raises:
        ValueError: names the flag and the fix.
    """
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and len(name) > 3:
            for flag, instead in _TAKEN.items():
                if flag.startswith(name):  # vLLM's parser takes the start of a flag for it
                    raise ValueError(f"{word.partition('=')[0]} behind --: {instead}")


def is_local(host: str) -> bool:
    """Whether only this machine reaches a host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
