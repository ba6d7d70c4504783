"""Checks of arguments that several operators share. Each message names the value and the fix."""

import math
import warnings

import torch
from torch import Tensor

from mlra_kernels.interpreter import INTERPRETED

BACKENDS = ("mlra_kernels", "torch")
OLD_BACKENDS = {"triton": "mlra_kernels", "reference": "torch"}
"""Old name -> new name; old names are accepted for one more version."""

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_GRID = 65535
"""Most programs along the second and third dim of a CUDA grid."""


def check_tensors(**tensors: Tensor) -> None:
    """Raise ValueError unless all are dense tensors on one device."""
    first = device = None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is of type {type(x).__name__}: give a torch.Tensor")
        if x.layout != torch.strided:
            raise ValueError(f"{name} is {x.layout}: give a dense tensor")
        if first is None:
            first, device = name, x.device
        elif x.device != device:
            raise ValueError(f"{name} is on {x.device}, {first} on {device}: move both to one")


def check_dims(name: str, x: Tensor, dims: str) -> None:
    """Raise ValueError unless x has the number of dims that `dims` ("[b, H, D]") lists."""
    if x.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} is {list(x.shape)}: give {dims}")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size of 0."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name.replace('_', ' ')} is {size}: give at least 1")


def check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless x is of one of the dtypes."""
    if x.dtype not in allowed:
        raise ValueError(f"{name} is {x.dtype}: use {' or '.join(map(str, allowed))}")


def check_contiguous(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor that is not contiguous."""
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} is not contiguous: call .contiguous()")


def check_reach(name: str, x: Tensor, first: int = 0) -> None:
    """Raise ValueError unless 32 bits hold the distance of any two numbers of x that differ in the
    dims from `first` on alone."""
    sizes = zip(x.shape[first:], x.stride()[first:], strict=True)
    if sum((size - 1) * stride for size, stride in sizes if size) >= 2**31:
        raise ValueError(f"{name} reaches over 2^31 numbers of memory: call .contiguous()")


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number, and positive if asked for."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 if positive else -math.inf) < value < math.inf:
        kind = "positive" if positive else "finite"
        raise ValueError(f"{name} is {_shown(value)}: give a {kind} number")


def check_integer(name: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """Raise ValueError unless `value` is an integer from `least` to `most`."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or not least <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}: give an integer from {least} to {most}")


def check_batch(batch: int, most: int = MAX_GRID) -> None:
    """Raise ValueError for more sequences than one launch can have."""
    if batch > most:
        raise ValueError(f"the batch has {batch} sequences: give at most {most} a call")


def check_device(name: str, x: Tensor) -> None:
    """Raise ValueError unless kernels can run on x's device."""
    if not (x.is_cuda or (INTERPRETED and x.device.type == "cpu")):
        raise ValueError(
            f"{name} is on {x.device}: the kernels need CUDA tensors, move it to a GPU"
        )


def check_rope_tables(cos: Tensor, sin: Tensor, half: int, positions: str | int) -> None:
    """Raise ValueError unless cos and sin are contiguous fp32 `[positions, half]`.

    Args:
        positions: number of rows; or, for any number, its name in messages.
    """
    for name, table in (("cos", cos), ("sin", sin)):
        rows = table.shape[0] if table.dim() and isinstance(positions, str) else positions
        if table.shape != (rows, half) or not rows or table.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tuple(table.shape)} {table.dtype}: give [{positions}, {half}] float32"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name} is not contiguous: call .contiguous()")
    if cos.shape != sin.shape:
        raise ValueError(f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}: give equal tables")


def check_paging(block_table: Tensor, cache_seqlens: Tensor, batch: int) -> None:
    """Raise ValueError unless the table is int32 `[batch, max_pages]` and the lengths `[batch]`."""
    if not block_table.dtype == cache_seqlens.dtype == torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype}, cache_seqlens {cache_seqlens.dtype}: make both"
            " int32"
        )
    shape = tuple(block_table.shape)
    if len(shape) != 2 or shape[0] != batch or not shape[1] or block_table.stride(1) != 1:
        raise ValueError(f"block_table is {shape}: give [{batch}, max_pages], rows contiguous")
    if cache_seqlens.shape != (batch,) or not cache_seqlens.is_contiguous():
        raise ValueError(
            f"cache_seqlens is {tuple(cache_seqlens.shape)}: give [{batch}], contiguous"
        )
    check_batch(batch)


def read_paging(
    block_table: Tensor, cache_seqlens: Tensor, page_size: int, num_pages: int
) -> list[tuple[int, Tensor]]:
    """(Length, page ids) of every sequence, for the torch references. Waits for the device.

    Raises:
        ValueError: a length is outside the table, or a page id is outside the cache.
    """
    table, most = block_table.cpu().long(), block_table.shape[1] * page_size
    found = []
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= most:
            raise ValueError(
                f"cache_seqlens[{b}] is {length}: the block table holds 0 to {most} tokens a"
                " sequence"
            )
        pages = table[b, : -(-length // page_size)]
        if length and not 0 <= int(pages.min()) <= int(pages.max()) < num_pages:
            wrong = next(p for p in pages.tolist() if not 0 <= p < num_pages)
            raise ValueError(
                f"block_table[{b}] names page {wrong}: the cache has pages 0 to {num_pages - 1}"
            )
        found.append((length, pages.to(block_table.device)))
    return found


def resolve_backend(backend: str, tensor: Tensor, *, half: bool = False) -> str:
    """The backend's current name, 'mlra_kernels' or 'torch'.

    Args:
        half: the kernels take only half precision on a GPU.

    Raises:
        ValueError: the name is unknown, or the kernels cannot run on `tensor`.
    """
    if isinstance(backend, str) and backend in OLD_BACKENDS:
        new = OLD_BACKENDS[backend]
        warnings.warn(f"backend={backend!r} is now {new!r}", FutureWarning, stacklevel=3)
        backend = new
    if backend not in BACKENDS:
        raise ValueError(f"backend is {_shown(backend)}: choose one of {BACKENDS}")
    if backend == "mlra_kernels" and not (INTERPRETED and tensor.device.type == "cpu"):
        if not tensor.is_cuda:
            raise ValueError(
                f"backend='mlra_kernels' needs CUDA tensors, got {tensor.device}: move them to a"
                " GPU or pass backend='torch'"
            )
        if half and tensor.dtype == torch.float32:
            raise ValueError(
                "backend='mlra_kernels' takes bfloat16 or float16 queries on a GPU, got"
                " torch.float32: cast them or pass backend='torch'"
            )
    return backend


def _shown(value: object) -> str:
    """A value in one line of at most 60 letters."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
