"""The two distributions as wheels, installed into environments that share nothing with the checkout
but the third-party packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch

from support import ROOT

THIRD_PARTY = Path(torch.__file__).parents[1]
MADE = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
OURS = ("megatron_mlra", "mlra_kernels", "mlra_vllm", "__editable__")


def build_wheels(folder: Path) -> Path:
    """Build both wheels from a copy of the sources; returns the folder that holds them."""
    source = folder / "source"
    for name in ("megatron_mlra", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=MADE)
    (source / "docs").mkdir()
    for name in ("pyproject.toml", "LICENSE", "docs/package.md"):
        shutil.copy(ROOT / name, source / name)
    pip(
        *(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", folder / "wheels", source, source / "kernels"),
    )
    return folder / "wheels"


class Environment:
    """A virtual environment with some wheels, and links to third-party packages."""

    def __init__(self, folder: Path, wheels: list[Path], without: tuple[str, ...] = ()) -> None:
        venv.EnvBuilder(with_pip=False).create(folder)
        self.bin = folder / "bin"
        python = self.bin / "python"
        pip(sys.executable, "--python", python, "install", "--no-deps", "--no-index", *wheels)
        (packages,) = folder.glob("lib/*/site-packages")
        for path in THIRD_PARTY.iterdir():
            name = path.name.replace("-", "_")
            if not name.startswith((*OURS, *without)) and not (packages / path.name).exists():
                (packages / path.name).symlink_to(path)

    def run(self, *command: object, cwd: Path) -> subprocess.CompletedProcess:
        """Run a program of the environment in a folder."""
        program, *rest = map(str, command)
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env["PATH"] = f"{self.bin}{os.pathsep}{env['PATH']}"
        return subprocess.run(
            [self.bin / program, *rest], capture_output=True, text=True, env=env, cwd=cwd
        )


def pip(python: object, *argv: object) -> None:
    """Run pip, quietly."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*command, *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
