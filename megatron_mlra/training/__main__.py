"""`python -m megatron_mlra.training`."""

from megatron_mlra.training.cli import start

if __name__ == "__main__":
    start()
