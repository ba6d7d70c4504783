"""Convert, inspect and compare checkpoints (docs/checkpoints.md)."""

from megatron_mlra.command_line.commands import run_command

if __name__ == "__main__":
    run_command("convert")
