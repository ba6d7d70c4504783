"""Megatron modules: the attention as a TransformerLayer submodule, and layers that hold it.

Start with attention.py (the forward), config.py (every field) and specs.py (block_spec).

May import:   maths, sharding, description, mlra_kernels; torch, Megatron, Transformer Engine in
              transformer_engine.py alone
Imported by:  training, benchmarks
Never:        checkpoint folders, training flags
Held by:      tests/unit/layers, tests/distributed/test_parity.py
"""
