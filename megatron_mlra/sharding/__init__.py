"""Which tensor-parallel rank owns which heads and latents, and what ranks send.

Start with partition.py (a rank's rectangle of branches and heads).

May import:   description, mlra_kernels; torch, and Megatron's collectives in tensor_parallel.py
              alone
Imported by:  layers, cost, planner, inference, training
Never:        layers: a module is told its shard, it does not ask
Held by:      tests/distributed/test_parity.py, tests/unit/layers
"""
