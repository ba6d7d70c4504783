"""Benchmarks: training steps, decoding steps, training on a CPU, and losses of several runs.

Start with training/cli.py, decoding/cli.py, cpu.py and losses.py.

May import:   training, inference, evaluation (streams), layers, cost, checkpoint, data
              (prefixes), description, command_line, fault_tolerance.handshake,
              fault_tolerance.fingerprint, mlra_kernels; torch, Megatron
Imported by:  nothing of the package
Never:        a measurement inside a test; a result without GPU, versions and commit
Held by:      tests/unit/benchmarks, tests/gpu
"""
