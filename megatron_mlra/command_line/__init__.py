"""What all command lines share: one-line errors, whole files, a quiet end, stop signals.

Start with parser.py.

May import:   the standard library alone
Imported by:  every package with a command line
Never:        a tool's own flags
Held by:      tests/unit/data, tests/e2e/test_bad_input.py
"""
