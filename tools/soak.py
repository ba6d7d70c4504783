"""Kill ranks of a small run at random, and compare its losses (docs/fault_tolerance.md)."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.fault_tolerance.soak import main

if __name__ == "__main__":
    run(main)
