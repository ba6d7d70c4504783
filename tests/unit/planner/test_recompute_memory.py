"""The planned memory of full recompute."""

from dataclasses import replace

import pytest

from megatron_mlra.description.presets import preset_values
from megatron_mlra.planner.cli import shape_of
from megatron_mlra.planner.layout import Layout
from megatron_mlra.planner.memory import GIB, memory
from support import CONFIGS


def test_a_layer_is_computed_again_when_the_logits_are_gone():
    # One H200 at bcd1f05, tests/gpu/test_planner_gpu.py: 30.85 GiB at the peak, at which the logits
    # are held. Their sum with a whole layer's activations is 34.9.
    model = replace(shape_of(preset_values(CONFIGS / "mlra4_2.9b.yaml")), num_layers=6)
    model = replace(model, seq_length=4096)
    layout = Layout(micro_batch=8, recompute="full")
    assert memory(model, layout).total / GIB == pytest.approx(30.85, rel=0.005)
    # Where a layer holds more than the logits, the layer is the peak.
    few = replace(model, vocab_size=512, padded_vocab_size=512)
    none = memory(few, replace(layout, recompute="none"))
    assert 0 < memory(few, layout).working < none.activations / 6
