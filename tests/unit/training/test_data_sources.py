"""A run has one source of data, and the command line's comes before the preset's."""

from __future__ import annotations

from megatron_mlra.training.arguments import parse


def test_data_of_the_command_line_replace_those_of_a_preset(tmp_path):
    preset = tmp_path / "a.yaml"
    preset.write_text("base: debug\ndata_path: gone\n")
    args = parse(["--config", str(preset), "--mock-data"])
    assert args.mock_data and args.data_path is None
    preset.write_text("base: debug\nmock_data: true\n")
    args = parse(["--config", str(preset), "--data-path", "mine"])
    assert not args.mock_data and args.data_path == ["mine"]
