"""The definition of the attention in plain torch; all other implementations are compared with it.

Start with attention.py (mlra_attention, steps 1 to 6 of the paper).

May import:   nothing of the package; torch
Imported by:  layers, inference, checkpoint, training
Never:        Megatron, sharding, kernels
Held by:      tests/unit/maths, against the loop-per-head oracle of tests/support
"""
