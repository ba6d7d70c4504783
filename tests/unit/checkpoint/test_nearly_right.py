"""Checkpoints that are right but for a value of another kind: each is refused in one line, or read
as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.torch_dist import COMMON_KEY, TorchDistFolder
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.command_line.parser import LONGEST
from support import hostile
from support.random_checkpoint import RandomFolder, grouped, latent

pytestmark = pytest.mark.usefixtures("unsealed")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Megatron folder, to be changed."""
    write_megatron(RandomFolder(latent(4, 4, v_head_dim=16)), tmp_path / "saved", progress=False)
    return tmp_path / "saved"


def change_state(folder: Path, **values: Any) -> None:
    """Replace values of the state that all ranks share; `args` is those of its arguments."""
    release = folder / "release"
    state = TorchDistFolder(release).common_state()
    if "args" in values:
        values["args"] = type(state["args"])(**vars(state["args"]) | values["args"])
    hostile.replace_entry(release, COMMON_KEY, hostile.saved([state | values]))


def refused(convert, *argv: object) -> str:
    """The line that a conversion is refused by."""
    code, error = convert(*argv)
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    assert len(error) < LONGEST + 50
    return error


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        # bool("false") is true: such a model would be computed otherwise than it was trained.
        ("untie_embeddings_and_output_weights", "false", "is 'false'; it must be true or false"),
        ("variance_scaling", "no", "is 'no'; it must be true or false"),
        ("tokenizer_model", 5, "tokenizer_model is 5; it must be a text"),
        ("tokenizer_type", ["a"], "tokenizer_type is ['a']; it must be a text"),
    ],
)
def test_arguments_of_another_kind(name, value, said, folder, convert, tmp_path):
    change_state(folder, args={name: value})
    assert said in refused(convert, "inspect", folder)
    assert said in refused(convert, "export-official", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [[1], "fully_reshardable", 7])
def test_a_description_of_the_state_that_is_no_dictionary(value, folder, convert, tmp_path):
    change_state(folder, content_metadata=value)
    error = refused(convert, "reshard", folder, tmp_path / "out")
    assert f"its content_metadata is {value!r}, not a dictionary" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["reshard", "export-official", "inspect"])
def test_blocks_of_another_type_than_the_index_says(command, folder, convert, tmp_path):
    name = "decoder.final_layernorm.weight"

    def other_type(index) -> None:
        index.state_dict_metadata[name].properties.dtype = torch.float16

    hostile.change_index(folder / "release", other_type)
    to = [] if command == "inspect" else [tmp_path / "out"]
    error = refused(convert, command, folder, *to)
    assert f"a block of {name} is torch.float32, and .metadata says torch.float16" in error
    assert not (tmp_path / "out").exists()


def test_a_value_of_megabytes_does_not_fill_the_screen(convert, tmp_path):
    write_huggingface(RandomFolder(grouped(2)), tmp_path / "exported", progress=False)
    hostile.write_config(tmp_path / "exported", vocab_size="x" * 70_000)
    error = refused(convert, "inspect", tmp_path / "exported")
    assert "vocab_size is 'xxx" in error and "letters left out" in error
    assert error.endswith("xx'; it must be a whole number of at least 1\n")
