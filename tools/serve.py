"""Serve a trained model over HTTP by vLLM; see docs/serving.md."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.serving.cli import main

if __name__ == "__main__":
    run(main)
