"""Log-likelihoods, perplexity and task accuracy of a checkpoint (docs/huggingface.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("evaluate")
