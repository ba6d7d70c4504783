"""The command that starts a run with a layout."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

from megatron_mlra.command_line.parser import flag
from megatron_mlra.description.backends import TP_LAYOUTS
from megatron_mlra.description.model import ModelDescription
from megatron_mlra.planner.layout import Layout

NODE = 8
"""Default of the most GPUs per node."""
ENTRY = ("-m", "megatron_mlra.training")
"""What `mlra launch` starts."""
_OFF = {
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "sequence_parallel": False,
}
"""Values of arguments that a layout does not use, given if the preset has others."""
_KEPT = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
)
"""Arguments of a preset that no flag can unset."""


_DATA = (
    "data_path",
    "train_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "mock_data",
)
"""Arguments that name a run's data."""


def launch_command(
    config: str,
    layout: Layout,
    shape: ModelDescription,
    values: Mapping[str, Any],
    asked: Mapping[str, Any],
    node: int,
) -> list[str]:
    """The lines of the command, the same on every node; the user replaces DATA and RUN, which are
    what the preset does not name.

    Args:
        config: the preset as the user gave it.
        layout: of all GPUs.
        shape: the model.
        values: of the preset, by argparse destination.
        asked: flags that the user gave, by argparse destination.
        node: most GPUs per node.
    """
    chosen = layout.flags(shape)
    chosen |= {name: off for name, off in _OFF.items() if name not in chosen}
    chosen["latent_tp_layout"] = layout.tp_layout
    defaults = _OFF | {"latent_tp_layout": TP_LAYOUTS[0]}
    defaults |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    if layout.distributed_optimizer and layout.dp * layout.cp > 1:
        chosen["use_distributed_optimizer"] = True
    if not values.get("fp16"):
        chosen["bf16"] = True
    chosen |= asked
    flags = []
    for name, value in chosen.items():
        if values.get(name, defaults.get(name)) != value:
            flags += _words(name, value)
    lines = [
        launcher(layout.gpus, layout.tp, node),
        [*ENTRY, "--config", config],
        _places(values),
        flags,
    ]
    written = [shlex.join(line) for line in lines if line]
    return [
        f"{'  ' * bool(i)}{line}{chr(92).rjust(2) * (i + 1 < len(written))}"
        for i, line in enumerate(written)
    ]


def launcher(gpus: int, tp: int, node: int = NODE) -> list[str]:
    """The words that start one node's processes; `ENTRY` and the run's flags follow.

    Args:
        gpus: of all nodes.
        tp: tensor-parallel size; such a group stays within a node where it can.
        node: most GPUs per node; all nodes have equally many.
    """
    counts = [count for count in range(min(node, gpus), 0, -1) if gpus % count == 0]
    per_node = next((count for count in counts if count % tp == 0), counts[0])
    nodes = gpus // per_node
    where = ["--standalone"]
    if nodes > 1:
        where = ["--nnodes", str(nodes), "--rdzv-backend", "c10d"]
        where += ["--rdzv-endpoint", "FIRST_HOST:29500", "--rdzv-id", "JOB"]
    return ["mlra", "launch", *where, "--nproc-per-node", str(per_node)]


def left_over(layout: Layout, shape: ModelDescription, values: Mapping[str, Any]) -> list[str]:
    """Keys of the preset that the layout does not use and that no flag can unset."""
    chosen = layout.flags(shape)
    return [name for name in _KEPT if values.get(name) is not None and name not in chosen]


def fp8_sizes(layout: Layout, shape: ModelDescription, positions: int | None) -> list[str]:
    """Flags of the next sizes that FP8 products take, of those that it does not: widths and tokens
    are multiples of 16 on each tensor-parallel rank.

    Args:
        positions: of the preset, which the next length may exceed.
    """
    ranks = layout.tp if layout.sequence_parallel else 1
    tokens = 16 * ranks * layout.cp
    sizes = [("hidden_size", shape.hidden_size, 16)]
    if not shape.num_experts or 0 in shape.moe_layer_pattern:
        sizes.append(("ffn_hidden_size", shape.ffn_hidden_size, 16 * layout.tp))
    step = tokens // math.gcd(tokens, layout.micro_batch)
    sizes.append(("seq_length", shape.seq_length, step))
    if positions and -(-shape.seq_length // step) * step > positions:
        sizes.append(("max_position_embeddings", shape.seq_length, step))
    return [f"{flag(name)} {-(-size // step) * step}" for name, size, step in sizes if size % step]


def _places(values: Mapping[str, Any]) -> list[str]:
    """Flags of data and folders that the preset does not name; a flag would replace its values."""
    save = values.get("save") or "RUN"
    places = [] if any(values.get(name) for name in _DATA) else ["--data-path", "DATA"]
    places += [] if values.get("save") else ["--save", save]
    return places + ([] if values.get("load") else ["--load", save])


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, list):
        return [flag(name), *map(str, value)]
    return [flag(name), str(value)]
