"""Convert, inspect and compare checkpoints (docs/checkpoints.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("convert")
