"""Tokenise text, JSON lines, parquet or token shards into a Megatron dataset (docs/data.md)."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("preprocess")
