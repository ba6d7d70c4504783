"""Launch: one node's ranks are started, watched, told to stop, and their end is told to all hosts.

    mlra launch [flags of torchrun] -m megatron_mlra.training [flags of the entry]

torchrun's agent starts and restarts the ranks. What is added: a stop signal saves in every phase, a
refused command line (exit code 2) is not started again, and hosts know of each other.

Start with cli.py; examples/launch.sh is the script that calls it.

May import:   command_line.output, command_line.suggest; torch.distributed's elastic agent
Imported by:  fault_tolerance (soak.py: the exit code of a refused command line), training (who says
              why a run is refused)
Never:        Megatron: a host is up in a second
Held by:      tests/unit/launch, tests/e2e/test_launch.py, tests/cluster
"""
