"""What the end-to-end tests share: a tiny corpus, a preset, and a run to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.runs import TINY, WHOLE, Run, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Prefix of some 60 KB of tokenised bytes."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def preset(tmp_path_factory, corpus) -> Path:
    """A preset of a model that takes milliseconds a step, on the corpus."""
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(TINY.format(corpus=corpus))
    return path


@pytest.fixture(scope="session")
def whole(entry, tmp_path_factory, preset) -> Run:
    """The uninterrupted run: 8 steps, checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    return entry.run(folder, "--config", preset, "--save", folder / "save", *WHOLE)
