"""Ranks agree on what to load, whatever one of them meets: none waits for one that has given up."""

from __future__ import annotations

import json
import shutil
import subprocess

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from support.random_checkpoint import RandomFolder, latent

RANK = """
import datetime, json, sys
from argparse import Namespace
import torch
from megatron_mlra.checkpoint.files import manifest
from megatron_mlra.fault_tolerance import resume
root, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", f"file://{root}/meet", datetime.timedelta(seconds=240), 2, rank
)
said = {}
for case in sys.argv[3:]:
    if case == "one":
        if rank == 1:
            def fails(*_):
                raise MemoryError("a rank of two")
            manifest.damage = fails
    args = Namespace(load=f"{root}/{case}", save=None, rank=rank, ckpt_step=None, finetune=False)
    try:
        said[case] = resume.whole_step(args)
    except ValueError as error:
        said[case] = str(error)
print(json.dumps(said))
"""


def test_all_ranks_refuse_what_one_cannot_read(warm_python, tmp_path):
    write_megatron(RandomFolder(latent(2, 2)), tmp_path / "saved", progress=False)

    def case(name: str, tracker: bytes = b"4", *forged: str) -> None:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "saved" / "release", folder / "iter_0000004")
        (folder / "latest_checkpointed_iteration.txt").write_bytes(tracker)
        file = folder / "iter_0000004" / MANIFEST
        listed = json.loads(file.read_text())
        listed["files"] |= dict.fromkeys(forged, "x")
        file.write_text(json.dumps(listed))

    case("whole")
    # Sorted last, each would be the share of one rank.
    case("surrogate", b"4", "\ud800")
    case("line", b"4", "a\nb")
    case("long", b"4", "z" * 300)
    case("tracker", b"\xff")
    case("one")
    cases = {
        "whole": 4,
        "surrogate": "integrity.json has an entry that is no file of the folder",
        "line": "integrity.json has an entry that is no file of the folder",
        "long": "z" * 300,
        "tracker": "not a step",
        "one": "cannot be compared (MemoryError: a rank of two)",
    }
    ranks = [
        subprocess.Popen(
            [warm_python, "-c", RANK, tmp_path, str(rank), *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = []
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert rank.returncode == 0, err
        said.append(json.loads([line for line in out.splitlines() if line.startswith("{")][-1]))
    assert said[0] == said[1]
    for name, expected in cases.items():
        found = said[0][name]
        assert found == expected if name == "whole" else expected in found, (name, found)
