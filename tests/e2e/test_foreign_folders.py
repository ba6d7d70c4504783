"""`--load` of a stranger's folder: code in it is refused before a step, on every rank."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))

import hostile


@pytest.mark.parametrize("make", hostile.CODE, ids=lambda make: make.__name__)
def test_code_in_a_loaded_folder_is_not_run(make, whole, entry, preset, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(whole.folder / "save" / "iter_0000008", folder / "iter_0000008")
    (folder / "iter_0000008" / "integrity.json").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    make(folder / "iter_0000008", tmp_path / "canary")
    run = entry.run(tmp_path / "run", "--config", preset, "--load", folder, "--train-iters", 12)
    assert run.code == 2 and "holds code, which is not run" in run.err
    assert not (tmp_path / "canary").exists()
