"""Costs of a model from its dimensions alone: parameters, FLOPs, KV cache, traffic. Pure Python.

Start with parameters.py.

May import:   description, sharding.partition
Imported by:  planner, checkpoint, training, benchmarks
Never:        torch, so that a run can be priced on any machine
Held by:      tests/unit/cost
"""
