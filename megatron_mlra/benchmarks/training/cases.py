"""What a row of the results measures, and how `--case` names it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mlra.benchmarks.training.layouts import ONE_GPU, Layout
from megatron_mlra.description.presets import a_preset, find_preset, preset_names, preset_values

STOCK = "stock-mla"
"""Megatron's MLA as it comes, `stock-mla_7b` and `stock-mla_moe_16b` in the sizes of these presets;
`stock-mla-fused` turns on its RoPE fusion, which it has for YaRN only: with factor 1 that is plain
RoPE."""

RECIPES = ("bf16", "delayed", "tensorwise", "blockwise")
FORMS = ("auto", "absorbed", "materialized")


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    variant: str
    """`mlra4` for the preset mlra4_2.9b; another preset's name; a path; or stock-mla."""
    recipe: str = "bf16"
    form: str = "auto"
    seq_length: int = 2048
    layout: Layout = ONE_GPU

    @classmethod
    def parse(cls, text: str) -> Case:
        """`VARIANT[/RECIPE[/FORM[/SEQ_LENGTH]]][@LAYOUT]`.

        Raises:
            ValueError: a part is unknown; lists the known ones. Or a preset cannot be read.
        """
        what, at, cut = text.rpartition("@")
        what, layout = (what, Layout.parse(cut)) if at else (text, ONE_GPU)
        name, *rest = what.split("/") if not what.endswith(".yaml") else [what]
        if len(rest) > 3 or (len(rest) == 3 and not (rest[2].isdecimal() and int(rest[2]))):
            raise ValueError(f"--case {text}: use VARIANT/RECIPE/FORM/SEQ_LENGTH@LAYOUT")
        case = cls(name, *rest[:2], *(int(part) for part in rest[2:]))
        case = replace(case, layout=layout)
        a_preset(case.preset(), f"--case {text}:")
        for value, known in ((case.recipe, RECIPES), (case.form, FORMS)):
            if value not in known:
                raise ValueError(f"--case {text}: {value!r}; use one of {', '.join(known)}")
        return case

    @property
    def is_stock(self) -> bool:
        return self.variant.startswith(STOCK)

    @property
    def is_fused(self) -> bool:
        return self.is_stock and self.variant.endswith("-fused")

    @property
    def has_experts(self) -> bool:
        return preset_values(self.preset()).get("num_experts") is not None

    def preset(self) -> Path:
        """The file of the preset with the sizes.

        Raises:
            ValueError: there is no such preset.
        """
        if self.variant.endswith(".yaml"):
            return Path(self.variant)
        name = self.variant
        if self.is_stock:
            name = name.removeprefix("stock-").removesuffix("-fused")
        known = preset_names()
        for preset in (f"{name}_2.9b", name):
            if preset in known:
                return find_preset(preset)
        names = sorted(preset.removesuffix("_2.9b") for preset in known)
        raise ValueError(f"--case {self.variant}: use {STOCK} or one of {', '.join(names)}")

    def __str__(self) -> str:
        cut = f"@{self.layout}" if self.layout != ONE_GPU else ""
        return f"{self.variant}/{self.recipe}/{self.form}/{self.seq_length}{cut}"
