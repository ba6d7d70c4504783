"""What the conversion tests share: research folders, and the command line in this process."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mlra.checkpoint.cli import main
from megatron_mlra.checkpoint.files import manifest
from support.research_model import VARIANTS, save_research


@pytest.fixture(scope="session")
def research(tmp_path_factory) -> Callable[[str], Path]:
    """The research folder of a variant, by name; not to be changed."""
    root = tmp_path_factory.mktemp("research")

    def folder(variant: str) -> Path:
        path = root / variant
        return path if path.exists() else save_research(path, VARIANTS[variant])

    return folder


@pytest.fixture
def convert(capsys) -> Callable[..., tuple[int, str]]:
    """Run tools/convert_checkpoint.py's main: (exit code, stdout or, failed, stderr)."""

    def run(*argv: object) -> tuple[int, str]:
        quiet = [] if argv[0] == "inspect" else ["--quiet"]
        try:
            code = main([*map(str, argv), *quiet])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.err if code and said.err else said.out

    return run


@pytest.fixture
def megatron(research, convert, tmp_path) -> Path:
    """A Megatron folder, which the test may change."""
    folder = tmp_path / "megatron"
    assert convert("import-official", research("MLRA-4"), folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def unsealed():
    """Folders come without checksums, as other programs and older versions leave them: what is
    changed in them must be found by whoever reads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "write", lambda *_, **__: None)
        yield


LIMIT = 2 << 30
"""Bytes that a refusal may take beside what the process has."""


@pytest.fixture
def bounded():
    """Memory that a refusal could not need is not there."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
