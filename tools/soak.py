"""Kill ranks of a small run at random, and compare its losses (docs/fault_tolerance.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("soak")
