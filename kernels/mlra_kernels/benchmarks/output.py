"""Files that a benchmark writes at its end: checked, and their folders made, before it starts."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def output_file(name: str) -> str:
    """An argparse type: the name of a file that can be written, in a folder made where missing."""
    path = Path(name)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{name} is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{name} is no plain file; name another")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{name}: the folder {path.parent} cannot be made ({error.strerror})"
        raise argparse.ArgumentTypeError(said) from None
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        said = f"{name}: the folder {path.parent} cannot be written ({error.strerror})"
        raise argparse.ArgumentTypeError(said) from None
    return name
