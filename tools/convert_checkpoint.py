"""Convert, inspect and compare checkpoints (docs/checkpoints.md)."""

import sys

from megatron_mlra.checkpoint.cli import main

if __name__ == "__main__":
    sys.exit(main())
