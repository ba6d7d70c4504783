"""Plan a run before its launch: memory, time, traffic, layouts, decoding (docs/scale.md)."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.planner.cli import main

if __name__ == "__main__":
    run(main)
