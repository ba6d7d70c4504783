"""Checks of files and entries that `torch.save` wrote, before torch reads them.

torch runs the code of a TorchScript archive unless `weights_only=True` is given, believes the size
of a tensor in its pickle without comparing the bytes in the file, and expands compressed records.
So the archive (a ZIP file) is checked here first, by rules that make it unambiguous: records are
uncompressed and follow one another, and the file ends with the directory.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_mlra.checkpoint.files import safe_pickle
from megatron_mlra.checkpoint.files.pickle_names import FP8_STATE, HARMLESS

DIRECTORY_BYTES = 32 << 20
"""Most bytes of an archive's directory: about 300,000 tensors."""
PICKLE_BYTES = 64 << 20
"""Most bytes of the pickle in an archive."""

_RECORDS = ("byteorder", "version", ".format_version", ".storage_alignment")
_RECORDS += ("data.pkl", ".data/serialization_id")
_LOCAL, _CENTRAL = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I")
_END, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")


class TorchFileError(ValueError):
    """A file does not hold plain tensors and values; one line without the file's name."""


class ForbiddenCode(TorchFileError):
    """A file names code, or contains code."""


@dataclass(frozen=True)
class Archive:
    """The places of an archive's records."""

    records: dict[str, tuple[int, int]]
    """Record name, without the leading name of the archive -> (offset, bytes)."""

    def sizes(self) -> dict[str, int]:
        """Key of a storage -> bytes of its record."""
        return {n[5:]: size for n, (_, size) in self.records.items() if n.startswith("data/")}


def read_archive(file: BinaryIO, size: int) -> Archive:
    """The directory of a torch archive, checked against the file.

    Raises:
        ForbiddenCode: the file is a TorchScript archive.
        TorchFileError: the file is not an archive; or its records are compressed, overlap, or go
            beyond the file.
    """
    count, start, length = _end(file, size)
    if length > min(DIRECTORY_BYTES, start + length):
        raise TorchFileError(f"an archive whose directory has {length:,} bytes")
    directory = _at(file, start, length)
    places: list[tuple[int, int, str]] = []
    at = 0
    while at < length:
        if len(places) == count or length - at < _CENTRAL.size:
            raise TorchFileError("an archive with a damaged directory")
        fields = _CENTRAL.unpack_from(directory, at)
        (signature, _, _, flags, method, _, _, _, packed, unpacked, n, m, k, *_, offset) = fields
        at += _CENTRAL.size
        name, extra = directory[at : at + n], directory[at + n : at + n + m]
        at += n + m + k
        wide = _wide(extra, (unpacked, packed, offset))
        unpacked, packed, offset = wide
        if signature != b"PK\1\2" or at > length or flags & 1:
            raise TorchFileError("an archive with a damaged directory")
        own = _text(name).partition("/")[2]
        if own.startswith("code/") or own in ("constants.pkl", "model.json"):
            raise ForbiddenCode("is a TorchScript archive, whose code is not run")
        if method or packed != unpacked:
            raise TorchFileError("an archive with compressed records")
        places.append((offset, unpacked, _text(name)))
    if len(places) != count:
        raise TorchFileError("an archive with a damaged directory")
    return Archive(_records(file, sorted(places), start))


def _end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """(number of records, offset of the directory, bytes of the directory), from the file's end."""
    if size < _END.size or _at(file, 0, 4) != b"PK\3\4":
        raise TorchFileError("no archive of torch.save, or cut short")
    here = size - _END.size
    signature, *disks, counted, count, length, start, comment = _END.unpack(
        _at(file, here, _END.size)
    )
    if signature != b"PK\5\6" or comment or any(disks) or counted != count:
        raise TorchFileError("an archive that does not end with its directory, cut short?")
    before = here - _LOCATOR.size - _END64.size
    if before >= 0 and _at(file, here - _LOCATOR.size, 4) == b"PK\6\7":
        _, _, where, _ = _LOCATOR.unpack(_at(file, here - _LOCATOR.size, _LOCATOR.size))
        signature, _, _, _, *disks, counted, count64, length64, start64 = _END64.unpack(
            _at(file, before, _END64.size)
        )
        narrow = ((count, 0xFFFF), (length, 0xFFFFFFFF), (start, 0xFFFFFFFF))
        agree = all(
            value in (full, other)
            for (value, full), other in zip(narrow, (count64, length64, start64), strict=True)
        )
        one = not any(disks) and counted == count64
        if where != before or signature != b"PK\6\6" or not (agree and one):
            raise TorchFileError("an archive with two directories")
        here, count, length, start = before, count64, length64, start64
    if start + length != here:
        raise TorchFileError("an archive that does not end with its directory, cut short?")
    return count, start, length


def _wide(extra: bytes, values: tuple[int, ...]) -> list[int]:
    """Sizes and offset of a record; 0xFFFFFFFF stands for a 64-bit number in the field `extra`."""
    found, rest = list(values), extra
    while len(rest) >= 4:
        kind, length = struct.unpack_from("<2H", rest)
        field, rest = io.BytesIO(rest[4 : 4 + length]), rest[4 + length :]
        if kind == 1:
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    found[i] = int.from_bytes(field.read(8), "little")
            break
    return found


def _records(
    file: BinaryIO, places: list[tuple[int, int, str]], end: int
) -> dict[str, tuple[int, int]]:
    """Name -> (offset, bytes) of each record, after a check of the header before its bytes."""
    records: dict[str, tuple[int, int]] = {}
    roots = {name.partition("/")[0] for *_, name in places}
    behind = 0
    for offset, length, name in places:
        own = name.partition("/")[2]
        plain = own.startswith("data/") and own.count("/") == 1
        if len(roots) != 1 or own in records or not (plain or own in _RECORDS):
            raise TorchFileError(f"an archive with the record {name!r:.60}, unknown to torch.save")
        if not behind <= offset <= end - _LOCAL.size:
            raise TorchFileError("an archive whose records lie in one another")
        fields = _LOCAL.unpack(_at(file, offset, _LOCAL.size))
        signature, method, n, m = fields[0], fields[3], fields[-2], fields[-1]
        start = offset + _LOCAL.size + n + m
        same = _at(file, offset + _LOCAL.size, n) == name.encode()
        if signature != b"PK\3\4" or method or not same:
            raise TorchFileError("an archive whose directory does not describe its records")
        behind = start + length
        if behind > end:
            raise TorchFileError("an archive whose records lie in one another")
        records[own] = (start, length)
    if "data.pkl" not in records:
        raise TorchFileError("an archive without data.pkl")
    if records["data.pkl"][1] > PICKLE_BYTES:
        raise TorchFileError(f"an archive with a pickle of {records['data.pkl'][1]:,} bytes")
    return records


def read_object(
    file: BinaryIO, size: int, harmless: frozenset[str] = HARMLESS
) -> safe_pickle.Unpickled:
    """The object that `torch.save` wrote, read without torch and without running code; tensors are
    inert.

    Raises:
        TorchFileError: see `read_archive` and `safe_pickle.load`.
    """
    archive = read_archive(file, size)
    data = _at(file, *archive.records["data.pkl"])
    try:
        return safe_pickle.load(data, archive.sizes(), harmless=harmless)
    except ValueError as error:
        raise TorchFileError(str(error)) from None


def read_extra_state(file: BinaryIO, size: int) -> tuple[str, ...]:
    """Names of code in an extra state. Transformer Engine stores its FP8 scales as a pickle inside
    a tensor of bytes, so that the pickle of each tensor is checked too.

    Raises:
        TorchFileError: see `read_archive` and `safe_pickle.load`.
    """
    allowed = HARMLESS | FP8_STATE
    refused = dict.fromkeys(read_object(file, size, allowed).refused)
    for name, (start, length) in read_archive(file, size).records.items():
        if name.startswith("data/") and length:
            if length > PICKLE_BYTES:
                raise TorchFileError(f"an extra state of {length:,} bytes")
            try:
                inside = safe_pickle.load(_at(file, start, length), harmless=allowed)
            except ValueError as error:
                raise TorchFileError(f"an extra state that is {error}") from None
            refused |= dict.fromkeys(inside.refused)
    return tuple(refused)


def check_old_file(file: BinaryIO, size: int) -> tuple[str, ...]:
    """Check a file of torch before 1.6: four pickles, then the tensors' bytes.

    Returns:
        Names that no checkpoint has.

    Raises:
        TorchFileError: the file is not of this format.
    """
    refused: dict[str, None] = {}
    try:
        for _ in range(4):  # a magic number, a version, the machine, the object
            refused |= dict.fromkeys(safe_pickle.load(file, stored=size).refused)
    except ValueError as error:
        raise TorchFileError(str(error)) from None
    return tuple(refused)


def load_tensors(path: Path) -> Any:
    """`torch.load` of a file of tensors, after its check. Archives are memory-mapped.

    Raises:
        ForbiddenCode: the file names code.
        TorchFileError: the file is damaged, or a tensor has fewer bytes than it states.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
        file.seek(0)
        refused = read_object(file, size).refused if is_archive else check_old_file(file, size)
    if refused:
        said = safe_pickle.shown(refused)
        raise ForbiddenCode(f"holds more than tensors, and is not run: {said}")
    try:
        # Files of torch before 1.6 are not archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        raise TorchFileError(f"{' '.join(str(error).split()):.200}") from None


def check_entry(file: BinaryIO, size: int) -> None:
    """Check an entry of a checkpoint's file.

    Raises:
        ForbiddenCode: the entry names code.
        TorchFileError: see `read_object`.
    """
    refused = read_object(file, size).refused
    if refused:
        raise ForbiddenCode(f"holds code, which is not run: {safe_pickle.shown(refused)}")


def load_entry(file: BinaryIO, size: int) -> Any:
    """`torch.load` of an entry of a checkpoint's file, after its check: a tensor, or values of
    classes that torch and Megatron consider safe.

    Raises:
        TorchFileError: see `check_entry`; or torch cannot load the entry.
    """
    check_entry(file, size)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TorchFileError(f"{' '.join(str(error).split()):.200}") from None


def check_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, if its storage has all its numbers.

    Raises:
        TorchFileError: the tensor has more numbers than its storage (by strides of 0), or is
            sparse, quantised or on another device than the CPU.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise TorchFileError("a tensor that is not stored number by number")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise TorchFileError(
            f"a tensor of {tensor.numel():,} numbers, of which {stored:,} bytes are stored"
        )
    return tensor


def _at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    data = file.read(length)
    if len(data) != length:
        raise TorchFileError("an archive that is cut short")
    return data


def _text(name: bytes) -> str:
    try:
        return name.decode("ascii")
    except UnicodeDecodeError:
        raise TorchFileError(f"an archive with the record {name!r:.60}") from None
