"""Reads untrusted pickles: no code runs, and memory is bounded by the size of the file.

A pickle is a program of one-byte operations that names functions to call. Only the few classes that
checkpoints consist of (pickle_names.py) are made here. Every other name becomes an inert object;
names that no checkpoint has are listed. All else is left to Python's unpickler written in Python.
Unlike the one in C it keeps its memo in a dictionary, so that a memo index of 2^31 allocates
nothing.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PosixPath
from typing import Any, BinaryIO, ClassVar

import torch
from torch.distributed.checkpoint import metadata

from megatron_mlra.checkpoint.files.pickle_calls import (
    ATOMS,
    Inert,
    Named,
    check_build,
    check_call,
    rebuilt_from,
    row_of_bytes,
)
from megatron_mlra.checkpoint.files.pickle_names import BUILT, CALLED, DTYPES, HARMLESS, STORAGES

OPERATIONS = 20_000_000
"""Most operations of a pickle; the index of a checkpoint needs about 75 per stored block."""
EXPANDED = 1_000_000
"""Most values of a pickle besides 8 per operation; a shared value counts at each appearance."""
DEPTH = 100
"""Most levels of nested containers."""
NAMES_SHOWN = 20


@dataclass(frozen=True)
class _Storage:
    """Stands for a class of tensor storage."""

    name: str
    itemsize: int


@dataclass(frozen=True)
class Unpickled:
    """The content of a pickle."""

    value: Any
    refused: tuple[str, ...]
    """Names of classes and functions that no checkpoint has, each once, in the order found."""


def load(
    file: BinaryIO | bytes,
    records: Mapping[str, int] | None = None,
    stored: int = 0,
    harmless: frozenset[str] = HARMLESS,
) -> Unpickled:
    """Read the next pickle of `file`. No code runs; objects of other classes are Inert.

    Args:
        records: key -> bytes of each `data/` record beside the pickle; each storage must have
            exactly the bytes of its record.
        stored: most bytes of a storage if there are no records.
        harmless: names of classes and functions that are not listed in `refused`.

    Raises:
        ValueError: the pickle is damaged, or would take more memory or time than its size allows.
    """
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    reader = _Reader(source, records, stored, harmless)
    try:
        value = reader.load()
    except ValueError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"no pickle ({type(error).__name__} {said:.100})") from None
    _check_expanded(value, EXPANDED + 8 * reader.operations)
    return Unpickled(value, tuple(reader.refused))


class _Reader(pickle._Unpickler):
    """An unpickler that makes only plain values and objects of the known classes."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: BinaryIO,
        records: Mapping[str, int] | None,
        stored: int,
        harmless: frozenset[str],
    ) -> None:
        super().__init__(file)
        self.records, self.stored, self.harmless = records, stored, harmless
        self.operations = self.spent = 0
        self.refused: dict[str, None] = {}

    def load(self) -> Any:
        unframer = pickle._Unframer(self._file_read, self._file_readline)
        self.read, self.readline = unframer.read, unframer.readline
        self._unframer = unframer
        self.stack, self.metastack = [], []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            for self.operations in range(1, OPERATIONS + 1):
                key = read(1)
                if not key:
                    raise ValueError("a pickle that ends too early")
                dispatch[key[0]](self)
        except pickle._Stop as stop:
            return stop.value
        raise ValueError(f"a pickle of more than {OPERATIONS:,} operations")

    # -- names -------------------------------------------------------------------------------------

    def find_class(self, module: str, name: str) -> Any:
        """The known class, or a Named in its place."""
        at = (module, name)
        if at in STORAGES:
            return _Storage(name, STORAGES[at])
        for known in (BUILT, CALLED, DTYPES):
            if at in known:
                return known[at]
        full = f"{module}.{name}"
        if full not in self.harmless:
            self.refused[full if full.isprintable() else repr(full)] = None
            return Named()
        return Named(full)

    def get_extension(self, code: int) -> None:
        raise ValueError("a pickle with an extension code")

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage; its size must be that of the record that holds its bytes."""
        plain = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"
        if not plain or not isinstance(pid[1], _Storage):
            raise ValueError("a pickle that refers to something beside tensors")
        _, kind, key, _, count = pid[:5]
        if type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("a tensor without a record")
        size = count * kind.itemsize
        if self.records is None:
            if size > self.stored:
                raise ValueError(f"a tensor of {size:,} bytes, in a file of {self.stored:,}")
        elif self.records.get(key) != size:
            found = self.records.get(key)
            said = "has no record" if found is None else f"has a record of {found:,}"
            raise ValueError(f"a tensor of {size:,} bytes that {said}")
        return Inert(numbers=count, kind=kind.name)

    def _spend(self, values: int) -> None:
        """Count values that are copied, hashed or walked. A memo lets a pickle use one value any
        number of times."""
        self.spent += values
        if self.spent > EXPANDED + 8 * self.operations:
            raise ValueError(f"a pickle that handles more than {EXPANDED:,} values again and again")

    def _check_key(self, key: Any) -> None:
        """Refuse keys and arguments of nested tuples: the time to hash them doubles per level."""
        parts = (key,)
        if type(key) is metadata.MetadataIndex:
            parts = tuple(vars(key).values())
        for part in parts:
            if type(part) in (tuple, torch.Size):
                self._spend(len(part))
                if all(type(item) in ATOMS for item in part):
                    continue
            elif type(part) is int:
                self._spend(part.bit_length() >> 6)
                continue
            elif type(part) in ATOMS:
                continue
            elif isinstance(part, Inert) and not part.name.startswith("transformer_engine."):
                # The fields of Transformer Engine's objects are hashed too.
                continue
            raise ValueError("a pickle with a key of nested values")

    # -- operations that make objects --------------------------------------------------------------

    def _make(self, func: Any, args: Any) -> Any:
        """The result of a call."""
        if isinstance(func, Named):
            return self._make_inert(func.name, args)
        if not any(func is known for known in CALLED.values()):
            raise ValueError("a pickle that calls something other than an allowed constructor")
        if func is collections.OrderedDict:
            if args != ():
                raise ValueError("a pickle that fills a dictionary by a call")
            return func()
        if func is PosixPath and type(args) is tuple and set(map(type, args)) <= {str}:
            self._spend(len(args) + sum(map(len, args)))
            return func(*args)
        if type(args) is not tuple or len(args) != 1:
            raise ValueError(f"a pickle that calls {func.__name__} wrongly")
        self._check_key(args[0])
        return func(args[0])

    def _make_inert(self, name: str, args: Any) -> Any:
        """A stand-in for the result of calling a harmless function, or a refused one (name "")."""
        made = name
        while name == "torch._tensor._rebuild_from_type_v2":
            self._spend(1)
            name, args = rebuilt_from(args)
        if not name:
            return Inert()
        self._spend(check_call(name, args, self._check_key))
        if name == "_codecs.encode":
            return args[0].encode("latin1")
        if name.endswith("_load_from_bytes"):
            return self._make_storage(made, *args)
        return Inert(made, row=row_of_bytes(name, args))

    def _make_storage(self, name: str, data: bytes = b"") -> Inert:
        """A storage whose bytes, inside the pickle, are a file of `torch.save` before torch 1.6:
        four pickles, then the numbers."""
        file = io.BytesIO(data)
        for _ in range(4):
            inner = load(file, stored=len(data))
            self.refused |= dict.fromkeys(inner.refused)
        return Inert(name, len(data))

    def _new(self, cls: Any, args: Any) -> Any:
        """An object without attributes."""
        if any(cls is known for known in BUILT.values()) and args == ():
            return cls.__new__(cls)
        return self._make(cls, args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._new(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        named = self.stack.pop()
        args = self.stack.pop()
        if named:
            raise ValueError("a pickle that makes an object from named values")
        self.stack[-1] = self._new(self.stack[-1], args)

    def _instantiate(self, klass: Any, args: list[Any]) -> None:
        self.append(self._new(klass, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, collections.OrderedDict):
            return
        if isinstance(made, Inert):
            return check_build(made, state)
        if not any(type(made) is known for known in BUILT.values()):
            raise ValueError("a pickle that sets the state of an object of another type")
        if isinstance(made, metadata.TensorProperties):
            kinds = (torch.dtype, torch.layout, bool, metadata._MEM_FORMAT_ENCODING, bool)
            if type(state) is not tuple or tuple(map(type, state)) != kinds:
                raise ValueError("properties of a tensor that are none")
            made.__setstate__(state)
            return
        if type(state) is not dict or any(type(key) is not str for key in state):
            raise ValueError("an object without attributes")
        vars(made).update(state)

    # -- operations that fill containers -----------------------------------------------------------

    def load_append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        into = self.stack[-1]
        if type(into) is list:
            into.extend(items)
        elif not isinstance(into, Inert):
            raise ValueError("a pickle that appends to something other than a list")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        into = self.stack[-1]
        inert = isinstance(into, Inert)
        if (not inert and type(into) not in (dict, collections.OrderedDict)) or len(items) % 2:
            raise ValueError("a pickle that sets items of something other than a dictionary")
        for i in range(0, len(items), 2):
            key = items[i]
            if type(key) is not str:
                self._check_key(key)
            if not inert:
                into[key] = items[i + 1]

    def load_additems(self) -> None:
        items = self.pop_mark()
        into = self.stack[-1]
        if type(into) is not set and not isinstance(into, Inert):
            raise ValueError("a pickle that adds to something other than a set")
        for item in items:
            self._check_key(item)
        if type(into) is set:
            into.update(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        for item in items:
            self._check_key(item)
        self.append(frozenset(items))

    # -- operations that name a size ---------------------------------------------------------------

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        # Read first, then allocate: a file may have fewer bytes than the operation states.
        self.append(bytearray(self.read(min(size, 1 << 40))))

    def _put(self, index: int) -> None:
        # Other programs read the file with the unpickler in C, whose memo is an array.
        if not 0 <= index <= self.operations:
            raise ValueError(f"a pickle with a memo of {index:,} values")
        self.memo[index] = self.stack[-1]

    def load_put(self) -> None:
        self._put(int(self.readline()[:-1]))

    def load_long_binput(self) -> None:
        self._put(int.from_bytes(self.read(4), "little"))


for _name in (
    *("reduce", "newobj", "newobj_ex", "build", "append", "appends", "setitem", "setitems", "dict"),
    *("additems", "frozenset", "bytearray8", "put", "long_binput"),
):
    _REPLACED = getattr(pickle._Unpickler, f"load_{_name}")
    for _code, _function in pickle._Unpickler.dispatch.items():
        if _function is _REPLACED:
            _Reader.dispatch[_code] = getattr(_Reader, f"load_{_name}")


def _check_expanded(value: Any, budget: int) -> None:
    """Refuse a value with more than `budget` parts. Shared containers take little memory, and a
    walk over them may take for ever.

    Raises:
        ValueError: too many parts, or too many levels.
    """
    left, waiting = budget, [(value, 0)]
    built = tuple(BUILT.values())
    while waiting:
        item, depth = waiting.pop()
        left -= 1
        if isinstance(item, str | bytes | bytearray):
            left -= len(item) >> 6
            inside: Any = ()
        elif isinstance(item, dict):
            inside = [*item, *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            inside = item
        elif isinstance(item, built):
            inside = list(vars(item).values())
        else:
            continue
        if left < len(inside):
            raise ValueError(f"a pickle whose values are more than {budget:,} when written out")
        if inside and depth == DEPTH:
            raise ValueError(f"a pickle of more than {DEPTH} levels")
        waiting.extend((each, depth + 1) for each in inside)


def shown(names: Any) -> str:
    """The first `NAMES_SHOWN` names for a message, each cut to 100 letters."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"{name:.100}" for name in names[:NAMES_SHOWN]) + more
