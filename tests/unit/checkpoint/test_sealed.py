"""Folders that conversions and exports write list their checksums: a changed bit is found later."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from megatron_mlra.checkpoint.files.manifest import MANIFEST
from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.checkpoint.huggingface.folder import write_huggingface
from megatron_mlra.checkpoint.megatron.reshard import reshard
from megatron_mlra.checkpoint.megatron.writer import write_megatron
from megatron_mlra.checkpoint.research.folder import write_research
from megatron_mlra.fault_tolerance.checksums import damage
from support.random_checkpoint import RandomFolder, latent

MODEL = latent(4, 4, v_head_dim=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of every kind, each written by this project, with a tokenizer where there can be."""
    root = tmp_path_factory.mktemp("made")
    source = RandomFolder(MODEL)
    write_huggingface(source, root / "exported", tokenizer="byte", progress=False)
    write_huggingface(
        source, root / "shards", tokenizer="byte", max_shard_bytes=200_000, progress=False
    )
    exported = open_checkpoint(root / "exported")
    write_research(exported, root / "research", progress=False)
    write_research(exported, root / "bins", file_format="bin", progress=False)
    write_megatron(exported, root / "imported", progress=False)
    reshard(root / "imported", root / "resharded", files=2, progress=False)
    return root


KINDS = ("exported", "shards", "research", "bins", "imported", "resharded")
NOT_READ = ("latest_checkpointed_iteration.txt", "README.md")
"""Of no numbers: the tracker, which a run rewrites; the model card, which its owner fills in."""


def flipped(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(made, tmp_path, convert, kind):
    random.seed(kind)
    files = [path for path in (made / kind).rglob("*") if path.is_file()]
    files = [f for f in files if f.name not in (MANIFEST, *NOT_READ) and f.suffix != ".py"]
    assert len(files) >= 4
    for i, file in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(made / kind, folder)
        changed = folder / file.relative_to(made / kind)
        flipped(changed, random.randrange(8 * changed.stat().st_size))
        code, error = convert("inspect", folder)
        # Whoever edited a config.json learns how to read it.
        edited = file.suffix in (".json", ".jinja")
        fix = f"if you edited it, remove {changed.parent / MANIFEST}" if edited else "use another"
        assert code == 2 and f"{file.name} does not match its checksum; {fix}" in error, error
        assert error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_whole_unlisted_and_unverified_folders_are_read(made, tmp_path, convert, kind):
    folder = tmp_path / "copy"
    shutil.copytree(made / kind, folder)
    assert convert("inspect", folder)[0] == 0
    # What a user adds is the user's.
    (folder / "README.md").write_text("A model.")
    (folder / "added_tokens.json").write_text("{}")
    assert convert("inspect", folder)[0] == 0
    weights = next(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".distcp"))
    flipped(weights, 8 * (weights.stat().st_size // 2) + 1)
    assert convert("inspect", folder)[0] == 2
    assert convert("inspect", folder, "--no-verify")[0] in (0, 2)  # some bits make NaN
    for manifest in folder.rglob(MANIFEST):
        manifest.unlink()
    assert convert("inspect", folder) == convert("inspect", folder, "--no-verify")


def test_training_checks_a_converted_folder_too(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made / "imported", folder)
    assert damage(folder / "release") is None
    flipped(folder / "release/metadata.json", 9)
    assert "metadata.json does not match its checksum" in damage(folder / "release")


def test_weights_that_are_not_listed_are_refused(made, tmp_path, convert):
    folder = tmp_path / "copy"
    shutil.copytree(made / "shards", folder)
    manifest = folder / MANIFEST
    listed = json.loads(manifest.read_text())
    one = next(name for name in listed["files"] if name.endswith(".safetensors"))
    for name, said in ((one, one), ("config.json", "config.json")):
        files = {key: value for key, value in listed["files"].items() if key != name}
        manifest.write_text(json.dumps(listed | {"files": files}))
        code, error = convert("inspect", folder)
        assert code == 2 and f"integrity.json has no entry of {said}" in error
