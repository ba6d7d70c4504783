"""What a model is: one description, its tensors' names and shapes, Megatron's arguments, presets.

Start with model.py (ModelDescription).

May import:   command_line; nothing else of the package, no torch, no Megatron
Imported by:  every package but maths, data and hf
Never:        how a model is stored, sharded or run
Held by:      tests/unit/description
"""
