"""A cache of indexes that came with the data, its checksums with it: what does not fit is built."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_mlra.training.datasets import CachedBlend, CachedDataset

PART = SimpleNamespace(
    indices=np.arange(2, 5, dtype=np.int32),
    dataset=SimpleNamespace(sequence_lengths=np.array([9, 9, 4, 6, 5, 9], dtype=np.int32)),
)
HONEST = (
    np.array([3, 2, 4], dtype=np.int32),
    np.array([[0, 0], [0, 5], [1, 4], [2, 4]], dtype=np.int32),
    np.array([2, 0, 1], dtype=np.uint32),
)


def changed(which: int, at: object, value: object) -> tuple[np.ndarray, ...]:
    arrays = tuple(array.astype(np.int64) for array in HONEST)
    arrays[which][at] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (HONEST, None),
        (changed(0, 0, 3), None),
        (changed(0, 1, 1), "documents that this part"),
        (changed(0, 1, 5), "documents that this part"),
        (changed(2, 0, 3), "samples that are none"),
        (changed(2, 0, -1), "samples that are none"),
        (changed(1, (3, 0), 3), "of no documents"),
        (changed(1, (2, 0), -1), "of no documents"),
        (changed(1, (1, 0), 2), "of no documents"),
        (changed(1, (0, 1), 1 << 40), "outside their documents"),
        (changed(1, (2, 1), 5), "outside their documents"),
        ((HONEST[0], HONEST[1], HONEST[2][:2]), "not of one length"),
        ((HONEST[0], HONEST[1].T, HONEST[2]), "not of one length"),
        ((HONEST[0], HONEST[1].ravel(), HONEST[2]), "no lists of numbers"),
        ((HONEST[0].astype(float), *HONEST[1:]), "no lists of numbers"),
    ],
)
def test_indexes_lead_into_their_data(arrays, said):
    found = CachedDataset._misfit(PART, arrays)
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    ("which", "samples", "said"),
    [
        ([0, 1, 0], [0, 0, 1], None),
        ([0, 2, 0], [0, 0, 1], "datasets that the blend"),
        ([0, 1, 0], [0, 1, 1], "samples that a dataset"),
        ([0, 1, 0], [0, -1, 1], "samples that a dataset"),
        ([0, 1], [0, 0], "not of the blend's length"),
        ([0, 1, 0], [0, 0], "not of the blend's length"),
        ([0.0, 1, 0], [0, 0, 1], "no lists of numbers"),
    ],
)
@pytest.mark.parametrize("size", [3, None])
def test_blends_lead_into_their_datasets(which, samples, said, size):
    blend = SimpleNamespace(datasets=["ab", "c"], size=size, weights=[2, 1])
    found = CachedBlend._misfit(blend, (np.array(which), np.array(samples)))
    assert found is None if said is None else said in found
