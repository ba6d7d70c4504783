"""The programs (`mlra`, ...) that an installation puts beside Python."""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from support import ROOT


@functools.cache
def program(name: str) -> Path:
    """The program of this name beside this Python. If the package is imported from a checkout
    without an installation, a script with the content that pip would write."""
    installed = Path(sys.executable).parent / name
    if installed.exists():
        return installed
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[name].partition(":")
    folder = Path(tempfile.mkdtemp(prefix="programs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = folder / name
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n"
        f'if __name__ == "__main__":\n    sys.exit({function}())\n'
    )
    script.chmod(0o755)
    return script
