"""Vendors' rates of GPUs, and the shares of these rates that a run is assumed to reach.

The shares were fitted to the steps on one GPU in docs/performance/training.md, which they predict
within 8 %. The share of NVLink and the start-up time of collectives are those of two H200
(docs/performance/training.md). The shares of networks and of overlap are guesses; measure them on a
cluster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megatron_mlra.command_line.parser import flag


@dataclass(frozen=True)
class GPU:
    """A GPU by its vendor's data: dense rates, decimal units, one direction of a link."""

    name: str
    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float
    """0 if the GPU has no FP8."""
    memory_gb_s: float
    link_gb_s: float
    """To the other GPUs of its NVLink domain."""
    network_gb_s: float
    """To other nodes, with one NIC per GPU as in the vendor's reference systems."""
    domain: int
    """GPUs per NVLink domain."""
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80, 312, 0, 2039, 300, 25, 8, "NVIDIA A100 80GB SXM data sheet; HDR 200 Gb/s"),
        GPU("h100", 80, 989, 1979, 3350, 450, 50, 8, "NVIDIA H100 SXM data sheet; NDR 400 Gb/s"),
        GPU("h200", 141, 989, 1979, 4800, 450, 50, 8, "NVIDIA H200 SXM data sheet; NDR 400 Gb/s"),
        GPU("b200", 180, 2250, 4500, 7700, 900, 50, 8, "NVIDIA DGX B200 data sheet; NDR 400 Gb/s"),
        GPU("gb200", 186, 2500, 5000, 8000, 900, 50, 72, "NVIDIA GB200 NVL72 data sheet"),
    )
}

_CUDA_NAMES = {
    "a100": r"\bA100\b",
    "h100": r"\bH100\b.* HBM3$",
    "h200": r"\bH200$",
    "b200": r"\bB200$",
    "gb200": r"\bGB200\b",
}
"""Patterns of CUDA's names, which do not match variants of other rates (H100 PCIe, H100 NVL)."""


def _assume(default: float, about: str) -> Any:
    """A field with the help of its flag."""
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Assumptions:
    """Shares of the vendors' rates, and latencies; every field is a flag of `mlra plan`."""

    gemm: float = _assume(
        0.6, "share of the peak that a layer's matrix products reach, launches and gaps included"
    )
    core: float = _assume(
        0.45,
        "share of the bf16 peak that the attention core reaches (on an H100 360 to 460 TFLOP/s)",
    )
    latent_core: float = _assume(
        0.55, "the same of this project's kernels of the absorbed form, on Hopper"
    )
    bandwidth: float = _assume(
        0.8, "share of the memory's rate that elementwise work and the optimizer reach"
    )
    link: float = _assume(
        0.45,
        "share of NVLink's rate that collectives reach (gathers on two H200: 0.40 of 32 MB, 0.54 of"
        " 256 MB, 0.59 of 1 GB)",
    )
    network: float = _assume(0.75, "share of the network's rate that collectives reach")
    passes: float = _assume(
        5.0, "how often elementwise work of forward and backward moves the saved activations"
    )
    dp_overlap: float = _assume(
        0.8, "share of one micro-batch's time that hides data-parallel traffic"
    )
    memory: float = _assume(
        0.92, "share of a GPU's memory a run may plan with; CUDA, NCCL and fragments take the rest"
    )
    collective_us: float = _assume(
        4.0,
        "start-up time of one collective while decoding (two H200: one-shot 3.6 to 4.9, NCCL 8.8 to"
        " 10.1)",
    )

    def __post_init__(self) -> None:
        shares = ("gemm", "core", "latent_core", "bandwidth", "link", "network", "memory")
        for name in shares:
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{flag(name)} is {value}; use a share above 0 and at most 1")
        for name in ("passes", "dp_overlap", "collective_us"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{flag(name)} is {value}; use a number of at least 0")

    def sends(self, gpu: GPU, devices: int) -> float:
        """Bytes per second that one of so many devices, which are neighbours, sends in a
        collective."""
        if devices <= gpu.domain:
            return gpu.link_gb_s * 1e9 * self.link
        return gpu.network_gb_s * 1e9 * self.network


def of_device(name: str) -> GPU | None:
    """The GPU with this name in CUDA ("NVIDIA H100 80GB HBM3"), None if it is not listed."""
    return next((GPUS[gpu] for gpu, names in _CUDA_NAMES.items() if re.search(names, name)), None)


def find(name: str) -> GPU:
    """The GPU of this name.

    Raises:
        ValueError: the name is unknown; lists the known names.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is not known; use one of {', '.join(GPUS)}")
    return GPUS[name]
