"""The pieces of a queue file, checked. queue.yaml explains their fields."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

_WORDS, _NUMBER = ({str}, "text"), {int, float}
KINDS = {
    "name": _WORDS, "command": _WORDS, "writes": _WORDS, "gpus": ({int}, "a whole number"),
    "estimated_seconds": (_NUMBER, "a number"), "vllm": ({bool}, "true or false"),
    "timeout": (_NUMBER | {type(None)}, "a number"),
}  # fmt: skip
"""Field of a piece -> its types, and what to give."""


@dataclass(frozen=True)
class Piece:
    """An entry of queue.yaml, which explains the fields."""

    name: str
    gpus: int
    estimated_seconds: float
    command: str
    writes: str = "result.json"
    vllm: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a field of another kind, and for a command that starts nothing."""
        for key, (types, what) in KINDS.items():
            value = getattr(self, key)
            below = isinstance(value, int | float) and not value >= 0
            if type(value) not in types or below:
                raise ValueError(f"{key} of piece {self.name} is {value!r:.60}; give {what}")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"a piece is named {self.name!r:.60}, and files after it; give a word")
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"command of piece {self.name}: {error}") from None
        if all("=" in word for word in words):
            raise ValueError(
                f"command of piece {self.name} is {self.command!r:.60}; name a program"
            )

    def started_by(self, python: str, folder: Path) -> tuple[list[str], dict[str, str]]:
        """The words that run the command in `python`, and the variables that it sets."""
        words, env = shlex.split(self.command), {}
        while "=" in words[0]:
            name, _, env[name] = words.pop(0).partition("=")
        mlra = ["-m", "megatron_mlra.command_line"]
        if "--no-python" in words:
            at = words.index("--no-python")
            words[at : at + 2] = mlra
        programs = {"mlra": mlra, "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
        if words[0] in ("python", *programs):
            words[:1] = [python, *programs.get(words[0], ())]
        paths = {"{json}": str(folder / self.writes), "{folder}": str(folder)}
        return [paths.get(word, word) for word in words], env


def read_queue(file: Path, only: Sequence[str] | None = None) -> list[Piece]:
    """The pieces of a queue, or those named.

    Raises:
        ValueError: the file or a name is wrong; one line.
    """
    try:
        found = [Piece(**entry) for entry in yaml.safe_load(file.read_text())["pieces"]]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        known = ", ".join(field.name for field in fields(Piece))
        said = " ".join(str(error).split())
        raise ValueError(f"queue {file}: {said}; a piece may have {known}") from None
    names = [piece.name for piece in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"queue {file}: two pieces are named {twice[0]}; name one otherwise")
    if unknown := [name for name in only or () if name not in names]:
        raise ValueError(f"--only {unknown[0]} is no piece; choose of {', '.join(names)}")
    return [piece for piece in found if not only or piece.name in only]
