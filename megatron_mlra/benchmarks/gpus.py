"""The GPUs of this machine, as nvidia-smi lists them."""

from __future__ import annotations

import os
import subprocess


def listed_gpus(*fields: str) -> list[list[str]]:
    """Fields of each GPU that nvidia-smi lists; where CUDA_VISIBLE_DEVICES is set, of the GPUs that
    it lists by index, in its order. Empty without nvidia-smi.

    Args:
        fields: of `nvidia-smi --query-gpu`; the first is `index`.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES names something else.
    """
    asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    by_index = {line.split(", ")[0]: line.split(", ") for line in listed.splitlines()}
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(by_index.values())
    indices = [each.strip() for each in chosen.split(",") if each.strip()]
    if strange := [index for index in indices if index not in by_index]:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={chosen}: {strange[0]} is not one of {', '.join(by_index)};"
            " list GPUs by the index that nvidia-smi shows"
        )
    return [by_index[index] for index in indices]
