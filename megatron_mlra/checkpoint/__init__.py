"""Checkpoints: folders of every format behind one interface, and conversion between them.

Start with formats.py (tells the formats apart), folder.py (their interface) and rules.py (how one
format stores a tensor of another).

May import:   description, maths, cost, data, command_line; torch, and the file format of
              torch.distributed.checkpoint
Imported by:  fault_tolerance, inference, evaluation, benchmarks
Never:        Megatron modules: a conversion needs no process group
Held by:      tests/unit/checkpoint, tests/e2e/test_converted.py
"""
