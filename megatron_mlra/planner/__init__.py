"""A run before it is launched: memory, time, traffic and layouts. Arithmetic only.

Start with cli.py and report.py; memory.py and step.py hold the model of a GPU.

May import:   cost, sharding, description, command_line; rich
Imported by:  training (the dry run)
Never:        torch
Held by:      tests/unit/planner, tests/distributed/test_planner_memory.py
"""
