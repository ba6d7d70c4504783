"""Ways to cut a measured model over the GPUs of one host, by short names: `tp2-latent`, `pp2`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

AXES = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
    "dp": None,
}
"""Axis -> its flag of Megatron. Data parallel takes the ranks that are left; experts lie across its
ranks."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "head": ("--latent-tp-layout", "head"),
    "latent": ("--latent-tp-layout", "latent"),
    "serial": ("--no-overlap-param-gather", "--no-overlap-grad-reduce"),
    "graphs": ("--cuda-graph-impl", "local", "--te-rng-tracker"),
    "buffers": ("--tp-comm-overlap",),
    "nosp": (),
    "wide4": (),
    "half": (),
}
"""Option -> flags of `mlra pretrain`. `serial`: gradients and weights are sent behind the layers;
`graphs`: CUDA graphs of whole layers; `buffers`: Transformer Engine's user buffers, without
multicast; `nosp`: no sequence parallel; `wide4`: micro-batches of four times as many sequences, a
quarter as many; `half`: half as many micro-batches."""

ALONE = "one"
"""The layout of one GPU, while the others wait."""


@dataclass(frozen=True)
class Layout:
    """Sizes of each axis, and options."""

    sizes: tuple[tuple[str, int], ...] = ()
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`one`, or axes with sizes and options joined by `-`: `tp2-head-graphs`, `dp2-ep2`.

        Raises:
            ValueError: an unknown part; lists the known ones.
        """
        sizes, options = {}, []
        for part in text.split("-"):
            axis = re.fullmatch(rf"({'|'.join(AXES)})([1-9]\d?)", part)
            if axis and axis[1] not in sizes:
                sizes[axis[1]] = int(axis[2])
            elif part in OPTIONS and part not in options:
                options.append(part)
            elif part != ALONE:
                raise ValueError(
                    f"layout {text}: {part!r}; join {ALONE}, {', '.join(f'{a}N' for a in AXES)} and"
                    f" {', '.join(OPTIONS)} by '-', each once"
                )
        layout = cls(tuple(sizes.items()), tuple(options))
        if layout.size("dp") % layout.size("ep"):
            raise ValueError(
                f"layout {text}: experts lie across data-parallel ranks; use"
                f" dp{layout.size('ep')}-ep{layout.size('ep')}"
            )
        return layout

    def size(self, axis: str) -> int:
        """Ranks along an axis; 1 if the layout does not name it."""
        return dict(self.sizes).get(axis, 1)

    @property
    def world(self) -> int:
        """GPUs of the layout."""
        return math.prod(size for axis, size in self.sizes if axis != "ep")

    @property
    def widening(self) -> int:
        """How many times as many sequences a micro-batch has."""
        return 4 if "wide4" in self.options else 1

    def flags(self) -> list[str]:
        """The flags of `mlra pretrain` that choose the layout."""
        found = []
        for axis, size in self.sizes:
            if AXES[axis]:
                found += [AXES[axis], str(size)]
        if self.size("tp") > 1 and "nosp" not in self.options:
            found.append("--sequence-parallel")
        for option in self.options:
            found += OPTIONS[option]
        return found

    def micro_batches(self, count: int) -> int:
        """Micro-batches of a step over all data-parallel ranks, where one GPU has `count`.

        Raises:
            ValueError: the layout does not divide `count`.
        """
        halved = count // 2 if "half" in self.options else count
        parts = self.widening * self.size("dp")
        if not halved or halved % parts:
            raise ValueError(
                f"--micro-batches {count} do not divide into {self}; use"
                f" {parts * (2 if 'half' in self.options else 1)} or a multiple"
            )
        return halved // self.widening

    def __str__(self) -> str:
        return "-".join([f"{axis}{size}" for axis, size in self.sizes] + [*self.options]) or ALONE


ONE_GPU = Layout()
