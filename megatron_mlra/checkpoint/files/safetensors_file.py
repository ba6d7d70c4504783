"""Check of a safetensors file's header, before the library reads the file.

The library checks that the tensors' bytes are in the file and follow one another. It does not limit
the memory that a header takes.
"""

from __future__ import annotations

from pathlib import Path

HEADER_BYTES = 32 << 20
"""Most bytes of a header: about 250,000 tensors."""


def check_safetensors(file: Path) -> None:
    """Check the length of the header.

    Raises:
        ValueError: the header is longer than the file, or has more than `HEADER_BYTES`.
        OSError: the file cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if size < 8 or header > size - 8:
        raise ValueError(f"its header has {header:,} bytes and the file {size:,}")
    if header > HEADER_BYTES:
        raise ValueError(f"its header has {header:,} bytes, of at most {HEADER_BYTES:,}")
