"""`python -m megatron_mlra.command_line`: the command `mlra` where it is not on the PATH."""

from megatron_mlra.command_line.entry import main

if __name__ == "__main__":
    main()
