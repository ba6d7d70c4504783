"""Training speed on a CPU against a plain torch loop (docs/log/2026-11.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("benchmark-cpu")
