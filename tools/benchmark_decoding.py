"""Time per output token on one GPU (docs/performance/decoding.md)."""

from megatron_mlra.benchmarks.decoding.cli import main
from megatron_mlra.command_line.parser import run

if __name__ == "__main__":
    run(main)
