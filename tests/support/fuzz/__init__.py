"""Inputs that are nearly right, through every tool that reads such a thing.

`python -m support.fuzz --inputs 1000 --seed 7` makes and tries them; one line per fault.

bases.py: honest inputs of every kind. changes.py: what is changed in text, bytes and trees.
edits.py: changes that know a format. tools.py: which tools read a kind of input. judge.py: what a
tool may do. runner.py: one process per input, with limits.
"""
