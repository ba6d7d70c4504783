"""Text from files and other hosts, made safe to print on a terminal."""

from __future__ import annotations


def printable(text: str, kept: str = "") -> str:
    """`text` with every unprintable letter as a Python escape: line ends, control sequences of
    terminals (ESC), marks of text direction, lone surrogates.

    Args:
        kept: letters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )


def size(count: float) -> str:
    """Bytes for a person: '12.3 GB', '1.3 MB', '0 kB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e3:,.0f} kB"
