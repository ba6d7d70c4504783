"""Sharding: which tensor-parallel rank owns which heads and latents, and the ranks' collectives.

Start with partition.py (a rank's branches and heads) and placement.py (the table of all weights).

May import:   description, mlra_kernels; torch, and Megatron's collectives in tensor_parallel.py
              alone
Imported by:  layers, cost, planner, inference, training
Never:        layers: a module receives its shard as an argument
Held by:      tests/distributed/test_parity.py, tests/unit/layers
"""
