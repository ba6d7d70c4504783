"""Gluon's operations under one name each: releases of Triton call them differently.

| here | Triton 3.6 | 3.7 | 3.9 |
|---|---|---|---|
| `barrier` | `gl.thread_barrier` | `gl.barrier` | `gl.barrier` |
| `async_load` | `tma.async_copy_global_to_shared` | as 3.6 | `tma.async_load` |
| `async_store` | `tma.async_copy_shared_to_global` | as 3.6 | `tma.async_store` |
| `async_atomic_add` | none: made here | none: made here | `tma.async_atomic_add` |

A later release keeps a removed name as a function that raises, so the newest name is asked for
first.
"""

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma


@builtin
def _async_atomic_add(tensor_desc, coord, src, _semantic=None):
    """Begin to add a tile of shared memory to global memory. Triton 3.6 and 3.7 have this operation
    of the copy engine, but Gluon has no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


def _first(module, *names: str):
    """The operation of a module that is called by the first of the names that it has."""
    return getattr(module, next(name for name in names if hasattr(module, name)))


barrier = _first(gl, "barrier", "thread_barrier")
async_load = _first(tma, "async_load", "async_copy_global_to_shared")
async_store = _first(tma, "async_store", "async_copy_shared_to_global")
async_atomic_add = getattr(tma, "async_atomic_add", _async_atomic_add)
