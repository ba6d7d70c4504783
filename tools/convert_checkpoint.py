"""Convert, inspect and compare checkpoints (docs/checkpoints.md)."""

from megatron_mlra.checkpoint.cli import main
from megatron_mlra.command_line.parser import run

if __name__ == "__main__":
    run(main)
