"""Reads the file that wandb writes offline, with wandb's own message types."""

from __future__ import annotations

import json
import struct
from pathlib import Path

BLOCK = 32768
HEAD = struct.Struct("<IHB")
"""Header of a record's fragment: checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value, of the only run in `folder`."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("run-*.wandb")
    found: dict[str, dict[int, float]] = {}
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in items.items():
            if isinstance(value, int | float):
                found.setdefault(name, {})[record.history.step.num] = value
    return found


def records(data: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format, behind wandb's own header of 7 bytes."""
    at, whole, part = 7, [], b""
    while at + HEAD.size <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEAD.size:
            at += room
            continue
        _, length, kind = HEAD.unpack_from(data, at)
        part += data[at + HEAD.size : at + HEAD.size + length]
        at += HEAD.size + length
        if kind in (1, 4):
            whole.append(part)
            part = b""
    return whole
