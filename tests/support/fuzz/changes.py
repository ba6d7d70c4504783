"""Changes of values, trees, texts and bytes, by a seeded generator."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 10**12, 2**31 - 1, 2**63, -(2**63), 10**400),
    *(0.5, -0.0, 1e12, 1e308, 5e-324),
    *(math.nan, math.inf, -math.inf, "", "1", "true", "NaN", "../x", "/etc/passwd", "a\nb", "\0"),
    *("é" * 300, "x" * 70_000, [], [1], [[]], {}, {"a": 1}, None, True, False, "\ud800", "float32"),
)
"""Values that replace a number, a text or a list."""

INTEGERS = (0, 1, 2, 3, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def value(rng: random.Random, old: Any = None) -> Any:
    """A value in place of `old`."""
    number = isinstance(old, int | float) and not isinstance(old, bool)
    if number and math.isfinite(old) and rng.random() < 0.5:
        steps = (old + 1, old - 1, old * 2, -old, old // 2, old * 1000, old + 0.5, str(old), [old])
        return rng.choice(steps)
    if isinstance(old, str) and rng.random() < 0.4:
        return rng.choice((old + "x", old[:-1], old.upper(), [old], f" {old}", old * 100))
    if isinstance(old, list) and rng.random() < 0.4:
        return rng.choice((old[:-1], old * 2, old[::-1], [old], old * 5000))
    return copy.deepcopy(rng.choice(VALUES))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a tree of dictionaries and lists."""
    found, waiting = [], [tree]
    while waiting:
        item = waiting.pop()
        keys = (
            item if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        )
        for key in keys:
            found.append((item, key))
            waiting.append(item[key])
    return found


def tree(rng: random.Random, root: Any) -> Any:
    """A copy of a tree with one place changed: its value replaced, the place deleted, its key
    renamed or doubled, or an item inserted."""
    root = copy.deepcopy(root)
    there = places(root)
    if not there or rng.random() < 0.04:
        return value(rng, root)
    # Half of the changes are near the root, which tools read most.
    where, key = rng.choice(there[: max(1, len(there) // 8)] if rng.random() < 0.5 else there)
    what = rng.random()
    if what < 0.6:
        where[key] = value(rng, where[key])
    elif what < 0.8:
        del where[key]
    elif isinstance(where, dict):
        new = rng.choice((f"{key}x", "", "__proto__", "é" * 40, str(key).upper()))
        where[new] = where[key] if rng.random() < 0.5 else where.pop(key)
    else:
        where.insert(key, copy.deepcopy(rng.choice(VALUES)))
    return root


def json_text(rng: random.Random, text: str) -> bytes:
    """A changed JSON text: mostly one place of the tree, sometimes a doubled key, deep nesting or
    other bytes, which no tree can express."""
    what = rng.random()
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):  # changed before
        return data(rng, text.encode())
    if what < 0.75:
        return json.dumps(tree(rng, root)).encode()
    if what < 0.82 and isinstance(root, dict) and root:
        key = rng.choice(list(root))
        again = json.dumps({key: value(rng, root[key])})
        return (again[:-1] + ", " + text.lstrip()[1:]).encode()
    if what < 0.88:
        depth = rng.choice((50, 101, 2000, 200_000))
        deep = "[" * depth + "]" * depth
        key = json.dumps(next(iter(root), "a")) if isinstance(root, dict) else '"a"'
        return rng.choice((deep, f"{{{key}: {deep}}}", f"{{{key}: {'[' * depth}")).encode()
    return data(rng, text.encode())


def data(rng: random.Random, old: bytes) -> bytes:
    """Changed bytes: emptied, cut off, flipped, overwritten, inserted, repeated, of another
    encoding, or random."""
    size = len(old)
    at = rng.randrange(size) if size else 0
    what = rng.randrange(9)
    if what == 0 or not size:
        return b""
    if what == 1:
        return old[:at]
    if what == 2:
        changed = bytearray(old)
        for _ in range(rng.choice((1, 1, 4, 64))):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if what == 3:
        extreme = rng.choice(INTEGERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
        return old[:at] + extreme + old[at + len(extreme) :]
    if what == 4:
        return old[:at] + rng.randbytes(rng.choice((1, 8, 100))) + old[at:]
    if what == 5:
        return old + rng.choice((b"\0", b"x" * 1000, old))
    if what == 6:
        return old[:at] + b"\xff\xfe\x80" + old[at + 3 :]
    if what == 7:
        return rng.choice((b"\xef\xbb\xbf" + old, b"\xff\xfe" + b"\0a" * 20, b"\0" * size))
    return rng.randbytes(min(size, 4096))
