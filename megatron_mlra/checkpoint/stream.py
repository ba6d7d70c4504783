"""The source of tensors for all writers: each tensor is read once, checked, cast and counted."""

from __future__ import annotations

import math

import torch

from megatron_mlra.checkpoint.folder import CheckpointFolder, check_finite
from megatron_mlra.command_line.progress_bar import bar
from megatron_mlra.description.model import DTYPES, CheckpointError, ModelDescription
from megatron_mlra.description.tensors import dtype_of, expected_tensors


class TensorStream:
    """The tensors of a source in one dtype, with a progress bar; a context manager.

    Args:
        dtype: of the tensors that `take` returns: 'float32', 'bfloat16' or 'float16'; default the
            source's.
        ahead: take the layers of multi-token prediction too, if the source has any.
        progress: show a bar of bytes.

    Raises:
        CheckpointError: the dtype is unknown.
    """

    def __init__(
        self,
        source: CheckpointFolder,
        dtype: str | None = None,
        progress: bool = True,
        ahead: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise CheckpointError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
        self.source = source
        model = source.description if ahead else source.description.decoder()
        self.description: ModelDescription = model.replace(dtype=dtype or model.dtype)
        """The source's description, with the dtype of the stream."""
        self.dtype: torch.dtype = getattr(torch, self.description.dtype)
        self.shapes = expected_tensors(self.description)
        self.bytes = sum(
            math.prod(shape) * self.dtype_of(name).itemsize for name, shape in self.shapes.items()
        )
        self._waiting = set(self.shapes)
        self._bar = bar(desc="copying", total=self.bytes, unit="B", unit_scale=True, shown=progress)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which `take` returns this tensor."""
        return getattr(torch, dtype_of(name, self.description.dtype))

    def take(self, name: str) -> torch.Tensor:
        """The tensor of a canonical name.

        Raises:
            CheckpointError: the tensor was taken before, is not of this model, has a wrong shape,
                or holds numbers beyond the range of the dtype.
        """
        if name not in self._waiting:
            what = "is written twice" if name in self.shapes else "is no tensor of this model"
            raise CheckpointError(f"{name} {what}")
        tensor = self.source.tensor(name)
        if tuple(tensor.shape) != self.shapes[name]:
            raise CheckpointError(
                f"{self.source.path}: {name} is {list(tensor.shape)}, not {list(self.shapes[name])}"
            )
        self._waiting.remove(name)
        if tensor.dtype != self.dtype_of(name):
            tensor = tensor.to(self.dtype_of(name))
            self._check_fits(name, tensor)
        self._bar.update(tensor.numel() * tensor.element_size())
        return tensor

    def _check_fits(self, name: str, tensor: torch.Tensor) -> None:
        try:
            check_finite(tensor, name)
        except CheckpointError:
            raise CheckpointError(
                f"{self.source.path}: {name} has numbers beyond the range of"
                f" {self.description.dtype}; use bfloat16 or float32"
            ) from None

    def finish(self) -> None:
        """Check that every tensor was taken.

        Raises:
            CheckpointError: names the tensors that were not.
        """
        if self._waiting:
            left = [name for name in self.shapes if name in self._waiting]
            raise CheckpointError(f"not written: {', '.join(left)}")

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
