"""The training entry: flags, arguments, presets, batches, steps, console, progress, dry run.

Start with cli.py, a run from its first line to its last, then arguments.py. hooks.py lists
everything that a run replaces in Megatron and torch.

May import:   layers, maths, fault_tolerance, cost, planner, sharding, data, description,
              evaluation, command_line, checkpoint.files.guarded_loads, launch.control,
              launch.ports; torch, Megatron
Imported by:  benchmarks
Never:        checkpoint formats
Held by:      tests/unit/training, tests/e2e
"""
