"""Continue prompts with a trained model; see docs/inference.md."""

import sys

from megatron_mlra.inference.cli import main

if __name__ == "__main__":
    sys.exit(main())
