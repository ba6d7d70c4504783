"""Benchmarks: training steps, decoding steps, CPU rates, and losses of runs side by side.

Start with training/cli.py, decoding/cli.py, cpu.py and losses.py; tools/ has a thin shell for
each.

May import:   training, inference, layers, cost, checkpoint, description, command_line,
              mlra_kernels; torch, Megatron
Imported by:  nothing of the package
Never:        a measurement inside a test; a figure without its GPU, versions and commit
Held by:      tests/unit/benchmarks, tests/gpu
"""
