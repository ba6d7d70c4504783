"""Write the preset of another attention with the same number of parameters (docs/evidence.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("twin")
