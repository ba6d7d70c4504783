"""Classes and functions that pickles of checkpoints may name: none runs code from the file."""

from __future__ import annotations

import argparse
import collections
from pathlib import PosixPath

import torch
from torch.distributed.checkpoint import filesystem, metadata

_METADATA = metadata.__name__

BUILT = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{
        (_METADATA, name): getattr(metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
        )
    },
}
"""(module, name) -> class whose objects safe_pickle makes empty and then gives their attributes."""

CALLED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    (_METADATA, "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    ("pathlib", "PosixPath"): PosixPath,
}
"""(module, name) -> class or function that safe_pickle calls, with plain values."""

DTYPES = {("torch", n): d for n, d in vars(torch).items() if isinstance(d, torch.dtype)}

HARMLESS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "_codecs": "encode",
        "builtins": "bytearray complex set",
        "collections": "Counter",
        "io": "BytesIO",
        "_io": "BytesIO",
        "pathlib": "PosixPath",
        "signal": "Signals",
        "types": "SimpleNamespace",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct",
        "numpy._core.multiarray": "_reconstruct",
        "numpy.dtypes": "UInt32DType",
        "torch": "Generator Tensor device",
        "torch._C": "Generator",
        "torch._tensor": "_rebuild_from_type_v2",
        "torch._utils": "_rebuild_parameter _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3",
        "torch.nn.parameter": "Parameter",
        "megatron.core.enums": "ModelType",
        "megatron.core.optimizer.optimizer_config": "OptimizerConfig",
        "megatron.core.rerun_state_machine": "RerunDiagnostic RerunMode RerunState",
        "megatron.core.transformer.enums": "AttnBackend CudaGraphModule CudaGraphScope"
        " InferenceCudaGraphScope",
    }.items()
    for name in names.split()
)
"""Other names that a checkpoint may hold: torch and Megatron load them with `weights_only=True`."""

FP8_STATE = frozenset(
    f"{module}.{name}"
    for module, names in {
        "torch.storage": "UntypedStorage _load_from_bytes",
        "transformer_engine.common.recipe": "DelayedScaling Float8CurrentScaling"
        " Float8BlockScaling MXFP8BlockScaling NVFP4BlockScaling Format _FormatHelper MMParams"
        " QParams",
        "megatron.core.extensions.transformer_engine": "TEDelayedScaling",
        "megatron.core.safe_globals": "safe_load_from_bytes",
    }.items()
    for name in names.split()
)
"""Names in the pickle that Transformer Engine stores in a tensor of its extra state. Megatron
replaces `_load_from_bytes` by a function that loads tensors alone."""

STORAGES = {
    ("torch", f"{name}Storage"): size
    for name, size in (
        *(("Byte", 1), ("Char", 1), ("Bool", 1), ("Short", 2), ("Half", 2), ("BFloat16", 2)),
        *(("Int", 4), ("Float", 4), ("Long", 8), ("Double", 8)),
        *(("ComplexFloat", 8), ("ComplexDouble", 16)),
    )
} | {("torch.storage", "UntypedStorage"): 1}
"""(module, name) of a storage class -> bytes of one number."""
