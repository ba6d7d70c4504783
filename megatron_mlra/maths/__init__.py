"""How the attention is computed: the definition in plain torch, to which all else is held.

Start with attention.py (mlra_attention, steps 1 to 6 of the paper).

May import:   nothing of the package; torch
Imported by:  layers, inference, checkpoint, training
Never:        Megatron, sharding, kernels
Held by:      tests/unit/maths, against the loop-per-head oracle of tests/support
"""
