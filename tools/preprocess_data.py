"""Tokenise text, JSON lines, parquet or token shards into a Megatron dataset (docs/data.md)."""

import sys

from megatron_mlra.preprocess.cli import main

if __name__ == "__main__":
    sys.exit(main())
