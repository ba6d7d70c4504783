"""The names of implementations, forms and layouts, for all flags and arguments that choose one.

`auto` takes the fastest implementation that runs, `torch` is plain torch, `te` Transformer Engine,
`mlra_kernels` this project's kernels. Each choice offers some of these.
"""

from __future__ import annotations

import sys
from functools import cache

AUTO, TORCH, TE, MLRA_KERNELS = "auto", "torch", "te", "mlra_kernels"

TP_LAYOUTS = ("head", "latent")
"""How latent attention is cut over tensor-parallel ranks: by heads or by latents."""
CORE_FORMS = (AUTO, "absorbed", "materialized")
CORE_BACKENDS = (AUTO, TORCH, TE, MLRA_KERNELS)
LATENT_KERNELS = (AUTO, TORCH, MLRA_KERNELS)
FP8_LINEARS = ("wide", "all")
LOAD_DTYPES = (AUTO, "float32", "bfloat16", "float16")
DECODE_BACKENDS = (AUTO, MLRA_KERNELS, TORCH)
CACHE_DTYPES = (AUTO, "float32", "bfloat16", "float16", "fp8")
PRODUCTS = (AUTO, "serial", "cublas")
"""Products of few rows by mlra_kernels: 'auto' by its own kernels, each of which starts before the
kernel in front has ended; 'serial' by the same, one after the other; 'cublas' by torch."""
ALL_REDUCES = (AUTO, "one-shot", "nccl")
"""'auto': one-shot where it can run, for messages up to `reduction.SENT_BYTES`, else NCCL (gloo on
CPUs)."""
WEIGHT_MODES = ("replicated", "sharded")
"""'replicated': a rank holds W_UQ of all heads that it attends with, and W_O of the heads whose
outputs it gets; one all-reduce per layer, and one exchange where tokens are cut. 'sharded': a rank
holds h / world heads of both weights, for one more all-gather of queries and, over ranks with other
branches, one more reduce-scatter."""

MOST_PAGE_TOKENS = 2**20
"""Most tokens of a page of a decoding cache, which the kernels' schedule takes."""

OLD_NAMES = {
    "core_backend": {"sdpa": TORCH, "latent": MLRA_KERNELS},
    "latent_kernels": {"triton": MLRA_KERNELS},
    "backend": {"reference": TORCH, "triton": MLRA_KERNELS},
}
"""Choice -> old name -> new name; the old names are accepted for one more version."""


def check_page_size(tokens: int) -> None:
    """Check the tokens of a page of a decoding cache, a positive number.

    Raises:
        ValueError: names the value and the fix.
    """
    if tokens % 16 or tokens > MOST_PAGE_TOKENS:
        raise ValueError(
            f"page size is {tokens}; use a multiple of 16, best 64, at most {MOST_PAGE_TOKENS}"
        )


def current_name(choice: str, name: str) -> str:
    """The current name of an implementation. For an old name prints one line, once.

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
