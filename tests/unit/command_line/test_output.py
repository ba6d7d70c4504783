"""Standard output and error whose reader leaves, of a tool and of a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support import ENV

SAYS = """
import sys
from megatron_mlra.command_line.output import guard
from megatron_mlra.command_line.parser import run, say
def main():
    for i in range(3):
        print("x" * 10**5)
        say("y" * 10**5)
        print("e", file=sys.stderr, flush=True)
    open("done", "x").close()
if sys.argv[1] == "tool":
    run(main)
guard(ending=False)
main()
"""


@pytest.mark.parametrize(
    ("program", "redirected", "code", "goes_on"),
    [
        ("tool", "| head -n 0", 141, False),
        ("tool", ">/dev/full", 1, False),
        ("tool", "2>&1 | head -n 0", 141, False),
        ("tool", "2>/dev/full | cat >/dev/null", 0, True),
        ("tool", ">&- 2>&-", 0, True),
        ("run", "| head -n 0", 0, True),
        ("run", ">/dev/full 2>/dev/full", 0, True),
        ("run", "2>&1 | head -n 0", 0, True),
        ("run", ">&- 2>&-", 0, True),
    ],
)
def test_a_reader_that_leaves(program, redirected, code, goes_on, tmp_path):
    shell = ["bash", "-c", f'"$@" {redirected}; exit "${{PIPESTATUS[0]}}"', "bash"]
    done = subprocess.run(
        [*shell, sys.executable, "-c", SAYS, program],
        capture_output=True, text=True, env=ENV, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == code and (tmp_path / "done").exists() == goes_on
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_what_is_printed_at_once_stays_so(flags):
    code = "import os, sys\nfrom megatron_mlra.command_line.output import guard\n"
    code += "guard(ending=False)\nguard(ending=False)\nprint('out')\n"
    code += "print('err', file=sys.stderr)\nos._exit(0)"
    env = {name: value for name, value in ENV.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=env
    )
    assert (done.stdout, done.stderr) == ("out\n" if flags else "", "err\n")
