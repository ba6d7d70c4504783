"""Training speed on one GPU (docs/performance/training.md)."""

from megatron_mlra.benchmarks.training.cli import main
from megatron_mlra.command_line.parser import run

if __name__ == "__main__":
    run(main)
