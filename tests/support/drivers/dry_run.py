"""Build every distinct rank of the 70 B preset at TP8 x PP8 x DP16 in one process, and write facts
as JSON.

The arguments, model builder and layer specs of the real entry run on meta tensors. Process groups
are torch's fake groups, which know their ranks and send nothing. For each (TP, PP) coordinate,
Megatron is initialised as one of the world's 1,024 ranks. The other data parallel ranks at that
coordinate hold the same model and differ only in their data parallel group.

Usage: python -m support.drivers.dry_run FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from support import ROOT

TP, PP, DP = 8, 8, 16
WORLD = TP * PP * DP
CONFIG = ROOT / "megatron_mlra/presets/mlra4_70b.yaml"
ARGV = ["--tensor-model-parallel-size", TP, "--pipeline-model-parallel-size", PP]
ARGV += ["--sequence-parallel", "--mock-data", "--no-initialization"]


def main(folder: Path) -> None:
    os.environ |= {"WORLD_SIZE": str(WORLD), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mlra.training.cpu_backend import enable_cpu_backend

    enable_cpu_backend()
    logging.disable(logging.WARNING)
    args, builder = entry_model()
    torch.cuda.current_device = lambda: torch.device("meta")
    ranks, metadata = [], {}
    for pp in range(PP):
        for tp in range(TP):
            rank = rank_id(tp, (tp + pp) % DP, pp)
            torch.distributed.init_process_group(
                "fake", rank=rank, world_size=WORLD, store=FakeStore()
            )
            facts, shards = one_rank(args, builder)
            ranks.append({"rank": rank, "tp": tp, "pp": pp, **facts})
            for dp, entries in enumerate(shards):
                metadata[rank_id(tp, dp, pp)] = entries
            torch.distributed.destroy_process_group()
    result = {
        "accounting": accounting(args),
        "ranks": ranks,
        "keys": tilings(metadata),
        "ids": sorted(metadata),
        "megatron": megatron_finds(metadata),
    }
    (folder / "dry_run.json").write_text(json.dumps(result))


def rank_id(tp: int, dp: int, pp: int) -> int:
    """Megatron's order: tensor parallel fastest, then data, then pipeline."""
    return tp + TP * (dp + DP * pp)


def entry_model() -> tuple[Namespace, Any]:
    """The model as pretrain_mlra.py builds it."""
    from megatron_mlra.training import arguments
    from megatron_mlra.training import steps as model

    args = arguments.parse(["--config", str(CONFIG), *map(str, ARGV)])
    with contextlib.redirect_stdout(io.StringIO()):
        config = model.model_config(args, arguments.validate(args))
    return args, config.get_builder_cls()(config)


def one_rank(args: Namespace, builder: Any) -> tuple[dict[str, Any], list[list[Any]]]:
    """Facts of the current rank, and its checkpoint entries as each data parallel rank has them."""
    import torch
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models import build_virtual_pipeline_stages

    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = build_virtual_pipeline_stages(
        builder.build_model,
        groups,
        args.virtual_pipeline_model_parallel_size,
        ModelType.encoder_or_decoder,
    )
    chunks = [chunk.to("meta") for chunk in chunks]
    facts = {
        "coordinates": [groups.tp.rank(), groups.pp.rank(), groups.dp_cp.rank()],
        "groups": [torch.distributed.get_process_group_ranks(g) for g in (groups.tp, groups.pp)],
        "layers": [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks],
        "parameters": [
            {name: list(p.shape) for name, p in chunk.named_parameters()} for chunk in chunks
        ],
    }
    data_groups = [fake_group(dp, DP) for dp in range(DP)]
    owned = [optimizer_ranges(chunk, groups, data_groups) for chunk in chunks]
    facts["optimizer"] = [sum(parts) for parts in zip(*owned, strict=True)]
    shards = []
    for group in data_groups:
        state = [chunk.sharded_state_dict(metadata={"dp_cp_group": group}) for chunk in chunks]
        apply_factories(state)
        entries = [e.without_data() for e in nested_values(state) if hasattr(e, "replica_id")]
        shards.append(entries)
    mpu.destroy_model_parallel()
    return facts, shards


def fake_group(rank: int, size: int) -> Any:
    """A process group in which this process is `rank` of `size`."""
    from torch._C._distributed_c10d import FakeProcessGroup

    return FakeProcessGroup._create_internal(rank, size, FakeProcessGroup.Options())


def optimizer_ranges(model: Any, groups: Any, data_groups: list[Any]) -> list[int]:
    """Elements of a model chunk's parameters that each data-parallel rank's optimizer owns.

    Raises:
        AssertionError: if the ranges of one parameter do not tile it.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
    )
    buffers = DistributedDataParallel(model.config, config, model, pg_collection=groups).buffers
    owned, ranges = [], {}
    for group in data_groups:
        owned.append(0)
        for buffer in buffers:
            buffer.data_parallel_group = group
            (buckets,) = DistributedOptimizer._build_gbuf_range_map(buffer).values()
            for bucket in buckets:
                for param, parts in bucket["param_map"].items():
                    part = parts["param"]
                    ranges.setdefault(param, []).append((part.start, part.end))
                    owned[-1] += part.end - part.start
    for name, param in model.named_parameters():
        ends = [0, *(end for _, end in ranges[param])]
        assert [start for start, _ in ranges[param]] == ends[:-1], f"{name}: {ranges[param]}"
        assert ends[-1] == param.numel(), f"{name}: {ranges[param]}"
    return owned


def tilings(metadata: dict[int, list[Any]]) -> dict[str, dict[str, int]]:
    """Of every tensor of the checkpoint: its elements, those that its main pieces hold, how many
    main pieces there are, how many pairs of them overlap, and how many copies are not main.

    Places are compared as half-open boxes, by arithmetic of our own, layer by layer.
    """
    import numpy as np
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    boxes: dict[str, dict[tuple[int, ...], list[tuple]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    copies: dict[str, int] = {}
    for entry in (entry for entries in metadata.values() for entry in entries):
        if not isinstance(entry, ShardedTensor):
            continue
        shape = tuple(entry.global_shape)
        assert shapes.setdefault(entry.key, shape) == shape, f"{entry.key}: two global shapes"
        if not is_main_replica(entry.replica_id):
            copies[entry.key] = copies.get(entry.key, 0) + 1
            continue
        layers = len(shape) - len(entry.local_shape)
        offset = tuple(entry.global_offset)
        box = (offset[layers:], tuple(entry.local_shape), shape[layers:])
        boxes.setdefault(entry.key, {}).setdefault(offset[:layers], []).append(box)
    result = {}
    for key, shape in shapes.items():
        held = pieces = overlaps = 0
        for found in boxes[key].values():
            starts, extents, bounds = (np.array(part) for part in zip(*found, strict=True))
            ends = starts + extents
            assert (starts >= 0).all() and (ends <= bounds).all(), f"{key}: a piece lies outside"
            both = np.minimum(ends[:, None], ends[None]) - np.maximum(starts[:, None], starts[None])
            overlaps += (int((both > 0).all(axis=-1).sum()) - len(found)) // 2
            held += int(extents.prod(axis=1).sum())
            pieces += len(found)
        result[key] = {
            "elements": int(np.prod(shape)),
            "held": held,
            "pieces": pieces,
            "overlaps": overlaps,
            "copies": copies.get(key, 0),
        }
    return result


def megatron_finds(metadata: dict[int, list[Any]]) -> str:
    """What Megatron's own check of a save says of all ranks' entries: "" or an error."""
    import torch
    from megatron.core.dist_checkpointing import validation
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    try:
        validation.validate_sharding_integrity([metadata[rank] for rank in range(WORLD)])
    except validation.CheckpointingException as error:
        return str(error)
    finally:
        torch.distributed.destroy_process_group()
    return ""


def accounting(args: Namespace) -> dict[str, Any]:
    """What pure arithmetic says of the same arguments."""
    from dataclasses import asdict

    from megatron_mlra.cost.flops import train_flops_per_token
    from megatron_mlra.cost.parameters import parameters
    from megatron_mlra.description.megatron_args import from_megatron_args

    shape = from_megatron_args(args)
    flops = train_flops_per_token(shape, args.seq_length).model
    return {**asdict(shape), "counts": asdict(parameters(shape)), "flops_per_token": flops}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
