"""Commands of README and docs, run as they are printed.

A block that is marked runs:

    <!-- runs: what is printed => what is run instead; another => its substitute -->

`<!-- file: NAME -->` before a block writes the block into that file. All blocks of a page run in
one folder. README comes first: other pages use what it makes. README's commands and scripts are
processes that import all themselves; `mlra` of the other pages is forked (support/warm.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ENV, ROOT
from support.programs import program

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("", "docs", "docs/*", "examples")
    for path in ROOT.glob(f"{folder}/*.md".lstrip("/"))
}
MARKED = re.compile(r"^<!-- (runs|file)(?:: (.*?))? -->\n```\w*\n(.*?)^```$", re.M | re.S)
# Installing and activating was done.
DONE_BEFORE = re.compile(r"^(?:pip install|source) .*\n", re.M)
RUN = [page for page, text in PAGES.items() if "<!-- runs" in text and page != "README.md"]


def run_blocks(page: str, folder: Path, mlra: Path) -> str:
    """Run a page's marked blocks in a folder, with this `mlra`; returns what they printed."""
    said = []
    for kind, argument, block in MARKED.findall(PAGES[page]):
        if kind == "file":
            (folder / argument).write_text(block)
            continue
        for pair in filter(None, argument.split("; ")):
            printed, substitute = pair.split(" => ")
            assert printed in block, f"{page}: {printed!r} is not in the block that it is for"
            block = block.replace(printed, substitute)
        folders = dict.fromkeys((mlra.parent, Path(sys.executable).parent))
        path = os.pathsep.join((*map(str, folders), ENV["PATH"]))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", DONE_BEFORE.sub("", block)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=ENV | {"PATH": path, "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": ""},
        )
        assert done.returncode == 0, f"{page}:\n{block}\n{done.stdout}\n{done.stderr}"
        # What a page shows prints what the page says, no library's warnings.
        assert "python train.py" not in block or not done.stderr, done.stderr
        said.append(done.stdout)
    return "\n".join(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder on the first day: some text."""
    folder = tmp_path_factory.mktemp("user")
    parts = (ROOT / "megatron_mlra/layers/config.py").read_text().split("\n\n")
    lines = [json.dumps({"text": part}) for part in parts]
    (folder / "my.jsonl").write_text("\n".join(lines))
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(parts[0][:100])
    items = [{"context": "one ", "choices": ["two", "three"], "answer": 0}]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


@pytest.fixture(scope="module")
def readme(folder) -> str:
    """What README's commands printed."""
    return run_blocks("README.md", folder, program("mlra"))


def test_the_readmes_commands(readme, folder):
    assert "tokens (uint16, vocabulary 257, EOD 256)" in readme
    assert "step 2/2 | lm loss " in readme and "saved step 2 to runs/my" in readme
    assert "\ndef " in readme


@pytest.mark.parametrize("page", RUN)
def test_the_commands_of(page, readme, folder, warm_mlra):
    run_blocks(page, folder, warm_mlra)


def test_marks_are_whole():
    """No mark is lost for a space too many."""
    for page, text in PAGES.items():
        marks = re.findall(r"^\s*<!--\s*(?:runs|file)\b", text, re.M)
        assert len(marks) == len(MARKED.findall(text)), page
    assert {"docs/presets.md", "docs/scale.md", "docs/huggingface.md"} <= {*RUN}
