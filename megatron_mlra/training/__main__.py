"""`python -m megatron_mlra.training`."""

from megatron_mlra.command_line.entry import Answered

if __name__ == "__main__":
    with Answered():
        from megatron_mlra.training.cli import start

        start()
