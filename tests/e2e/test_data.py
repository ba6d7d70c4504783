"""Data that changed, are damaged, or lie elsewhere: trained on as they are now, or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_mlra.checkpoint.formats import open_checkpoint
from megatron_mlra.command_line.plain_file import sha256
from megatron_mlra.data import PreprocessConfig, TokenizerSpec, preprocess


def write(folder: Path, documents: int, word: str) -> Path:
    """Tokenise `documents` times `word` to folder/data, over what is there."""
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": word * 30}) for _ in range(documents)))
    prefix = str(folder / "data")
    preprocess(PreprocessConfig((str(text),), prefix, TokenizerSpec("byte"), overwrite=True))
    return folder / "data"


@pytest.fixture
def train(entry, preset, tmp_path):
    def run(data, *argv, **job):
        argv = ("--data-path", data, "--train-iters", 2, "--lr-warmup-iters", 1, *argv)
        return entry.run(tmp_path / "run", "--config", preset, "--eval-iters", 1, *argv, **job)

    return run


def test_other_data_under_the_same_prefix_are_trained_on(train, tmp_path):
    for content, (count, word) in enumerate(((40, "first "), (400, "second "), (5, "third "))):
        run = train(write(tmp_path, count, word), "--split", "60,20,20")
        assert (run.code, run.err) == (0, ""), run.err
        caches = [*(tmp_path / "data/cache").glob("CachedDataset-*document_index.npy")]
        assert len(caches) == 3 * (content + 1), "three parts of each content"
        newest = max(caches, key=lambda path: np.load(path, mmap_mode="r").max())
        assert np.load(newest).max() == (39, 399, 399)[content]


def test_a_copy_of_the_data_shares_the_cache(train, corpus, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(f"{corpus}{suffix}", folder / f"text{suffix}")
        run = train(folder / "text", "--data-cache-path", tmp_path / "cache")
        assert run.code == 0 and "warning: data cache" not in run.out, run.out + run.err
    assert len([*(tmp_path / "cache").glob("*sha256.json")]) == 3


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:90]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
}


def test_a_damaged_cache_is_named_and_built_again(train, corpus, tmp_path):
    cache = tmp_path / "cache"
    argv = (corpus, "--data-cache-path", cache)
    first = train(*argv)
    assert first.code == 0, first.err
    files = sorted(cache.glob("CachedDataset-*"))
    whole = {path.name: path.read_bytes() for path in files}
    names = ("document_index.npy", "sample_index.npy", "shuffle_index.npy", "sha256.json")
    for name, damage in zip(names, DAMAGE.values(), strict=True):
        damage(next(path for path in files if path.name.endswith(name)))
    (tmp_path / "run/stdout-0.txt").unlink()
    again = train(*argv)
    assert (again.code, again.err) == (0, "")
    assert again.out.count("warning: data cache ") >= 1
    assert "is damaged (" in again.out and "): built again" in again.out
    assert {path.name: path.read_bytes() for path in files} == whole
    # Whoever made the data may have made the cache beside them, with checksums of its own.
    forged = next(path for path in files if path.name.endswith("shuffle_index.npy"))
    np.save(forged, np.load(forged) + 1)
    sums = forged.with_name(forged.name.replace("shuffle_index.npy", "sha256.json"))
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {forged.name: sha256(forged)}))
    again = train(*argv)
    assert again.code == 0 and "it names samples that are none): built again" in again.out
    assert {path.name: path.read_bytes() for path in files} == whole


def test_blends_are_cached_and_mended_too(train, corpus, tmp_path):
    cache = tmp_path / "cache"
    argv = (corpus, "--data-cache-path", cache, "--data-path", 0.3, corpus, 0.7, corpus)
    assert train(*argv).code == 0
    blend = next(cache.glob("CachedBlend-*dataset_index.npy"))
    blend.write_bytes(blend.read_bytes()[:-4])
    again = train(*argv)
    assert again.code == 0 and "does not match its checksum): built again" in again.out
    (tmp_path / "run/stdout-0.txt").unlink()
    again = train(*argv)
    assert again.code == 0 and "warning: data cache" not in again.out


def test_a_cache_that_cannot_be_written_is_named(train, corpus, tmp_path):
    (tmp_path / "cache").write_text("a file")
    run = train(corpus, "--data-cache-path", tmp_path / "cache")
    assert run.code == 0, run.err
    assert f"warning: data cache {tmp_path}/cache cannot be written (" in run.out


def test_ranks_build_where_the_first_ones_cache_is_not_seen(entry, preset, corpus, tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir(), theirs.mkdir()
    hosts = [
        {"name": "one", "mounts": [[str(mine), str(mine)]]},
        {"name": "two", "mounts": [[str(theirs), str(mine)]]},
    ]
    run = entry.run(
        tmp_path / "run",
        *("--config", preset, "--data-cache-path", mine, "--micro-batch-size", 1),
        ranks=2,
        hosts=hosts,
    )
    assert run.code == 0, run.err
    names = [sorted(path.name for path in folder.glob("*.npy")) for folder in (mine, theirs)]
    assert names[0] == names[1] and len(names[0]) == 9


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_data_that_are_not_what_was_written_are_named_once(train, corpus, tmp_path, suffix):
    data = tmp_path / "text"
    for end in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{end}", f"{data}{end}")
    path = Path(f"{data}{suffix}")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if suffix == ".bin":
        damaged[500] ^= 1
        said = f"error: data file {path} does not match its checksum in {data}.json; copy the data"
    else:
        damaged[40] ^= 1
        said = f"error: data file {path} is damaged: document "
    path.write_bytes(damaged)
    run = train(data)
    assert run.code == 2 and run.err.startswith(said) and run.err.count("\n") == 1, run.err
    path.write_bytes(whole)
    assert train(data).code == 0


def test_blend_weights_are_checked(train, corpus):
    for weight in (0, -1, "nan"):
        run = train(corpus, "--data-path", weight, corpus, 1, corpus)
        assert run.code == 2 and f"data {corpus} has weight {weight}; give a positive" in run.err
    run = train(corpus, "--data-path", 0.5, corpus, corpus, corpus)
    assert run.code == 2 and "weights and prefixes do not alternate" in run.err


def test_blends_need_no_validation(entry, preset, corpus, tmp_path):
    """Megatron's blend of no samples, unlike a single dataset's, is empty: no loader takes it."""
    blend = (0.3, corpus, 0.7, corpus)
    for case, argv in {
        "split": ("--data-path", *blend, "--split", "80,10,10"),
        "parts": ("--train-data-path", *blend, "--valid-data-path", *blend),
    }.items():
        run = entry.run(tmp_path / case, "--config", preset, *argv, "--eval-iters", 0)
        assert run.code == 0 and "validation at" not in run.out, run.err


@pytest.mark.parametrize("by_parts", [False, True])
def test_a_blend_without_weights_goes_on_behind_its_first_pass(entry, preset, tmp_path, by_parts):
    """One of its datasets has parts that are shorter than a sequence."""
    prefixes = []
    for name, documents, word in (("long", 40, "first "), ("short", 10, "x")):
        (tmp_path / name).mkdir()
        prefixes.append(write(tmp_path / name, documents, word))
    argv = ["--data-path", *prefixes, "--split", "80,10,10"]
    if by_parts:
        argv = [word for part in ("train", "valid") for word in (f"--{part}-data-path", *prefixes)]
    argv += ["--train-iters", 80, "--eval-iters", 9, "--log-interval", 80]
    run = entry.run(tmp_path / "run", "--config", preset, *argv)
    assert run.code == 0 and "validation at step 80" in run.out, run.err


def test_parts_without_data_are_named(entry, preset, corpus, tmp_path):
    def run(*argv):
        return entry.run(tmp_path, "--config", preset, *argv)

    for argv, said in (
        (("--train-data-path", corpus), "--valid-data-path is missing; add it, or use --eval-iter"),
        (("--valid-data-path", corpus), "--train-data-path is missing; add it"),
    ):
        refused = run(*argv)
        assert (refused.code, refused.err.count(said)) == (2, 1), refused.err
    file = tmp_path / "parts.json"
    asked = ("--per-split-data-args-path", file)
    for text, said in (
        (
            f'{{"train": ["{corpus}"], "valid": null, "test": null}}',
            "parts.json has no 'valid'; add",
        ),
        ("[1]", "parts.json is no JSON object of"),
        ("{}", "parts.json is no JSON object of"),
    ):
        file.write_text(text)
        refused = run(*asked)
        assert (refused.code, refused.err.count(said)) == (2, 1), refused.err
    file.write_text(f'{{"train": ["{corpus}"], "valid": null, "test": null}}')
    assert run(*asked, "--eval-iters", 0).code == 0
    words = tmp_path / "words.txt"
    words.write_text(str(corpus))
    refused = run("--data-args-path", words, "--split", "1,0,0")
    assert refused.code == 2 and "--split 1,0,0 leaves nothing for validation" in refused.err


def own_data(folder: Path, vocabulary: int) -> Path:
    """Some data of another vocabulary, with the metadata of the preprocessing."""
    folder.mkdir()
    shards = folder / "shard.bin"
    tokens = np.random.default_rng(0).integers(0, vocabulary - 1, 9000).astype(np.uint16)
    tokens[::30] = vocabulary - 1
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    shards.write_bytes(header.tobytes() + tokens.tobytes())
    prefix = str(folder / "data")
    preprocess(PreprocessConfig((str(shards),), prefix, shard_eod_id=vocabulary - 1))
    return folder / "data"


def test_vocabulary_and_end_of_document_are_those_of_the_data(entry, preset, corpus, tmp_path):
    data = own_data(tmp_path / "own", 1000)
    run = entry.run(tmp_path, "--config", preset, "--data-path", data, "--save", tmp_path / "save")
    assert (run.code, run.err) == (0, ""), run.err
    args = open_checkpoint(tmp_path / "save").args
    assert (args.vocab_size, args.null_tokenizer_eod_id, args.padded_vocab_size) == (
        1000,
        999,
        1024,
    )
    # What the command line says wins.
    run = entry.run(tmp_path, "--config", preset, "--data-path", data, "--vocab-size", 999)
    assert run.code == 2 and "has a vocabulary of 1000, the model one of 999; use" in run.err
    # Without metadata, nothing is known.
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", tmp_path / f"bare{suffix}")
    (tmp_path / "own.yaml").write_text(f"base: {preset}\nvocab_size: null")
    run = entry.run(tmp_path, "--config", "own.yaml", "--data-path", tmp_path / "bare")
    assert run.code == 2 and "--vocab-size is missing; give the size of the data" in run.err
    # Another padding is named with its fix.
    run = entry.run(tmp_path, "--config", preset, "--load", tmp_path / "save")
    assert run.code == 2 and (
        "padded_vocab_size is 1024 there, 272 here (train with --padded-vocab-size 1024, or convert"
        " it with 272)" in run.err
    )


def test_train_samples_with_a_preset_in_steps(entry, preset, tmp_path):
    run = entry.run(tmp_path, "--config", preset, "--train-samples", 24)
    assert (run.code, run.err) == (0, ""), run.err
    assert "  length: 6 steps of 128 tokens" in run.out and "step 6/6 | lm loss" in run.out
    assert "\n  saved: nothing, since there is no --save\n" in run.out
    assert "| lr 2.00e-03 |" in next(x for x in run.out.splitlines() if x.startswith("step 2/6"))


def test_two_runs_build_one_cache_together(entry, preset, corpus, tmp_path):
    shared = ("--data-path", corpus, "--data-cache-path", tmp_path / "cache", "--seed", "5")
    folders = [tmp_path / name for name in ("one", "two")]
    started = [entry.start(f, "--config", preset, *shared, "--save", f / "save") for f in folders]
    runs = [entry.wait(*each) for each in zip(folders, started, strict=True)]
    assert [run.code for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert runs[0].losses and runs[0].losses == runs[1].losses
    alone = entry.run(tmp_path / "alone", "--config", preset, *shared[:2], *shared[4:])
    assert alone.losses == runs[0].losses
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]
