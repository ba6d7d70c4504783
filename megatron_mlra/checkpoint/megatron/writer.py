"""Writes Megatron checkpoint folders (torch_dist) tensor by tensor, without a process group.

`mlra pretrain --load` reads them at any parallel layout. torch.distributed.checkpoint writes the
files. The planner below hands it one layer's tensor at a time, so that memory holds one tensor.
"""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.checkpoint.files.staging import written_aside
from megatron_mlra.checkpoint.files.tokenizer_copy import copy_tokenizer, say_nothing
from megatron_mlra.checkpoint.files.torch_dist_index import FORMAT
from megatron_mlra.checkpoint.files.tracker import FORMAT_FILE, TRACKER
from megatron_mlra.checkpoint.folder import CheckpointFolder
from megatron_mlra.checkpoint.megatron.folder import RENAMED, RENAMED_GQA
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY
from megatron_mlra.checkpoint.stream import TensorStream
from megatron_mlra.description.megatron_args import to_megatron_args
from megatron_mlra.description.model import CheckpointError, ModelDescription
from megatron_mlra.description.tensors import (
    EXPERTS,
    FINAL_NORM,
    MULTI_TOKEN_LAYER,
    OUTPUT,
    VOCABULARY,
    layer_prefix,
    layer_tensors,
    multi_token_prefix,
)

VOCABULARY_MULTIPLE = 128
"""The rows of the embedding are padded to a multiple of this, as Megatron does at TP1."""


def write_megatron(
    source: CheckpointFolder,
    destination: str | Path,
    *,
    dtype: str | None = None,
    padded_vocab_size: int | None = None,
    progress: bool = True,
    say: Callable[[str], object] = say_nothing,
) -> None:
    """Write a `--load` folder with the source's weights and arguments, without optimizer state.

    It is a release checkpoint (tracker `release`): a run that loads it starts at step 0.

    Args:
        dtype: of the weights, default the source's.
        padded_vocab_size: rows of the embedding, default the vocabulary rounded up to a multiple of
            128; added rows are zero.
        say: called with one line per copied tokenizer file.

    Raises:
        CheckpointError: `padded_vocab_size` is less than the vocabulary; or see TensorStream and
            `written_aside`.
    """
    vocab = source.description.vocab_size
    rows = padded_vocab_size
    if rows is None:
        rows = -(-vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if rows < vocab:
        raise CheckpointError(f"padded_vocab_size {rows} is smaller than the vocabulary of {vocab}")
    with TensorStream(source, dtype, progress, ahead=True) as stream:
        model = stream.description
        extra = (rows - vocab) * model.hidden_size * stream.dtype.itemsize
        needed = stream.bytes + extra * (1 if model.tie_embeddings else 2)
        with written_aside(destination, needed) as folder:
            weights = folder / "release"
            weights.mkdir()
            save_torch_dist(_Planner(stream, rows), weights)
            stream.finish()
            seal(weights, folder, source.tokenizer_files(), say)
            (folder / TRACKER).write_text("release")


def seal(weights: Path, folder: Path, tokenizer: list[Path], say: Callable[[str], object]) -> None:
    """Write the manifest of a complete checkpoint, copy the tokenizer's files into `folder`, and
    write their manifest.

    Args:
        weights: the `iter_*` or release folder.
        folder: the `--load` folder around it.
    """
    manifest.write(weights)
    copy_tokenizer(tokenizer, folder, say)
    if tokenizer:
        manifest.write(folder, [file.name for file in tokenizer])


def save_torch_dist(planner: SavePlanner, folder: Path, files: int = 1) -> None:
    """Write the entries of `planner` into `folder` with torch.distributed.checkpoint, in this
    process alone, as `files` files."""
    writer = dcp.FileSystemWriter(folder, thread_count=files)
    with warnings.catch_warnings():
        # "torch.distributed is unavailable, assuming a single process": that is the intent.
        warnings.simplefilter("ignore")
        failure = None
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            # It wraps every error, KeyboardInterrupt too. The cause is raised outside the handler,
            # so that its own context stays: written_aside looks for an OSError there.
            failure = next(iter(error.failures.values()))[0]
        if failure is not None:
            raise failure
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT))


class StreamingPlanner(SavePlanner):
    """Plans entries whose data is made only when they are written. Subclasses define `plan` and
    `data`."""

    def __init__(self) -> None:
        self.items: list[WriteItem] = []
        self.entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}

    def add_bytes(self, key: str, size: int) -> None:
        """Plan an entry of `size` bytes."""
        self.entries[key] = BytesStorageMetadata()
        self.items.append(
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, BytesIOWriteData(size))
        )

    def add_tensor(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        blocks: list[tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        """Plan a tensor of a global shape, stored as blocks of (offsets, sizes)."""
        properties = TensorProperties(dtype=dtype)
        chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in blocks]
        self.entries[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        for i, chunk in enumerate(chunks):
            data = TensorWriteData(chunk, properties, torch.Size(shape))
            index = MetadataIndex(key, chunk.offsets, i)
            self.items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def plan(self) -> None:
        """Add every entry, in the order of writing."""
        raise NotImplementedError

    def data(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor | bytes:
        """The bytes of an entry, or the block at `offsets` of a tensor, in any shape with as many
        numbers."""
        raise NotImplementedError

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        """Do nothing: there is no state dict."""

    def create_local_plan(self) -> SavePlan:
        """The plan of all entries."""
        self.plan()
        return SavePlan(self.items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The one plan, and the content of `.metadata`."""
        return all_plans, Metadata(self.entries)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan, unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The data of one entry, made now."""
        index = write_item.index
        data = self.data(index.fqn, tuple(index.offset or ()))
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(data)
        return data.view(write_item.tensor_data.chunk.sizes)


class _Planner(StreamingPlanner):
    """Plans a model's weights as Megatron stores them: experts are stacked into one tensor, and so
    are layers if all are of one kind. Each stacked tensor is a block."""

    def __init__(self, stream: TensorStream, padded_vocab_size: int) -> None:
        super().__init__()
        self.stream = stream
        self.model = stream.description
        self.rows = padded_vocab_size
        renamed = RENAMED | (RENAMED_GQA if self.model.attention == "gqa" else {})
        self.stored = {name: key for key, name in renamed.items()}
        self.canonical: dict[tuple[str, tuple[int, ...]], str] = {}
        self.objects: dict[str, bytes] = {}

    def plan(self) -> None:
        """Add the objects, the embedding, the final norm, the output, and the layers."""
        for key in _extra_states(self.model):
            self.objects[key] = saved_object([None])
        common = {
            "args": saved_arguments(self.model, self.rows),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {"singleton_local_shards": False},
        }
        self.objects[COMMON_KEY] = saved_object([common])
        for key, data in self.objects.items():
            self.add_bytes(key, len(data))
        for name, shape in self.stream.shapes.items():
            if not name.startswith("decoder.layers.") and MULTI_TOKEN_LAYER not in name:
                rows = self.rows if name in VOCABULARY else shape[0]
                self._add(name, (rows, *shape[1:]), {name: ()})
        layers = range(self.model.num_layers)
        if self.model.stacks_layers:
            self._add_layers("decoder.layers.", {layer_prefix(i): (i,) for i in layers}, 0)
        else:
            for i in layers:
                self._add_layers(layer_prefix(i), {layer_prefix(i): ()}, i)
        for inner in _ahead(self.model):
            self._add_layers(inner, {inner: ()}, self.model.num_layers - 1)

    def _add_layers(self, prefix: str, layers: dict[str, tuple[int, ...]], like: int) -> None:
        """Plan layers of one kind.

        Args:
            layers: canonical prefix of a layer -> its index in the tensors that stack layers.
            like: number of the decoder's layer that has the same tensors.
        """
        is_moe = self.model.is_moe(like)
        for name, shape in layer_tensors(self.model, like).items():
            expert, _, rest = name.removeprefix(EXPERTS).partition(".")
            if not name.startswith(EXPERTS):
                fused = self.stored.get(name, name)
                # The norm before a router is not fused.
                key = name if is_moe and fused.startswith("mlp.") else fused
                parts = {layer + name: at for layer, at in layers.items()}
                self._add(prefix + key, shape, parts)
            elif expert == "0":
                parts = {
                    f"{layer}{EXPERTS}{e}.{rest}": (*at, e)
                    for layer, at in layers.items()
                    for e in range(self.model.num_experts)
                }
                self._add(prefix + EXPERTS + rest, shape, parts)

    def _add(self, key: str, shape: tuple[int, ...], parts: dict[str, tuple[int, ...]]) -> None:
        """Plan a tensor that stacks tensors of one shape.

        Args:
            parts: canonical name -> leading indices in the stack.
        """
        zeros = (0,) * len(shape)
        blocks = {name: ((*at, *zeros), (*(1 for _ in at), *shape)) for name, at in parts.items()}
        name, last = next(reversed(parts.items()))
        stack = tuple(i + 1 for i in last)
        dtype = self.stream.dtype_of(name)
        self.add_tensor(key, (*stack, *shape), dtype, list(blocks.values()))
        self.canonical |= {(key, offsets): name for name, (offsets, _) in blocks.items()}

    def data(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor | bytes:
        """A tensor of the source, or the bytes of an object."""
        if key in self.objects:
            return self.objects[key]
        name = self.canonical[key, offsets]
        tensor = self.stream.take(name)
        if name in VOCABULARY and self.rows > tensor.size(0):
            padding = tensor.new_zeros(self.rows - tensor.size(0), tensor.size(1))
            tensor = torch.cat((tensor, padding))
        return tensor.contiguous()


def saved_arguments(model: ModelDescription, padded_vocab_size: int) -> argparse.Namespace:
    """The arguments in a checkpoint of this model, as one process would save them."""
    args: dict[str, Any] = to_megatron_args(model)
    args |= {
        "padded_vocab_size": padded_vocab_size,
        "params_dtype": getattr(torch, model.dtype),
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**args)


_STATEFUL = (
    "input_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_q_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_gate_proj",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
)
"""Modules of Megatron or Transformer Engine that have an (empty) extra state in checkpoints."""
_STATEFUL_AHEAD = ("enorm", "hnorm", "eh_proj", "final_layernorm")
"""Those of a layer of multi-token prediction, around its transformer layer."""


def _extra_states(model: ModelDescription) -> list[str]:
    """Keys of extra states. A run loads those of its modules and ignores the others."""
    layers, experts = model.num_layers, model.num_experts
    keys = [f"{name.removesuffix('weight')}_extra_state/shard_0_1" for name in (FINAL_NORM, OUTPUT)]

    def add(prefix: str, like: int, stacked: bool) -> None:
        at, size = (like, layers) if stacked else (0, 1)
        expert_at, expert_size = (f"{like}.", f"{layers}.") if stacked else ("", "")
        keys.extend(f"{prefix}{module}._extra_state/shard_{at}_{size}" for module in _STATEFUL)
        if model.is_moe(like):
            keys.extend(
                f"{prefix}{EXPERTS}{linear}._extra_state/shard_{expert_at}{e}_{expert_size}{experts}"
                for linear in ("linear_fc1", "linear_fc2")
                for e in range(experts)
            )

    for i in range(layers):
        add("decoder.layers." if model.stacks_layers else layer_prefix(i), i, model.stacks_layers)
    for inner in _ahead(model):
        own = inner.removesuffix(MULTI_TOKEN_LAYER)
        keys += [f"{own}{module}._extra_state/shard_0_1" for module in _STATEFUL_AHEAD]
        add(inner, layers - 1, False)
    return keys


def _ahead(model: ModelDescription) -> list[str]:
    """Prefixes of the transformer layers within those of multi-token prediction."""
    return [multi_token_prefix(i) + MULTI_TOKEN_LAYER for i in range(model.draft_layers)]


def saved_object(value: Any) -> bytes:
    """The bytes of an entry that is not a tensor, as Megatron saves it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
