"""Time per output token on one GPU or several (docs/performance/decoding.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("benchmark-decoding")
