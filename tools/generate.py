"""Continue prompts with a trained model; see docs/inference.md."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.inference.cli import main

if __name__ == "__main__":
    run(main)
