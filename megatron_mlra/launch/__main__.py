"""`python -m megatron_mlra.launch`."""

import sys

from megatron_mlra.launch.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
