"""The planner: memory, time, traffic and layouts of a run before its launch. Arithmetic only.

Start with cli.py and report.py. memory.py and step.py model a GPU's memory and a step's time.

May import:   cost, sharding, description, command_line; rich
Imported by:  training (the dry run)
Never:        torch
Held by:      tests/unit/planner, tests/distributed/test_planner_memory.py
"""
