"""A corpus of English and code from the files of every Python installation: nothing to download.

Its documents are the standard library's sources, the topics of the language reference that `help()`
shows, and the docstrings of modules written in C, which are in no Python source file.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import random
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mlra.command_line.parser import replacing

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "encodings",  # tables of code points
        "idle_test",
        "lib2to3",
        "pydoc_data",  # `_topics` makes a document of each of its topics
        "site-packages",
        "dist-packages",
        "test",
        "tests",
    }
)
_SKIPPED_PREFIX = "_sysconfigdata"  # how this Python was built: paths and compiler flags


@dataclass(frozen=True)
class CorpusSize:
    """What was written."""

    documents: int
    """Lines of the file."""
    text_bytes: int
    """UTF-8 bytes of all texts: the number of byte-level tokens without ends of documents."""


def write_demo_corpus(path: str | os.PathLike[str], max_bytes: int, seed: int = 0) -> CorpusSize:
    """Write the corpus as JSON lines ``{"text": ...}``, replacing ``path``.

    Documents are shuffled, so that a cut anywhere, as Megatron's ``--split`` makes one, leaves the
    same mixture of documents on both sides. No document appears twice.

    Args:
        path: the .jsonl file.
        max_bytes: most bytes of text; writing stops before the first document that exceeds it.
        seed: of the shuffle.

    Raises:
        ValueError: the first document has more than ``max_bytes``.
        OSError: writing failed; no part of the file is left.
    """
    documents = _documents()
    random.Random(seed).shuffle(documents)
    count = size = 0
    with replacing(path) as partial:
        with partial.open("x", encoding="utf-8") as file:
            for text in documents:
                length = len(text.encode("utf-8"))
                if size + length > max_bytes:
                    break
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count += 1
                size += length
        if count == 0:
            raise ValueError(f"{max_bytes} bytes hold no document: allow more")
    return CorpusSize(documents=count, text_bytes=size)


def _documents() -> list[str]:
    """All documents in a fixed order, each once."""
    unique: dict[bytes, str] = {}
    for texts in (_sources(), _topics(), _docstrings()):
        for text in texts:
            text = text.strip()
            if text:
                unique.setdefault(hashlib.sha256(text.encode("utf-8")).digest(), text + "\n")
    return list(unique.values())


def _sources() -> Iterator[str]:
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIX):
                with tokenize.open(os.path.join(folder, name)) as file:
                    yield file.read()


def _topics() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name]


def _docstrings() -> Iterator[str]:
    """One document per module compiled into the interpreter: the docstrings of the module and of
    its members."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for member, value in sorted(vars(module).items()):
            if member.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            docstring = inspect.getdoc(value)
            if docstring:
                parts.append(f"{name}.{member}\n\n{docstring}")
        yield "\n\n".join(parts)
