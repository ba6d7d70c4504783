"""The ranks that a launcher starts on one host: which of them says why they are refused.

What all ranks of a host refuse, the first one says; what one rank refuses alone, it says itself.
torchrun gives each rank a file for the reason of its end, in folders beside each other, so a rank
sees there what the first was refused for. torchrun ends all ranks when one has exited: a rank that
may have to be silent exits last. Imported before torch, so only the standard library is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path

from megatron_mlra.command_line.printable import printable

REFUSED = 2
"""Exit code of a rank whose command line or input was refused: a restart would end alike."""
SPEAKER = "MLRA_LAUNCHER_SPEAKS"
"""Environment variable of the ranks: the launcher, not the ranks, prints why they were refused. A
rank may be killed before it prints, because another rank was refused too."""
_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of the ranks: `.../LOCAL_RANK/error.json`, empty or missing without one."""


def first_of_host() -> bool:
    """Whether this process is the first rank on its host, or no rank at all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def tell_launcher(line: str) -> bool:
    """Write the reason of an end into the file from which torchrun's agent reads it.

    The agent hands the reason on to the other hosts.

    Returns:
        whether the reason is written: False without an agent, or if the file cannot be written.
    """
    if file := os.environ.get(_FILE):
        with contextlib.suppress(OSError), open(file, "w") as out:
            json.dump({"message": line, "timestamp": int(time.time())}, out)
            return True
    return False


def say_refusal(line: str, code: int = REFUSED, shared: bool = True, within: float = 5.0) -> None:
    """Print `error: ...`, and tell the launcher why this rank ends.

    Args:
        code: with which the rank ends. `mlra launch` itself prints the reason of `REFUSED`.
        shared: whether all ranks of a host have this reason, as far as this rank knows. Without a
            launcher's files the first of a host speaks for the others.
        within: seconds in which the first rank comes to the same point.
    """
    told = tell_launcher(line)
    if told and code == REFUSED and SPEAKER in os.environ:
        return
    rank, first = os.environ.get("RANK", "0"), first_of_host()
    where = "" if rank == "0" or (first and shared) else f" (rank {rank})"
    if told and not first:
        if _first_says(within):
            return
    elif where or not first:
        time.sleep(within)  # another rank may say it, and the launcher end this one meanwhile
        if shared:
            return
    print(f"error{where}: {printable(line)}", file=sys.stderr, flush=True)


def _first_says(within: float) -> bool:
    """Whether the first rank of this host tells the launcher the same reason, which it then says.
    Numbers do not count: each rank may have its own, such as the free memory of its GPU."""
    own = Path(os.environ[_FILE])
    first = own.parent.with_name("0") / own.name
    end = time.monotonic() + within
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if _words(first) == _words(own):
                return True
        time.sleep(0.05)
    return False


def _words(file: Path) -> bytes:
    return re.sub(rb"\d+", b"", file.read_bytes())
