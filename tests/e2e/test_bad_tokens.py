"""Token ids that the model has not end a run before they are trained on, in one line, on all ranks.

The data are as Megatron's own tool leaves them: without the metadata that tells the vocabulary.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

FIRST, TOKEN, DOCUMENTS, LENGTH = 2, 41, 40, 90


def write_data(prefix, value: int, dtype=np.int32) -> str:
    """Documents of random bytes, from number FIRST on with `value` at TOKEN."""
    rng = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in range(DOCUMENTS):
        ids = rng.integers(0, 256, LENGTH).astype(dtype)
        if document >= FIRST:
            ids[TOKEN] = value
        builder.add_document(ids, [LENGTH])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


LAYOUTS = {
    "one": (0, []),
    "TP2": (2, ["--tensor-model-parallel-size", 2]),
    "PP2": (2, ["--pipeline-model-parallel-size", 2]),
    "DP2": (2, ["--micro-batch-size", 1]),
    "TP2 packed": (2, ["--tensor-model-parallel-size", 2, "--packed-sequences"]),
    "TP2 unwatched": (2, ["--tensor-model-parallel-size", 2, "--hang-timeout-seconds", 0]),
}


@pytest.mark.parametrize(
    ("layout", "value"),
    [
        *(("one", value) for value in (257, 2**31 - 1, -1)),
        *((layout, 300) for layout in LAYOUTS if layout != "one"),
    ],
)
def test_the_data_the_document_and_the_token_are_named(entry, preset, tmp_path, layout, value):
    data = write_data(tmp_path / "data", value)
    ranks, flags = LAYOUTS[layout]
    watch = [] if "--hang-timeout-seconds" in flags else ["--hang-timeout-seconds", 20]
    argv = ["--config", preset, "--data-path", data, *flags, *watch]
    pids = entry.start(tmp_path, *argv, ranks=ranks)
    runs = [entry.wait(tmp_path, [pid]) for pid in pids]
    assert [run.code for run in runs] == [1] * len(pids)
    err = "".join((tmp_path / f"stderr-{rank}.txt").read_text() for rank in range(len(pids)))
    said = re.findall(
        rf"error(?: \(rank \d\))?: data {data}: document (\d+), token (\d+) has id {value}, outside"
        r" the model's vocabulary of 257; preprocess the data with the model's tokenizer, or give"
        r" its size by --vocab-size\n",
        err,
    )
    assert len(said) == 1 and FIRST <= int(said[0][0]) < DOCUMENTS and said[0][1] == str(TOKEN), err
    if "--hang-timeout-seconds" not in flags:
        assert err.count("error") == 1, err
    assert "step 8/" not in (tmp_path / "stdout-0.txt").read_text()


def test_ids_of_the_vocabulary_train_whatever_the_data_type(entry, preset, tmp_path):
    data = write_data(tmp_path / "data", 256, np.uint16)
    run = entry.run(tmp_path, "--config", preset, "--data-path", data)
    assert (run.code, run.err) == (0, "")


def test_bad_ids_of_validation_data_are_named_too(entry, preset, tmp_path):
    good, bad = write_data(tmp_path / "good", 1), write_data(tmp_path / "bad", 999)
    own = tmp_path / "own.yaml"
    lines = preset.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("data_path", "split"))]
    own.write_text("\n".join(kept))
    flags = ["--train-data-path", good, "--valid-data-path", bad, "--test-data-path", good]
    run = entry.run(tmp_path, "--config", own, *flags)
    assert run.code == 1 and f"data {bad}: document" in run.err, run.err
    assert "step 4/8" in run.out
