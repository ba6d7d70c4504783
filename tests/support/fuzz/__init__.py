"""Runs every tool on inputs that are nearly right.

`python -m support.fuzz --inputs 1000 --seed 7` makes and tries the inputs; one line per fault.

bases.py writes honest inputs of every kind. changes.py changes values, texts and bytes of any
format. edits.py, checkpoint_edits.py and text_edits.py change what a format's reader trusts;
pick.py draws the file. tools.py says which tools read a kind of input. judge.py says whether a
tool's answer is right. runner.py runs one process per input, with limits.
"""
