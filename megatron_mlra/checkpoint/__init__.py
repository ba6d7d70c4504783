"""Checkpoints: folders of every format behind one interface, and conversion between them.

Start with formats.py (which kind of folder this is), folder.py (the interface) and rules.py (how
one tensor is stored elsewhere).

May import:   description, maths, cost, data, command_line; torch, and the file format of
              torch.distributed.checkpoint
Imported by:  fault_tolerance, inference, evaluation, benchmarks
Never:        Megatron modules: a conversion needs no process group
Held by:      tests/unit/checkpoint, tests/e2e/test_converted.py
"""
