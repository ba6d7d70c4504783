"""Files of strangers are read in a few places, which bound and check them; nothing goes past."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from support import ROOT

CODE = ("pretrain_mlra.py", "megatron_mlra", "kernels", "tools", "examples")

READERS = {
    "json.load",
    "json.loads",
    "json.JSONDecoder",
    "torch.load",
    "torch.jit.load",
    "torch.hub",
    "torch.package",
    "safetensors.safe_open",
    "safetensors.torch",
    "numpy.load",
    "numpy.memmap",
    "tarfile",
    "tomllib",
    "xml",
    "configparser",
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "joblib",
    "cloudpickle",
    "marshal",
    "shelve",
    "yaml",
    "zipfile",
    "gzip",
    "bz2",
    "lzma",
    "zlib",
    "zstandard",
    "shutil.unpack_archive",
    "eval",
    "exec",
    "compile",
}
"""Functions and modules that make values of bytes."""

ALLOWED = {
    # The readers themselves.
    "megatron_mlra/command_line/foreign_text.py": {"json.loads", "yaml"},
    "megatron_mlra/checkpoint/files/safe_pickle.py": {"pickle"},
    "megatron_mlra/checkpoint/files/torch_file.py": {"torch.load"},
    # Behind check_safetensors; the library compares the tensors with the file.
    "megatron_mlra/checkpoint/files/weight_files.py": {"safetensors.safe_open"},
    # Mapped, not read: every number is compared with the size of the file.
    "megatron_mlra/data/index.py": {"numpy.memmap"},
    # Behind a checksum that the cache keeps beside the file.
    "megatron_mlra/data/index_cache.py": {"numpy.load"},
    # Streams, of which no more than a record is held.
    "megatron_mlra/data/readers.py": {"gzip", "zlib", "zstandard"},
    # What the ranks of a job tell one another over its own store.
    "megatron_mlra/fault_tolerance/hang.py": {"json.loads"},
    "megatron_mlra/fault_tolerance/handshake.py": {"json.loads", "zlib"},
    "megatron_mlra/launch/call.py": {"json.loads"},
    # What its own processes measured.
    "kernels/mlra_vllm/benchmarks/steps.py": {"json.loads"},
    "kernels/mlra_vllm/benchmarks/throughput.py": {"json.loads"},
    "kernels/mlra_vllm/benchmarks/throughput_plot.py": {"json.loads"},
    "megatron_mlra/benchmarks/training/kernels.py": {"gzip", "json.loads"},
    "megatron_mlra/benchmarks/training/progress.py": {"json.loads"},
    # Writes a preset.
    "megatron_mlra/planner/twin.py": {"yaml"},
    # The user's own results and ladder, and packages of the distribution.
    "examples/reproduce/ladder.py": {"json.loads", "yaml"},
    "examples/reproduce/run_results.py": {"json.loads"},
    "examples/reproduce/beyond.py": {"json.loads"},
    "examples/reproduce/made_by.py": {"json.loads"},
    "examples/reproduce/make_tasks.py": {"json.loads"},
    "examples/reproduce/multi_token.py": {"json.loads"},
    "examples/reproduce/tokenized.py": {"json.loads"},
    "examples/reproduce/corpus_sources.py": {"gzip", "json.loads", "zipfile"},
    "examples/reproduce/rehearsal/sources.py": {"gzip", "zipfile"},
    # The project's own results, and what its own benchmarks just wrote.
    "examples/measure/measured.py": {"json.loads"},
    "examples/measure/measure.py": {"json.loads"},
    "examples/measure/pieces.py": {"yaml"},
}
"""File -> what it may use. To be added to with a reason, not for convenience."""


def files() -> list[Path]:
    paths = [ROOT / name for name in CODE]
    return [f for path in paths for f in ([path] if path.is_file() else sorted(path.rglob("*.py")))]


def used(source: str) -> set[str]:
    """Which of READERS a file uses, by whatever name it imports them."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    found = set()

    def note(dotted: str) -> None:
        parts = dotted.split(".")
        found.update({".".join(parts[:i]) for i in range(1, len(parts) + 1)} & READERS)

    for dotted in names.values():
        note(dotted)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile"):
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            dotted = dotted_name(node)
            if dotted:
                first, _, rest = dotted.partition(".")
                note(f"{names.get(first, first)}.{rest}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("require", "import_module", "__import__") and node.args:
                module = node.args[0]
                if isinstance(module, ast.Constant) and isinstance(module.value, str):
                    note(module.value)
    return found


def dotted_name(node: ast.expr) -> str | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_foreign_bytes_go_through_the_readers(path):
    allowed = ALLOWED.get(str(path.relative_to(ROOT)), set())
    assert used(path.read_text()) <= allowed


def test_what_is_allowed_is_used():
    for name, allowed in ALLOWED.items():
        assert used((ROOT / name).read_text()) == allowed, name


def test_torch_load_is_always_of_weights_only():
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and dotted_name(node.func)
            if named and named.endswith("torch.load"):
                flags = {word.arg: ast.literal_eval(word.value) for word in node.keywords
                         if word.arg == "weights_only"}  # fmt: skip
                assert flags == {"weights_only": True}, path


def test_code_of_a_folder_is_run_where_it_is_asked_for_alone():
    said = {
        str(path.relative_to(ROOT)): path.read_text().count("trust_remote_code=True")
        for path in files()
        if "trust_remote_code=True" in path.read_text()
    }
    # `verify --transformers`; a docstring and the model card of an export, which say it to a user.
    assert set(said) <= {
        "megatron_mlra/checkpoint/huggingface/card.py",
        "megatron_mlra/checkpoint/verify/compare.py",
        "megatron_mlra/checkpoint/huggingface/folder.py",
    } | {name for name in said if name.startswith("megatron_mlra/hf/")}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f)",
        "from torch import load",
        "import pickle as p",
        "from json import loads as read",
        "import json\nvalue = json.loads",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "def f():\n    import yaml",
        "require('zstandard', 'x')",
        "import importlib\nimportlib.import_module('pickle')",
        "eval(text)",
    ],
)
def test_a_reader_is_seen_in_every_form(source):
    assert used(source)
    assert not used("import json\nimport torch\nimport numpy as np\njson.dumps(np.ones(1))")
