"""Calls that pickles of strangers make: none of arguments that no checkpoint has."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import signal
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_mlra.checkpoint.files import torch_file
from megatron_mlra.checkpoint.files.pickle_names import BUILT, CALLED, HARMLESS
from support import hostile


def test_what_megatron_holds_for_safe_is_harmless():
    from megatron.core.safe_globals import SAFE_GLOBALS

    known = HARMLESS | {f"{module}.{name}" for module, name in BUILT | CALLED}
    missing = {f"{c.__module__}.{c.__qualname__}" for c in SAFE_GLOBALS} - known
    assert not missing


@pytest.mark.parametrize("name", hostile.CALLS)
def test_harmless_names_are_called_as_checkpoints_do(name, research, convert, tmp_path, bounded):
    source = shutil.copytree(research("MLRA-4"), tmp_path / "source")
    data = b"\x80\x02}X\1\0\0\0w" + hostile.CALLS[name] + b"s."
    archive = hostile.repacked(hostile.saved({"w": torch.ones(1)}), {"data.pkl": data})
    (source / "pytorch_model.bin").write_bytes(archive)
    code, error = convert("inspect", source)
    assert code == 2 and re.search("a pickle (that|with) ", error) and error.count("\n") == 1, error
    # The bytes of an extra state are a pickle too, with more names.
    inside = torch.frombuffer(
        bytearray(b"\x80\x02" + hostile.CALLS[name] + b"."), dtype=torch.uint8
    )
    entry = hostile.saved(inside)
    with pytest.raises(torch_file.TorchFileError, match=r"a pickle (that|with) |a tensor of "):
        torch_file.read_extra_state(io.BytesIO(entry), len(entry))


def test_honest_calls_are_let_through():
    many = torch.arange(12.0).view(3, 4)
    values = {
        "numpy": [np.random.get_state()[1]],
        "more": [np.arange(5), np.ones((2, 1)).T, np.array("text")],
        "bytes": b"a\xff",
        "parameter": torch.nn.Parameter(many),
        "parts": [many[1:, ::2], many.t(), many[:0], torch.ones(()), many.to(torch.bfloat16)],
        "torch": [torch.Size([2, 3]), torch.device("cpu"), torch.float16, torch.get_rng_state()],
        "python": [io.BytesIO(b"ab"), Path("/a/b"), Namespace(a=1)],
        "megatron": [AttnBackend.flash, signal.SIGTERM, types.SimpleNamespace(a=[1])],
        "optimizer": OptimizerConfig(lr=0.1),
    }
    data = hostile.saved(
        {name: it for name, it in values.items() if name not in ("more", "python")}
    )
    loaded = torch_file.load_entry(io.BytesIO(data), len(data))
    assert torch.equal(loaded["parts"][0], values["parts"][0])
    assert (loaded["numpy"][0] == values["numpy"][0]).all() and loaded["bytes"] == b"a\xff"
    data = hostile.saved(values)
    assert not torch_file.read_object(io.BytesIO(data), len(data)).refused
    # Tensors in the pickle of an extra state carry their storage as a file in the pickle.
    inside = pickle.dumps({"scale": many, "buffer": [many[0].double()], "n": {1, 2}})
    entry = hostile.saved(torch.frombuffer(bytearray(inside), dtype=torch.uint8))
    assert torch_file.read_extra_state(io.BytesIO(entry), len(entry)) == ()


def test_generators_have_the_state_of_generators():
    """torch's `__setstate__` leaves an error pending in the interpreter for most other states."""
    honest = torch.Generator().manual_seed(3)
    state = honest.get_state()

    class Made:
        def __init__(self, *state):
            self.state = state

        def __reduce__(self):
            return torch.Generator, (torch.device("cpu"),), self.state

    data = hostile.saved([honest, Made(2**64 - 1, None, state)])
    loaded = torch_file.load_entry(io.BytesIO(data), len(data))
    assert loaded[0].get_state().equal(state) and loaded[0].initial_seed() == 3
    on_gpu = hostile.saved(Made(3, 8, torch.zeros(16, dtype=torch.uint8)))
    assert not torch_file.read_object(io.BytesIO(on_gpu), len(on_gpu)).refused
    for odd in (
        *((2**64, None, state), (-1, None, state), (True, None, state), (3, -1, state)),
        *((3, 2**63, state), (3, None, honest), (3, None, None), (3, None), (3, None, "state")),
        (3, None, torch.zeros(3, dtype=torch.uint8)),
        (3, None, state[::2]),
        (3, None, torch.zeros(1, dtype=torch.uint8).expand(5056)),
    ):
        data = hostile.saved(Made(*odd))
        with pytest.raises(torch_file.TorchFileError, match=r"changes a torch\._C\.Generator into"):
            torch_file.load_entry(io.BytesIO(data), len(data))


def test_code_in_the_storage_of_an_extra_state(tmp_path):
    old = io.BytesIO()
    code = hostile.Code(tmp_path / "canary")
    torch.save(code, old, _use_new_zipfile_serialization=False)

    class Inside:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (old.getvalue(),)

    inside = torch.frombuffer(bytearray(pickle.dumps(Inside())), dtype=torch.uint8)
    entry = hostile.saved(inside)
    assert torch_file.read_extra_state(io.BytesIO(entry), len(entry)) == ("posix.mkdir",)


class Generator:
    """Pickled as a generator with a state."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple:
        return torch.Generator, ("cpu",), self.state


def test_generators_of_a_run_are_read():
    """Transformer Engine's tracker of random numbers saves the generators themselves."""

    def check(value: object) -> None:
        data = hostile.saved({"rng": value})
        torch_file.check_entry(io.BytesIO(data), len(data))

    check(torch.Generator().manual_seed(5))
    check(Generator((5, 0, torch.zeros(16, dtype=torch.uint8))))
    for state in (5, (1, 2), (5, 0, 16), (5, 0, b"16"), ("5", 0, torch.ones(2)), {"seed": 5}):
        with pytest.raises(torch_file.TorchFileError, match=r"changes a torch\._C\.Generator"):
            check(Generator(state))
