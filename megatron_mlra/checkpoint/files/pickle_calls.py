"""Rules for the arguments of the calls that pickles of checkpoints make.

A harmless function is not harmless with every argument. An array of a size that the pickle states
may take far more memory than the file has bytes; hashing a set of deeply nested tuples may take
for ever. So each function is allowed only the arguments that honest checkpoints give it.
safe_pickle makes almost none of these calls, but torch, which reads the file next, makes them all.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch

ATOMS = (str, int, float, bool, bytes, type(None), torch.dtype)
GENERATORS = ("torch._C.Generator", "torch.Generator")
_CPU_STATE = torch.get_rng_state().numel()
_CUDA_STATE = 16
"""Bytes of a generator's state; on a GPU its seed and offset."""
_FEW = 64
"""Most arguments of a call, and most values of a tuple among the arguments."""
_SHORT = 4096
"""Most letters of a text among the arguments."""


class Inert:
    """Stands for an object of a class that is not needed here.

    Attributes:
        name: of the function or class that made the object; "" if unknown.
        numbers: most numbers that a storage holds.
        kind: class of a storage, such as 'ByteStorage'; "" of all else.
        row: length of a contiguous uint8 tensor of one dimension; None of all else.
    """

    def __init__(
        self, name: str = "", numbers: int = 0, kind: str = "", row: int | None = None
    ) -> None:
        self.name, self.numbers, self.kind, self.row = name, numbers, kind, row


class Named(Inert):
    """Stands for a class or function itself; its name is "" if it is refused."""


def check_call(name: str, args: Any, check_key: Callable[[Any], None]) -> int:
    """Check the arguments of a call.

    Args:
        check_key: raises ValueError for a value that takes too long to hash.

    Returns:
        The cost of the call: the number of values that it copies.

    Raises:
        ValueError: no checkpoint makes this call.
    """
    rule = _RULES.get(name, _few)
    if type(args) is tuple and len(args) <= _FEW:
        if rule is _hashed and args and type(args[0]) in (list, tuple, set, frozenset, dict):
            for key in args[0]:
                check_key(key)
        cost = rule(args)
        if cost is not None:
            return cost
    raise ValueError(f"a pickle that calls {name} with arguments that no checkpoint has")


def check_build(made: Inert, state: Any) -> None:
    """Check the state that a pickle sets on an object of a harmless class.

    Raises:
        ValueError: an array's shape does not fit its values, a generator's state is not its seed,
            offset and bytes, or the object is a tensor.
    """
    if made.name.endswith("multiarray._reconstruct"):
        plain = type(state) is tuple and len(state) == 5 and type(state[1]) is tuple
        # numpy compares the shape with the length of bytes, but for a list it allocates the shape.
        if plain and (
            type(state[4]) is bytes
            or (isinstance(state[4], Inert) and not state[4].name)
            or (type(state[4]) is list and _counts(state[1]) and _size(state[1]) <= len(state[4]))
        ):
            return
    elif made.name in GENERATORS:
        # Transformer Engine's tracker of random numbers keeps the generators themselves.
        # torch's __setstate__ leaves an error pending in the interpreter for any other state.
        if type(state) is tuple and len(state) == 3 and type(state[2]) is Inert:
            seed, offset, row = state[0], state[1], state[2].row
            on_cpu = offset is None and row == _CPU_STATE
            on_gpu = type(offset) is int and 0 <= offset < 1 << 63 and row == _CUDA_STATE
            if type(seed) is int and 0 <= seed < 1 << 64 and (on_cpu or on_gpu):
                return
    elif not made.name.startswith(("torch.Tensor", "torch._", "torch.nn.")):
        return
    raise ValueError(f"a pickle that changes a {made.name} into what no checkpoint has")


def rebuilt_from(args: Any) -> tuple[str, Any]:
    """(name, arguments) of the call that `_rebuild_from_type_v2` makes.

    Raises:
        ValueError: the called function does not make a tensor.
    """
    if type(args) is tuple and len(args) == 4 and isinstance(args[0], Named):
        plain = isinstance(args[1], Named) and isinstance(args[3], dict)
        if plain and args[0].name.startswith("torch._utils._rebuild_"):
            return args[0].name, args[2]
    raise ValueError("a pickle that calls _rebuild_from_type_v2 with what makes no tensor")


def row_of_bytes(name: str, args: Any) -> int | None:
    """Length of the contiguous uint8 tensor of one dimension that a call makes, whose arguments
    `check_call` has checked; None if the call makes another object."""
    if name != "torch._utils._rebuild_tensor_v2" or args[0].kind != "ByteStorage":
        return None
    return args[2][0] if len(args[2]) == 1 and args[3] == (1,) else None


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape) if len(shape) <= _FEW else 1 << 62


# Rules: arguments -> cost of the call, or None if no checkpoint has these arguments.


def _few(args: tuple) -> int | None:
    """Few numbers, short texts, inert objects, and short tuples of numbers and texts."""
    for arg in args:
        parts = arg if type(arg) is tuple else (arg,)
        if len(parts) > _FEW or not all(isinstance(part, ATOMS) for part in parts):
            if not isinstance(arg, Inert):
                return None
            continue
        if any(isinstance(part, str | bytes) and len(part) > _SHORT for part in parts):
            return None
    return len(args)


def _bytes(args: tuple) -> int | None:
    if args == ():
        return 1
    return 1 + (len(args[0]) >> 6) if len(args) == 1 and type(args[0]) is bytes else None


def _latin(args: tuple) -> int | None:
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        return None
    return 1 + (len(args[0]) >> 6)


def _hashed(args: tuple) -> int | None:
    """A set or a counter of keys, which `check_call` has checked."""
    if args == ():
        return 1
    kinds = (list, tuple, set, frozenset, dict)
    return len(args[0]) + 1 if len(args) == 1 and type(args[0]) in kinds else None


def _empty_array(args: tuple) -> int | None:
    """An array of numpy is made empty; its state (`check_build`) has the shape and the bytes."""
    plain = len(args) == 3 and isinstance(args[0], Named) and args[0].name == "numpy.ndarray"
    return 1 if plain and args[1] == (0,) and args[2] in (b"b", "b") else None


def _number_type(args: tuple) -> int | None:
    first = args[0] if args else None
    return _few(args) if type(first) is str and len(first) <= _FEW else None


def _numbers(args: tuple) -> int | None:
    return len(args) if all(type(arg) in (int, float) for arg in args) else None


def _nothing(args: tuple) -> int | None:
    return 1 if args == () else None


def _never(args: tuple) -> int | None:
    return None


def _tensor(args: tuple) -> int | None:
    """A tensor must lie within its storage: torch enlarges a storage that is too small."""
    if len(args) < 4 or type(args[0]) is not Inert or not _counts((args[1],)):
        return None
    size, stride = args[2:4]
    if not (_counts(size) and _counts(stride) and len(size) == len(stride) <= _FEW):
        return None
    # _rebuild_tensor_v3 also has a dtype, and its storage counts bytes.
    itemsize = args[6].itemsize if len(args) > 6 and type(args[6]) is torch.dtype else 1
    last = args[1] + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return len(args) if 0 in size or (last + 1) * itemsize <= args[0].numbers else None


def _is_tensor(value: Any) -> bool:
    return type(value) is Inert and value.name.startswith("torch._")


def _of_a_tensor(args: tuple) -> int | None:
    """A parameter around a tensor."""
    if not args or not _is_tensor(args[0]):
        return None
    rest = (*ATOMS, dict, collections.OrderedDict)
    return len(args) if all(type(arg) in rest for arg in args[1:]) else None


_RULES: dict[str, Callable[[tuple], int | None]] = {
    "_codecs.encode": _latin,
    "builtins.bytearray": _bytes,
    "io.BytesIO": _bytes,
    "_io.BytesIO": _bytes,
    "builtins.set": _hashed,
    "collections.Counter": _hashed,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.ndarray": _never,
    "numpy.dtype": _number_type,
    "torch.Tensor": _nothing,
    "transformer_engine.common.recipe._FormatHelper": _numbers,
    "torch.storage.UntypedStorage": _never,
    "torch.storage._load_from_bytes": _bytes,
    "megatron.core.safe_globals.safe_load_from_bytes": _bytes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _of_a_tensor,
    "torch.nn.parameter.Parameter": _of_a_tensor,
}
