"""`python -m megatron_mlra.launch`."""

from megatron_mlra.command_line.entry import Answered

if __name__ == "__main__":
    with Answered():
        from megatron_mlra.launch.cli import start

        start()
