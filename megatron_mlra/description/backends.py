"""What implementations, forms and layouts are called, wherever one is chosen.

`auto` takes the fastest that runs, `torch` is plain torch, `te` Transformer Engine and
`mlra_kernels` this project's kernels. Each choice offers some of them.
"""

from __future__ import annotations

import sys
from functools import cache

AUTO, TORCH, TE, MLRA_KERNELS = "auto", "torch", "te", "mlra_kernels"

TP_LAYOUTS = ("head", "latent")
"""Which cut of latent attention over tensor-parallel ranks: heads, or latents."""
CORE_FORMS = (AUTO, "absorbed", "materialized")
CORE_BACKENDS = (AUTO, TORCH, TE, MLRA_KERNELS)
LATENT_KERNELS = (AUTO, TORCH, MLRA_KERNELS)
FP8_LINEARS = ("wide", "all")

OLD_NAMES = {
    "core_backend": {"sdpa": TORCH, "latent": MLRA_KERNELS},
    "latent_kernels": {"triton": MLRA_KERNELS},
    "backend": {"reference": TORCH, "triton": MLRA_KERNELS},
}
"""By choice: names of an earlier version, which are understood for one more."""


def current_name(choice: str, name: str) -> str:
    """The name today of an implementation; for an old name, says so in one line, once.

    Args:
        choice: a key of OLD_NAMES.
    """
    new = OLD_NAMES[choice].get(name) if isinstance(name, str) else None
    if new is None:
        return name
    _say(choice, name, new)
    return new


@cache
def _say(choice: str, old: str, new: str) -> None:
    print(f"{choice} {old} is now called {new}: use {choice} {new}", file=sys.stderr)
