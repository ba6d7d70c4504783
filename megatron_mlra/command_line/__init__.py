"""The command `mlra`, and what all command lines share: one-line errors, whole files, stop signals.

Start with parser.py; commands.py lists the commands, and imports the body of the one that runs.

May import:   the standard library alone
Imported by:  every package with a command line
Never:        a tool's own flags
Held by:      tests/unit/command_line, tests/e2e/test_bad_input.py
"""
