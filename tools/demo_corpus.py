"""Write the demo's corpus, English and code from the files of this Python, as JSON lines."""

from megatron_mlra.command_line.parser import run
from megatron_mlra.data.demo_cli import main

if __name__ == "__main__":
    run(main)
