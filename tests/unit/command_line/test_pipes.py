"""Files that are pipes, as `<(...)` and /dev/stdin are: read once, or refused in one line."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mlra.benchmarks import losses_files
from megatron_mlra.checkpoint.huggingface.tokenizer import write_tokenizer
from megatron_mlra.command_line import early
from megatron_mlra.data.sources import find_sources
from megatron_mlra.data.tokenizers import TokenizerSpec, build_tokenizer
from megatron_mlra.description.presets import preset_values
from megatron_mlra.evaluation.inputs import read_inputs
from megatron_mlra.evaluation.tasks import read_task
from megatron_mlra.inference import flags
from megatron_mlra.training import early_checks
from support.random_checkpoint import RandomFolder, latent


@pytest.fixture
def pipe():
    """Makes a pipe that holds a text; its name."""
    ends: list[int] = []

    def make(text: str) -> str:
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        ends.append(read)
        return f"/dev/fd/{read}"

    yield make
    for end in ends:
        os.close(end)


def prompts(file: str, checkpoint: Path) -> list[str]:
    """The prompts of `mlra generate`, which checks its arguments first."""
    argv = [str(checkpoint), "--prompt-file", file]
    early.check(flags.parser(), argv)
    return flags.read_prompts(flags.parser().parse_args(argv))


def template(file: str, folder: Path) -> str:
    """The chat template of an export."""
    source = RandomFolder(latent(4, 4))
    write_tokenizer(source, source.description, folder, "byte", chat_template=file)
    return (folder / "chat_template.jinja").read_text()


def test_what_is_read_once(pipe, tmp_path):
    (tmp_path / "config.json").touch()
    assert prompts(pipe("a\nb\n"), tmp_path) == ["a", "b"]
    args = Namespace(text=[pipe("some text")], data=[], verify=False)
    assert [*read_inputs(args)[0].values()] == ["some text"]
    item = {"context": "a", "continuation": "b"}
    assert read_task(pipe(json.dumps(item))) == [item]
    lines = "step 1/2 | lm loss 3.0 | lr 1\nstep 2/2 | lm loss 2.0 | lr 1\n"
    assert losses_files.read(Path(pipe(lines))).losses == [3.0, 2.0]
    assert template(pipe("{{ messages }}"), tmp_path) == "{{ messages }}"


REFUSED = {
    "preset": (preset_values, "it is no plain file"),
    "hf": (
        lambda file: build_tokenizer(TokenizerSpec("hf", file)),
        "is no plain file, and is read",
    ),
    "tiktoken": (
        lambda file: build_tokenizer(TokenizerSpec("tiktoken", file)),
        "is no plain file, and is read more than once: copy it",
    ),
    "documents": (lambda file: find_sources([file]), "is not a regular file"),
    "data": (
        lambda file: early_checks.check(["--config", "debug", "--data-args-path", file]),
        "is no plain file, and is read more than once; copy it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_read_more_than_once(pipe, what):
    read, said = REFUSED[what]
    with pytest.raises(ValueError) as refused:
        read(pipe("x"))
    assert said in str(refused.value) and "\n" not in str(refused.value)
