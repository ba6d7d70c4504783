"""Files that a benchmark writes at its end: checked, and their folders made, before it starts."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def output_file(name: str) -> str:
    """An argparse type: the name of a file that can be written, in a folder made where missing."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{name}: the folder {path.parent} cannot be made ({error.strerror})"
        raise argparse.ArgumentTypeError(said) from None
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name}: the folder {path.parent} cannot be written")
    return name
