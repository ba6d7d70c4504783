"""Compare the training losses of runs (docs/performance/training.md)."""

from megatron_mlra.benchmarks.losses import main
from megatron_mlra.command_line.parser import run

if __name__ == "__main__":
    run(main)
