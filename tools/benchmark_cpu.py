"""Training speed on a CPU against a plain torch loop (docs/log/2026-11.md)."""

from megatron_mlra.benchmarks.cpu import main
from megatron_mlra.command_line.parser import run

if __name__ == "__main__":
    run(main)
