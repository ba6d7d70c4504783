"""Write the preset of another attention with the same number of parameters (docs/evidence.md)."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.planner.twin_cli import main

if __name__ == "__main__":
    run(main)
