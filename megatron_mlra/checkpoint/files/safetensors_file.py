"""The header of a safetensors file, compared with the file before the library reads it.

The library checks that the tensors' bytes are there and lie one behind the other; how much memory a
header takes is left to its reader.
"""

from __future__ import annotations

from pathlib import Path

HEADER_BYTES = 32 << 20
"""Most bytes of a header: some 250,000 tensors."""


def check_safetensors(file: Path) -> None:
    """Raises:
    ValueError: the header is longer than the file, or than any model needs.
    OSError: the file cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if size < 8 or header > size - 8:
        raise ValueError(f"its header has {header:,} bytes and the file {size:,}")
    if header > HEADER_BYTES:
        raise ValueError(f"its header has {header:,} bytes, of at most {HEADER_BYTES:,}")
