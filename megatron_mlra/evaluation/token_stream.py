"""A whole dataset as one stream of tokens, cut into windows that predict each token once.

Documents follow one another in the order of the dataset, without separation, as in training. Order
and windows depend only on the dataset and the length of a window: two models scored on one dataset
make the same predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_mlra.data.index import read_index
from megatron_mlra.data.prefixes import check_files


def named_sets(values: list[str] | None, flag: str = "--held-out") -> dict[str, str]:
    """Name -> prefix, of a flag's values NAME=PREFIX or PREFIX; the latter is named by its last
    part.

    Raises:
        ValueError: a name is given twice.
    """
    sets: dict[str, str] = {}
    for value in values or ():
        name, equals, prefix = value.partition("=")
        name, prefix = (name, prefix) if equals else (Path(value).name, value)
        if name in sets:
            raise ValueError(f"{flag} names {name} twice; use NAME=PREFIX with other names")
        sets[name] = prefix
    return sets


def read_stream(prefix: str | Path) -> np.ndarray:
    """All tokens of an indexed dataset `PREFIX.bin`, `PREFIX.idx`, in the order of its index.

    Raises:
        ValueError: the dataset is missing, damaged or empty; the line names the file and the fix.
    """
    check_files(str(prefix), "dataset")
    return np.fromfile(f"{prefix}.bin", read_index(str(prefix)).token_type)


def windows(tokens: np.ndarray, first: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets), each `[length]` int64; the last pair may be shorter.

    Args:
        tokens: the stream; each token is a target once.
        first: id that precedes the stream, the end of a document.
        length: tokens per window.
    """
    stream = np.concatenate(([first], tokens)).astype(np.int64)
    for start in range(0, len(tokens), length):
        yield stream[start : start + length][: len(tokens) - start], stream[start + 1 :][:length]
