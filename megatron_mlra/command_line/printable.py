"""Texts of files and of other hosts on a terminal: shown, and never obeyed."""

from __future__ import annotations


def printable(text: str, kept: str = "") -> str:
    """`text` with what is no printable letter written as Python escapes it: line ends, a terminal's
    commands (ESC), letters that turn the direction of a line, halves of a UTF-16 pair.

    Args:
        kept: letters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape").decode()
        for each in text
    )
