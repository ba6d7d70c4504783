"""What one rank knows of the ranks that it sums with: where their boxes are (see kernel.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlra_kernels import checks

MAX_RANKS = 8
"""Most ranks: GPUs of one host, each linked to each other one."""
MAX_ROWS = 128
"""Most tokens of a call. All programs must run at once, since each waits for its peers': an H100
has 132 multiprocessors."""
MAX_WIDTH = 65536
"""Most numbers of a row, which one program normalises."""
PATIENCE = 1 << 30
"""Looks for a peer's words before the kernel traps. A look takes 0.4 us or more, so that is 7
minutes or more: longer than a peer compiles a kernel, and not for ever."""


class Peers:
    """This rank's box, and the addresses of all ranks' boxes.

    Args:
        rank: this rank's place in `addresses`.
        addresses: of each rank's box, as this process sees them.
        rows: most tokens of a call.
        d: numbers of a row.
        dtype: of the numbers.
        device: where the operator runs.
        keep: what must live as long as the boxes.

    Raises:
        ValueError: a size or a dtype does not fit.
    """

    def __init__(
        self,
        rank: int,
        addresses: Sequence[int],
        rows: int,
        d: int,
        dtype: torch.dtype,
        device: torch.device | str,
        keep: object = None,
    ) -> None:
        self.words = box_words(rows, d, dtype, len(addresses)) // (2 * len(addresses) * rows)
        checks.check_integer("rank", rank, 0, len(addresses) - 1)
        self.rank, self.world, self.rows, self.d, self.dtype = rank, len(addresses), rows, d, dtype
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.device = self.addresses.device
        self.calls = torch.zeros(rows, dtype=torch.int32, device=device)
        """Calls that have had each row, on this rank."""
        self.patience = PATIENCE
        self._keep = keep


def box_words(rows: int, d: int, dtype: torch.dtype, world: int) -> int:
    """Words of 8 bytes in a rank's box.

    Raises:
        ValueError: a size or a dtype does not fit.
    """
    checks.check_integer("rows", rows, 1, MAX_ROWS)
    checks.check_integer("d", d, 1, MAX_WIDTH)
    if dtype not in checks.FLOAT_DTYPES:
        allowed = " or ".join(map(str, checks.FLOAT_DTYPES))
        raise ValueError(f"dtype is {dtype}: use {allowed}")
    if not 2 <= world <= MAX_RANKS:
        raise ValueError(f"there are {world} ranks: give 2 to {MAX_RANKS}")
    words = d if dtype == torch.float32 else -(-d // 2)
    return 2 * world * rows * (-(-words // 16) * 16)  # rows begin at whole cache lines
