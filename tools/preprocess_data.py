"""Tokenise text, JSON lines, parquet or token shards into a Megatron dataset (docs/data.md)."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.data.cli import main

if __name__ == "__main__":
    run(main)
