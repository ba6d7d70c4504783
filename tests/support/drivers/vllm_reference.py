"""Exports the models that vLLM serves in tests, and writes transformers' results for them:
`python -m support.drivers.vllm_reference FOLDER` writes FOLDER/NAME and FOLDER/reference.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from support.vllm_cases import CASES, FEATURES, Reference, export, references


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {}
    for name in CASES:
        export(name, folder / name)
        found[name] = references(Reference(folder / name), name == FEATURES)
    (folder / "reference.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
