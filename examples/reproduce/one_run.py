"""Train one model: import everything, then wait for the GPU, so that imports cost no GPU time.

python examples/reproduce/one_run.py LOCK FLAGS_OF_PRETRAIN...
"""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

# This script's folder would shadow others' modules: its modules have everyday names.
sys.path.remove(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import pretrain_mlra


def main() -> int:
    """Import, take the lock, train; returns the exit code."""
    pretrain_mlra.has_gpu()
    from megatron.training import training  # noqa: F401

    from megatron_mlra.training import arguments, batches, progress, steps  # noqa: F401

    lock = open(sys.argv[1], "w")  # noqa: SIM115  held until the process ends
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("has the device", flush=True)
    sys.argv = ["pretrain_mlra.py", *sys.argv[2:]]
    return pretrain_mlra.main()


if __name__ == "__main__":
    pretrain_mlra.leave(main())
