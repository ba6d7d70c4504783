"""Descriptions of the paged cache for Hopper's copy engine (TMA), made on the host.

Letters: L latent heads, C columns of a view, N cached tokens per tile.
"""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GL_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def tile_descriptor(view: Tensor, block_n: int, columns: int) -> TensorDescriptor:
    """Describe a paged view `[pages, page_size, C]` to the copy engine, in tiles `[N, columns]`.

    Raises:
        ValueError: the pages do not follow each other in memory, or the rows do not begin at
            multiples of 16 bytes.
    """
    pages, page_size, _ = view.shape
    row_bytes = view.stride(1) * view.element_size()
    if row_bytes % 16 or view.data_ptr() % 16 or row_bytes == 0:
        raise ValueError(
            f"cache rows are {row_bytes} bytes apart and begin {view.data_ptr() % 16} bytes past a"
            " multiple of 16: make the cache contiguous or pass metadata with a config of"
            " hopper=False"
        )
    if view.stride(0) != page_size * view.stride(1):
        raise ValueError(
            f"cache pages are {view.stride(0)} elements apart, not {page_size * view.stride(1)}: "
            "make the cache contiguous or pass metadata with a config of hopper=False"
        )
    return _descriptor(view, pages * page_size, view.stride(1), [block_n, columns])


def scale_descriptor(scale: Tensor, block_n: int) -> TensorDescriptor:
    """Describe contiguous scales `[pages, L, page_size]` fp32 in tiles `[1, N]`.

    Raises:
        ValueError: the scales do not begin at a multiple of 16 bytes.
    """
    if past := scale.data_ptr() % 16:
        raise ValueError(
            f"cache_scale begins {past} bytes past a multiple of 16: call .clone() or pass metadata"
            " with a config of hopper=False"
        )
    return _descriptor(scale, scale.shape[0] * scale.shape[1], scale.shape[2], [1, block_n])


def _descriptor(tensor: Tensor, rows: int, pitch: int, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, GL_DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, [rows, tensor.shape[-1]], [pitch, 1], block, layout)
