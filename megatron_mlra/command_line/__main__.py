"""`python -m megatron_mlra.command_line`, where the folder of `mlra` is not in the PATH."""

from megatron_mlra.command_line.commands import main

if __name__ == "__main__":
    main()
