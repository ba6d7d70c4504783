"""The order of hosts: ranks follow the numbers that the scheduler gave the hosts.

torchrun's rendezvous (c10d) sorts hosts by the letters of their addresses: node10 comes before
node9, and 10.0.0.13 before node2. Schedulers number hosts by where they stand in the network, so
that neighbours in the pipeline and in NCCL's rings are near each other. `--node-rank` gives that
number; torchrun itself uses it for static rendezvous only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    _NodeDesc,
    _NodeDescGenerator,
)


@dataclass(frozen=True)
class _Host(_NodeDesc):
    """A host's descriptor in the rendezvous. Hosts of one number are in torchrun's order."""

    number: int = 0

    def __lt__(self, other: _Host) -> bool:
        here, there = ((host.number, host.addr, host.pid, host.local_id) for host in (self, other))
        return here < there


class Numbered(_NodeDescGenerator):
    """The generator of this process's descriptors in torchrun's rendezvous.

    Args:
        number: of this host.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def generate(self, local_addr: str | None = None) -> _Host:
        made = super().generate(local_addr)
        return _Host(made.addr, made.pid, made.local_id, self.number)
