"""What a model costs, from its dimensions alone: parameters, FLOPs, KV cache, traffic. Pure Python.

Start with parameters.py.

May import:   description, sharding.partition
Imported by:  planner, checkpoint, training, benchmarks
Never:        torch: a planner prices a run anywhere
Held by:      tests/unit/cost
"""
