"""`python -m megatron_mlra.launch`."""

from megatron_mlra.launch.cli import start

if __name__ == "__main__":
    start()
