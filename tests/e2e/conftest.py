"""What the end-to-end tests share: a tiny corpus, a preset, and a run to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import ENV, ROOT
from support.runs import TINY, Entry, Run


@pytest.fixture(scope="session")
def entry():
    """The training entry."""
    entry = Entry()
    yield entry
    entry.worker.stdin.close()
    entry.worker.wait(10)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Prefix of some 60 KB of tokenised bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    source = ROOT / "megatron_mlra" / "layers" / "config.py"
    lines = [json.dumps({"text": part}) for part in source.read_text().split("\n\n")]
    (folder / "text.jsonl").write_text("\n".join(lines * 4))
    command = [sys.executable, ROOT / "tools/preprocess_data.py", "--tokenizer", "byte"]
    command += ["--input", folder / "text.jsonl", "--output-prefix", folder / "text"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "text"


@pytest.fixture(scope="session")
def preset(tmp_path_factory, corpus) -> Path:
    """A preset of a model that takes milliseconds a step, on the corpus."""
    path = tmp_path_factory.mktemp("preset") / "tiny.yaml"
    path.write_text(TINY.format(root=ROOT, corpus=corpus))
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory, preset) -> Run:
    """The uninterrupted run, by its own command line: 8 steps, checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "pretrain_mlra.py", "--config", preset),
            *("--save", folder / "save", "--eval-at-start", "--log-interval", "1"),
        ],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=300,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)
