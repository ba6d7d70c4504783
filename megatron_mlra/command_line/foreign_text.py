"""Readers of untrusted JSON and YAML, with limits on size and depth, and finite numbers only.

Python's parsers recurse once per level of brackets, and read a number beyond a float's range as
infinity. YAML's aliases let a few bytes expand to many gigabytes.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from megatron_mlra.command_line.plain_file import NotPlain, open_plain

JSON_BYTES = 32 << 20
"""Most bytes of a JSON file. An index of 100,000 tensors has 10 MB."""
YAML_BYTES = 1 << 18
"""Most bytes of a YAML file. A preset has some 3 kB."""
DEPTH = 100
"""Most levels of brackets."""

# The closing quote is optional: in an unterminated string the search must not restart at every
# quote, which would take quadratic time.
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"


def read_json(file: str | Path, most: int = JSON_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: the file cannot be read, is not JSON, has more than `most` bytes or too many
            levels, or holds a number that is not finite; one line that names the file.
    """
    text = _read(Path(file), most)
    try:
        return parse_json(text, finite=True)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None


def parse_json(text: str, finite: bool = False) -> Any:
    """The value of a JSON text, of any size.

    Args:
        finite: refuse NaN, Infinity and numbers beyond a float's or 64 bits' range.

    Raises:
        ValueError: the text is not JSON, or has too many levels.
    """
    if text.count("[") + text.count("{") > DEPTH:
        depth = 0
        for found in _TOKENS.finditer(text):
            if (token := found[0]) in "[{":
                depth += 1
                if depth > DEPTH:
                    raise ValueError(f"more than {DEPTH} levels of brackets")
            elif token in "]}":
                depth -= 1
    if not finite:
        return json.loads(text)
    return json.loads(text, parse_constant=_refuse, parse_float=_float, parse_int=_int)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no number")


def _int(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"it holds {text:.30}, which has more than 64 bits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text:.30}, which is beyond a float's range")
    return value


def read_yaml(file: str | Path) -> Any:
    """The value of a YAML file without aliases, in which no key is given twice.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file cannot be read; one line without the file's name.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys given twice (PyYAML takes the last), aliases (which expand without limit)
        and tags (which may not fit their value), and reads 1:30 as text (PyYAML reads 90)."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                name = self.peek_event().anchor
                raise yaml.YAMLError(f"alias *{name:.40}: write the value out")
            tag = getattr(self.peek_event(), "tag", None)
            if tag is not None:
                raise yaml.YAMLError(f"tag {tag!r:.60}: leave it out")
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and ":" in node.value:
                node.tag = _TEXT
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    value = self.construct_object(key)
                    if value in seen:
                        raise yaml.YAMLError(f"{value} is given twice; leave one")
                    seen.add(value)
            return super().construct_mapping(node, deep)

    text = _read(Path(file), YAML_BYTES, named=False)
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError("too many levels") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # PyYAML's constructors raise TypeError, AttributeError, LookupError
        said = " ".join(str(error).split())
        raise ValueError(f"it is no YAML of a preset ({type(error).__name__}: {said})") from None


def _read(file: Path, most: int, named: bool = True) -> str:
    """The text of a plain UTF-8 file of at most `most` bytes."""
    name = f"{file}: " if named else ""
    try:
        with open_plain(file) as opened:
            data = opened.read(most + 1)
        if len(data) > most:
            raise ValueError(f"{name}it has more than {most:,} bytes")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise
    except NotPlain as error:
        raise ValueError(f"{name}{error}") from None
    except OSError as error:
        raise ValueError(f"{name}{error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}it is not UTF-8 text") from None
