"""The weight files of transformers-style folders: `.bin` or safetensors, whole or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_mlra.checkpoint.files import manifest, torch_file
from megatron_mlra.checkpoint.files.inside import inside
from megatron_mlra.checkpoint.files.safetensors_file import check_safetensors
from megatron_mlra.checkpoint.files.torch_dist_index import ForbiddenNames
from megatron_mlra.command_line.foreign_text import read_json
from megatron_mlra.description.model import CheckpointError

STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))


class WeightFiles:
    """Tensors by name, read lazily. `.bin` files are loaded with `weights_only=True` and mapped.

    Args:
        verify: compare the files with the folder's checksums, if it has any.

    Raises:
        CheckpointError: there are no weights; or a file is missing, damaged or truncated, holds
            code, or holds other tensors than the index lists.
    """

    def __init__(self, folder: Path, verify: bool) -> None:
        self.folder = folder
        self.verify = verify
        self._open: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self.where = self._find()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        files = sorted(set(self.where.values()))
        if verify:
            manifest.check(folder, files, ("config.json",))
        for file in files:
            self._measure(file)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor; from a `.bin`, a view of the mapped file."""
        file = self.where[name]
        if file.endswith(".bin"):
            return self._bin(file)[name]
        try:
            with safe_open(self.folder / file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, error) from None

    def _find(self) -> dict[str, str]:
        """Tensor name -> file name."""
        for stem, suffix in STEMS:
            index = inside(self.folder, f"{stem}.{suffix}.index.json")
            if index.is_file():
                return self._read_index(index)
            single = f"{stem}.{suffix}"
            if inside(self.folder, single).is_file():
                return dict.fromkeys(self._names(single), single)
        raise CheckpointError(
            f"{self.folder} holds no weights: no model.safetensors or pytorch_model.bin, nor an"
            " index of shards"
        )

    def _read_index(self, index: Path) -> dict[str, str]:
        if self.verify:
            manifest.check(self.folder, [index.name], ("config.json",))
        try:
            where = read_json(index)["weight_map"]
            plain = all(isinstance(f, str) and Path(f).name == f for f in where.values())
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of shards ({error!r:.200})") from None
        if not plain:
            raise CheckpointError(f"{index} names files outside its folder")
        missing = sorted({f for f in where.values() if not inside(self.folder, f).is_file()})
        if missing:
            raise CheckpointError(f"{self.folder} is incomplete: {', '.join(missing)} missing")
        return where

    def _names(self, file: str) -> list[str]:
        if file.endswith(".bin"):
            return list(self._bin(file))
        try:
            check_safetensors(self.folder / file)
            with safe_open(self.folder / file, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(file, error) from None

    def _measure(self, file: str) -> None:
        """Record the shapes and dtypes of a file's tensors, and compare names with the index."""
        found = set(self._names(file))
        named = {name for name, where in self.where.items() if where == file}
        problems = [f"missing {name}" for name in sorted(named - found)]
        problems += [f"not in the index {name}" for name in sorted(found - named)]
        if problems:
            raise CheckpointError(f"{self.folder / file} differs: {'; '.join(problems)}")
        if file.endswith(".bin"):
            for name, tensor in self._bin(file).items():
                self.shapes[name], self.dtypes[name] = tuple(tensor.shape), tensor.dtype
            return
        with safe_open(self.folder / file, framework="pt") as opened:
            for name in named:
                part = opened.get_slice(name)
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _DTYPES.get(part.get_dtype(), part.get_dtype())

    def _bin(self, file: str) -> Mapping[str, torch.Tensor]:
        if self._open is None or self._open[0] != file:
            path = self.folder / file
            try:
                state = torch_file.load_tensors(path)
            except (OSError, torch_file.TorchFileError) as error:
                raise self._damaged(file, error) from None
            if not isinstance(state, Mapping) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor)
                for name, tensor in state.items()
            ):
                raise CheckpointError(f"{path} is no dictionary of tensors")
            for name, tensor in state.items():
                try:
                    torch_file.check_stored(tensor)
                except torch_file.TorchFileError as error:
                    raise CheckpointError(f"{path}: {name:.100} is {error}") from None
            self._open = (file, state)
        return self._open[1]

    def _damaged(self, file: str, error: Exception) -> CheckpointError:
        said = " ".join(str(error).split())
        if isinstance(error, torch_file.ForbiddenCode):
            return ForbiddenNames(f"{self.folder / file} {said}")
        return CheckpointError(f"{self.folder / file} cannot be read, truncated? ({said:.200})")


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def common_dtype(dtypes: Mapping[str, torch.dtype], where: Path) -> str:
    """Name of a dtype that holds all numbers of these dtypes exactly: the common dtype, else
    'float32'.

    Raises:
        CheckpointError: a tensor is neither 'float32', 'bfloat16' nor 'float16'.
    """
    for name, dtype in dtypes.items():
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(f"{where}: {name} is {dtype}, which cannot be converted")
    kinds = set(dtypes.values())
    widest = kinds.pop() if len(kinds) == 1 else torch.float32
    return str(widest).removeprefix("torch.")
