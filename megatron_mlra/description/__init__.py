"""The description of a model: sizes, names and shapes of tensors, Megatron's arguments, presets.

Start with model.py (ModelDescription).

May import:   command_line; nothing else of the package, no torch, no Megatron
Imported by:  every package but maths, data and hf
Never:        storage, sharding or execution of a model
Held by:      tests/unit/description
"""
