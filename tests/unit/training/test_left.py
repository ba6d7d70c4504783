"""The line of a run that is ended at once: what it saved, what is still there."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_mlra.training.left import what_is_left


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, " before its first step; nothing was saved by this run"),
        ({"load": "a"}, " before its first step; nothing was saved by this run; a still holds step"
                        " 1,200"),
        ({"load": "a", "save": "a"}, " before its first step; nothing was saved by this run; a"
                                     " still holds step 1,200"),
        ({"save": "new", "load": "a", "curr_iteration": 0, "iteration": 1200},
         " at step 1,201; nothing was saved by this run; a still holds step 1,200"),
        ({"save": "a", "load": "a", "curr_iteration": 1203, "iteration": 1200},
         " at step 1,204; nothing was saved by this run; a still holds step 1,200"),
        ({"save": "a", "curr_iteration": 1210, "iteration": 0},
         " at step 1,211; step 1,200 is saved; continue with --load a --save a"),
        ({"save": "new", "curr_iteration": 7, "iteration": 0},
         " at step 8; nothing was saved by this run"),
        ({"save": "a", "load": "a/", "curr_iteration": 3, "iteration": 1200},
         " at step 1,201; nothing was saved by this run; a still holds step 1,200"),
        ({"save": "a", "load": "a", "curr_iteration": 303, "iteration": 300},
         " at step 304; nothing was saved by this run; a still holds step 1,200"),
        ({"save": "a", "curr_iteration": 1199, "iteration": 0},
         " at step 1,200; step 1,200 is saved; continue with --load a --save a"),
        ({"load": "bad"}, " before its first step; nothing was saved by this run"),
    ],
)  # fmt: skip
def test_what_is_left(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, text in (("a", "1200"), ("bad", "x")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "latest_checkpointed_iteration.txt").write_text(text)
    assert what_is_left(Namespace(**{"save": None, "load": None} | given)) == said
