"""Finds a Python that has vLLM and this project's plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "MLRA_VLLM"
FOLDER = ".venv-vllm"
MAKE_ONE = (
    f"make one: python3 -m venv {FOLDER} && {FOLDER}/bin/pip install"
    " './kernels[vllm]' (in the project's checkout), or name one by --python"
)
_ASK = (
    "import importlib.util as u, sys;"
    "sys.exit(0 if all(map(u.find_spec, ('vllm', 'mlra_vllm'))) else 3)"
)


def find_python(named: str | None, folders: list[Path]) -> str:
    """The Python to serve with.

    Args:
        named: value of `--python`: a Python, or the folder of its environment.
        folders: folders in which a `.venv-vllm` is looked for, in order.

    Raises:
        ValueError: no Python is found, or the named one lacks vLLM or the plugin.
    """
    variable = os.environ.get(VARIABLE)
    for flag, value in (("--python", named), (VARIABLE, variable)):
        if value:
            python = _python_of(Path(value))
            if python is None or not _serves(python):
                raise ValueError(
                    f"{flag} {value} is no Python with vLLM and this project's plugin; {MAKE_ONE}"
                )
            return python
    for folder in folders:
        python = _python_of(folder / FOLDER)
        if python is not None and _serves(python):
            return python
    if _serves(sys.executable):
        return sys.executable
    raise ValueError(f"no Python with vLLM and this project's plugin was found; {MAKE_ONE}")


def _python_of(path: Path) -> str | None:
    path = path / "bin" / "python" if path.is_dir() else path
    return str(path.absolute()) if os.access(path, os.X_OK) and path.is_file() else None


def _serves(python: str) -> bool:
    done = subprocess.run([python, "-c", _ASK], capture_output=True, cwd="/")
    return done.returncode == 0
