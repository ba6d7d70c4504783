"""Hundreds of inputs that are nearly right, through every tool that reads such a thing.

The outcome of each is a right result, or one line and exit code 2: no traceback, no hang, no memory
beyond bounds, nothing half written, nothing changed outside the output folder. More of them:
`pytest tests/fuzz --fuzz-inputs 5000 --fuzz-seed 7`; one by hand: `python -m support.fuzz`.
"""

from __future__ import annotations

import subprocess

from support import ENV


def test_every_input_is_read_or_refused_in_one_line(request, warm_python):
    inputs = request.config.getoption("--fuzz-inputs")
    seed = request.config.getoption("--fuzz-seed")
    command = [warm_python, "-W", "ignore", "-m", "support.fuzz"]
    command += ["--inputs", str(inputs), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert f"{inputs} inputs" in done.stdout and done.stdout.endswith("bad = 0\n")
