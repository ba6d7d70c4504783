"""Compare the training losses of runs (docs/performance/training.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("compare-losses")
