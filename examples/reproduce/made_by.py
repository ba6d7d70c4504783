"""Which commands the files of a folder come of. A stage whose file is there is skipped, so a file
that other flags made would pass for that of this call."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from megatron_mlra.command_line.parser import write_json

COMMANDS = "commands.json"
"""File of a folder: a stage's file -> the commands that it comes of, each a list of words."""

Commands = list[list[str]]


def flags_of(
    command: list[str], places: dict[str, str], without: Collection[str] = ()
) -> list[str]:
    """A command from its first flag on, in words that stay where folders are moved.

    Args:
        places: path -> the word that stands for it.
        without: flags that are left out with their values.
    """
    first = next(i for i, word in enumerate(command) if word.startswith("--"))
    words, left_out = [], False
    for word in command[first:]:
        if word.startswith("--"):
            left_out = word in without
        if not left_out:
            for place in sorted(places, key=len, reverse=True):
                word = word.replace(place, places[place])
            words.append(word)
    return words


def begin(folder: Path, wanted: dict[str, Commands], fix: str) -> None:
    """Refuse a folder with files of other commands, and write `COMMANDS`.

    Args:
        wanted: a stage's file or folder in `folder` -> the commands that it comes of.
        fix: what to do, for the message.

    Raises:
        ValueError: a stage was begun by another command; names what it left and one difference.
    """
    note = folder / COMMANDS
    begun = json.loads(note.read_text()) if note.is_file() else {}
    for name, commands in wanted.items():
        made = folder / name
        if made.exists() and (old := begun.get(name)) != commands:
            what = _difference(old, commands) if old else f"flags that {COMMANDS} does not tell"
            raise ValueError(f"{made} was made with {what}; {fix}")
    write_json(note, begun | wanted, indent=1)


def _difference(old: Commands, new: Commands) -> str:
    """The first flag whose values differ, with both."""
    before, now = _values(old), _values(new)
    name = next(name for name in before | now if before.get(name) != now.get(name))
    return f"{name} {before.get(name, 'left out')}, not {now.get(name, 'left out')}"


def _values(commands: Commands) -> dict[str, str]:
    """Flag -> its values in one text."""
    found: dict[str, str] = {}
    for word in (word for words in commands for word in words):
        if word.startswith("--"):
            name, found[word] = word, ""
        else:
            found[name] = f"{found[name]} {word}".lstrip()
    return found
