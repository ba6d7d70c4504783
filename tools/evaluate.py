"""Log-likelihoods, perplexity and task accuracy of a checkpoint (docs/huggingface.md)."""

import sys

from megatron_mlra.evaluation.cli import main

if __name__ == "__main__":
    sys.exit(main())
