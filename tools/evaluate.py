"""Log-likelihoods, perplexity and task accuracy of a checkpoint (docs/huggingface.md)."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.evaluation.cli import main

if __name__ == "__main__":
    run(main)
