"""Megatron's log in a folder where others leave links and pipes."""

import os
import subprocess

from support import ENV

OPEN = """
import sys
from pathlib import Path
from megatron_mlra.training import console
for name in sys.argv[2:]:
    try:
        console._append(Path(sys.argv[1], name)).write("line\\n")
    except ValueError as error:
        print(error)
try:
    console.MegatronOutput(0, 1).open(Path(sys.argv[1]))
except ValueError as error:
    print(error, file=sys.__stdout__)
"""


def test_a_log_is_not_written_where_a_link_points(warm_python, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    (tmp_path / "megatron.log").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    done = subprocess.run(
        [warm_python, "-W", "ignore", "-c", OPEN, tmp_path, "megatron.log", "pipe", "plain"],
        capture_output=True, text=True, env=ENV, timeout=120,
    )  # fmt: skip
    assert victim.read_text() == "theirs" and (tmp_path / "plain").read_text() == "line\n"
    lines = [f"the log {tmp_path / name} is no plain file; remove it, or use another --save"
             for name in ("megatron.log", "pipe", "megatron.log")]  # fmt: skip
    assert done.stdout.splitlines() == lines, done.stderr
