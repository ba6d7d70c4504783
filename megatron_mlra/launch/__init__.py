"""Launch: starts, watches and stops the ranks of one node, and exchanges messages with other hosts.

    mlra launch [flags of torchrun] -m megatron_mlra.training [flags of the entry]

torchrun's agent starts and restarts the ranks. This package adds four things: a stop signal leads
to a save in every phase; a refused command line (exit code 2) is not restarted; all hosts learn
why one of them stops or fails; ranks follow the scheduler's numbers of the hosts.

Start with cli.py; examples/launch.sh is the script that calls it.

May import:   command_line.entry, command_line.loading, command_line.numbers, command_line.output,
              command_line.ranks, command_line.suggest; torch.distributed's elastic agent
Imported by:  training (the exit code of a second Ctrl-C; a port for a world of one)
Never:        Megatron, so that a launcher starts within a second
Held by:      tests/unit/launch, tests/e2e/test_launch.py, tests/cluster
"""
