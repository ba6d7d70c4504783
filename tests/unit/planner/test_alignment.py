"""Notes on MLP sizes whose part on a tensor-parallel rank does not suit matrix kernels."""

import json

import pytest

from megatron_mlra.cost.alignment import unaligned_mlps
from megatron_mlra.description.presets import preset_values
from megatron_mlra.planner.cli import main, shape_of
from support import CONFIGS


@pytest.mark.parametrize(
    ("preset", "tp", "expert_tp", "said"),
    [
        ("mlra4_2.9b", 1, None, ""),
        (
            "mlra4_2.9b",
            2,
            None,
            "note: --ffn-hidden-size 9880 is 4940 on each of 2 ranks, no multiple of 8, which GPUs"
            " multiply slower; 9888 suits",
        ),
        ("mla_2.9b", 4, None, "9448 is 2362 on each of 4 ranks"),
        ("mlra4_2.9b", 16, None, ""),  # 9880 does not divide, which is refused elsewhere
        ("mlra4_7b", 8, None, ""),
        ("mla_moe_16b", 2, None, ""),
        ("mla_moe_16b", 16, 1, "--ffn-hidden-size 10944 is 684 on each of 16 ranks"),
        ("mla_moe_16b", 2, 32, "--moe-ffn-hidden-size 1408 is 44 on each of 32 ranks"),
    ],
)
def test_an_mlp_that_ranks_cut_unevenly_for_kernels_is_noted(preset, tp, expert_tp, said):
    line = unaligned_mlps(shape_of(preset_values(CONFIGS / f"{preset}.yaml")), tp, expert_tp)
    assert said in line and bool(line) == bool(said)
    assert "\n" not in line


def test_the_planner_notes_sizes_that_its_layouts_cut_badly(capsys):
    def plan(*more: str) -> str:
        assert main(["--config", "mlra4_2.9b", "--gpus", "2", *more]) == 0
        return capsys.readouterr().out

    at_two = "note: --ffn-hidden-size 9880 is 4940 on each of 2 ranks"
    assert at_two in " ".join(plan("--top", "9").split())
    found = json.loads(plan("--top", "9", "--json"))
    assert [note[: len(at_two)] for note in found["notes"]] == [at_two]
    assert "note:" not in plan("--top", "1")
