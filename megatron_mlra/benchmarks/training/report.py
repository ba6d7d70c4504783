"""Results as a table and as a JSON file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from megatron_mlra.benchmarks.commit import commit
from megatron_mlra.benchmarks.training.measure import Result, SublayerResult
from megatron_mlra.command_line.parser import write_json
from megatron_mlra.version import installed

COLUMNS = (
    ("case", "{case}"),
    ("form", "{form}"),
    ("tokens/s", "{tokens_per_second:,.0f}"),
    ("step ms", "{step_ms:.1f}"),
    ("spread", "{spread_ms:.1f}"),
    ("model TF/s", "{model_tflops:.0f}"),
    ("hw TF/s", "{hardware_tflops:.0f}"),
    ("MFU", "{mfu:.1%}"),
    ("peak GiB", "{peak_gib:.1f}"),
    ("gate", "{gate:.1e}"),
)


LAYOUT_COLUMNS = (
    ("case", "{case}"),
    ("tokens/s", "{tokens_per_second:,.0f}"),
    ("of one GPU's", "{ratio}"),
    ("step ms", "{step_ms:.1f}"),
    ("spread", "{spread_ms:.1f}"),
    ("MFU", "{mfu:.1%}"),
    ("GPU idle", "{idle}"),
    ("communication ms", "{communication}"),
    ("of it exposed", "{exposed}"),
    ("peak GiB", "{peak_gib:.1f}"),
)
"""Of cases that are cut over GPUs. Idle share and communication are of a profile, of rank 0."""


MEMORY_COLUMNS = (
    ("case", "{case}"),
    ("form", "{form}"),
    ("step ms", "{step_ms:.1f}"),
    ("activations GiB", "{activations_gib:.2f}"),
    ("MiB a layer", "{layer_mib:.0f}"),
    ("weights", "{weights_gib:.2f}"),
    ("gradients", "{gradients_gib:.2f}"),
    ("optimizer", "{optimizer_gib:.2f}"),
    ("peak GiB", "{peak_gib:.2f}"),
)
"""Of the short table at the end; all memory but the activations' layer share is in GiB."""


SUBLAYER_COLUMNS = (
    ("case", "{case}"),
    ("form", "{form}"),
    ("forward ms", "{forward_ms:.2f}"),
    ("forward + backward ms", "{total_ms:.2f}"),
    ("saved MiB", "{saved_mib:.0f}"),
    ("peak MiB", "{peak_mib:.0f}"),
)


def table(rows: list[Result] | list[SublayerResult]) -> str:
    """A Markdown table of results."""
    sublayers = bool(rows) and isinstance(rows[0], SublayerResult)
    return _table(SUBLAYER_COLUMNS if sublayers else COLUMNS, [asdict(row) for row in rows])


def layout_table(rows: list[Result]) -> str:
    """A Markdown table of layouts, each against the same case on one GPU if that was measured."""

    def key(row: Result) -> tuple[str, ...]:
        wide = "wide4" if row.layout.endswith("wide4") else ""
        return row.variant, row.recipe, row.form, str(row.seq_length), wide

    alone = {key(row): row for row in rows if row.gpus == 1 and row.layout in ("one", "wide4")}
    values = []
    for row in rows:
        one, traced = alone.get(key(row)), row.kernels
        values.append(
            asdict(row)
            | {
                "ratio": f"{row.tokens_per_second / one.tokens_per_second:.2f}" if one else "",
                "idle": f"{traced['idle_share']:.0%}" if traced else "",
                "communication": f"{traced['communication_ms']:.1f}" if traced else "",
                "exposed": f"{traced['exposed_ms']:.1f}" if traced else "",
            }
        )
    return _table(LAYOUT_COLUMNS, values)


def memory_table(rows: list[Result]) -> str:
    """A Markdown table of time and memory; a layer's share of the activations counts the embedding
    and the logits in."""
    layer = [row.activations_gib * 1024 / row.layers for row in rows]
    values = [asdict(row) | {"layer_mib": mib} for row, mib in zip(rows, layer, strict=True)]
    return _table(MEMORY_COLUMNS, values)


def _table(columns: tuple[tuple[str, str], ...], rows: list[dict]) -> str:
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[text.format(**row) for _, text in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def line(row: Result | SublayerResult) -> str:
    """A result in one line, printed as soon as it is measured."""
    if isinstance(row, SublayerResult):
        return f"{row.case}: {row.total_ms:.2f} ms, {row.saved_mib:.0f} MiB saved"
    rate = f"{row.tokens_per_second:,.0f} tokens/s, MFU {row.mfu:.1%}"
    memory = f"{row.peak_gib:.1f} GiB, of them {row.activations_gib:.2f} activations"
    return f"{row.case}: {rate}, {memory}, gate {row.gate:.2g}"


def environment() -> dict[str, str]:
    """Device, commit and versions, on which timings depend."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": commit(),
        "torch": torch.__version__,
        **installed("megatron-core", "transformer-engine", "triton", "nvidia-cudnn-frontend"),
    }


def write(
    rows: list[Result] | list[SublayerResult], matmul: float, settings: dict, folder: Path
) -> dict:
    """Write training.json into `folder`; returns its content.

    Args:
        matmul: TFLOP/s of the matrix rate.
        settings: more entries of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = [asdict(row) for row in rows]
    result = {**environment(), "matmul_tflops": matmul, **settings, "rows": values}
    write_json(folder / "training.json", result, indent=1)
    return result
