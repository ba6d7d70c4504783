"""Plan a run before its launch: memory, time, traffic, layouts, decoding (docs/scale.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("plan")
