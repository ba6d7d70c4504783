"""The command `mlra`, and what all command lines share: one-line errors, whole files, stop signals.

Start with parser.py; commands.py names every command's body, and imports it when it is asked for.

May import:   the standard library alone
Imported by:  every package with a command line
Never:        a tool's own flags
Held by:      tests/unit/command_line, tests/e2e/test_bad_input.py
"""
