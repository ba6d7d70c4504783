"""Destinations of conversions: there whole or not at all, whatever stops the writing."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_mlra.command_line.signals import Interrupted, interruptible

pytestmark = pytest.mark.usefixtures("unsealed")


def test_destinations(research, convert, tmp_path, monkeypatch):
    source = research("MLRA-4")
    (tmp_path / "there").mkdir()
    code, error = convert("import-official", source, tmp_path / "there")
    assert code == 2 and "exists already; remove it, or choose another folder" in error
    (tmp_path / "file").write_text("")
    code, error = convert("import-official", source, tmp_path / "file" / "out")
    assert code == 2 and "is not a folder" in error
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, error = convert("import-official", source, tmp_path / "out")
    assert code == 2 and "has 1 kB free and needs " in error
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]


@pytest.mark.parametrize(
    "command",
    [
        ["import-official", "{research}"],
        ["export-official", "{megatron}"],
        ["export-official", "{megatron}", "--format", "bin"],
        ["export-hf", "{megatron}"],
        ["reshard", "{megatron}"],
    ],
    ids=" ".join,
)
def test_a_disk_that_fills(command, research, megatron, convert, tmp_path):
    folders = {"research": research("MLRA-4"), "megatron": megatron}
    name, source, *options = (word.format(**folders) for word in command)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        code, error = convert(name, source, tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and error.count("\n") == 1
    assert error == f"error: [Errno 27] File too large: '{tmp_path / 'out'}'\n"
    assert os.listdir(tmp_path) == ["megatron"]


SLOWED = """
import sys, time
from megatron_mlra.checkpoint import cli, stream

take = stream.TensorStream.take

def slow(self, name):
    if name.startswith("decoder.layers.1."):
        time.sleep(300)
    return take(self, name)

stream.TensorStream.take = slow
sys.exit(cli.main())
"""
"""The tool, never done with its second layer."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_conversion_leaves_no_destination(
    number, research, convert, warm_python, tmp_path
):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = ["import-official", research("MLRA-4"), out]
    running = subprocess.Popen(
        [warm_python, "-c", SLOWED, *command], stderr=subprocess.PIPE, text=True
    )
    while not list(partial.glob("release/*.distcp")):
        assert running.poll() is None and not out.exists()
        time.sleep(0.01)
    running.send_signal(number)
    _, error = running.communicate(timeout=300)
    assert running.returncode in (-number, 128 + number)
    assert not out.exists()
    if number == signal.SIGTERM:
        assert "error: interrupted; nothing written" in error and not partial.exists()
    else:
        assert partial.exists()
        assert convert(*command)[0] == 0
        assert out.exists() and not partial.exists()


def test_an_interrupt_within_torch_save_is_one():
    class Interrupting(io.BytesIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().write(data)

    with pytest.raises(Interrupted) as raised, interruptible():
        torch.save(torch.ones(3), Interrupting())
    assert raised.value.number == signal.SIGTERM
    assert isinstance(raised.value.__cause__, RuntimeError)
