"""What a library hands to `load_model` and to the steps of `Runner` is checked before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mlra.inference.chunks import Chunk
from megatron_mlra.inference.load import LoadOptions, load_draft, load_model
from megatron_mlra.inference.runner import Runner
from unit.inference.test_engine import MODEL, TENSORS


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("embedding.word_embeddings.weight", lambda t: t[:-1], r"is \[60, 32\], and .* \[61, 32\]"),
        ("mlp.linear_fc2.weight", lambda t: t[:, :-1], "; give the global tensor"),
        ("linear_proj.weight", lambda t: t.flatten(), "; give the global tensor"),
        ("final_layernorm.weight", lambda t: t.int(), "is of int32; give floating-point numbers"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(part, change, message):
    def read(name: str) -> torch.Tensor:
        return change(TENSORS[name]) if name.endswith(part) else TENSORS[name]

    with pytest.raises(ValueError, match=rf"{part} .*{message}"):
        load_model(MODEL, read, LoadOptions(cache_tokens=64))


def test_a_tensor_that_is_missing_is_named():
    for name in ("output_layer.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        some = {n: t for n, t in TENSORS.items() if n != name}
        if len(some) < len(TENSORS):
            with pytest.raises(ValueError, match=f"there is no tensor {name}, which .* needs"):
                load_model(MODEL, some.__getitem__, LoadOptions(cache_tokens=64))
    loaded = load_model(MODEL, TENSORS.__getitem__, LoadOptions(cache_tokens=64, draft=True))
    with pytest.raises(ValueError, match=r"there is no tensor mtp\.layers\.0\."):
        load_draft(loaded, TENSORS.__getitem__)


def prompted(**sizes) -> Runner:
    """A runner of two sequences, [1, 2, 3] on page 0 and [1, 2] on page 1."""
    model = load_model(MODEL, TENSORS.__getitem__, LoadOptions(cache_tokens=64, page_size=16))
    runner = Runner(model, **({"max_batch": 2, "max_pages": 3} | sizes))
    runner.prefill([Chunk([1, 2, 3], 0, [0]), Chunk([1, 2], 0, [1])])
    for row in range(2):
        runner.tables.set(row, [row])
    return runner


@pytest.mark.parametrize(
    ("tokens", "lengths", "pages", "message"),
    [
        ([], [], [], r"the chunks are \[\]; give a list of at least one Chunk"),
        ([1], [3, 2], [[0]], r"tokens are \[1\], lengths \[3, 2\], .*; give three lists of equal"),
        (None, None, None, "tokens are None"),
        ([1] * 3, [2] * 3, [[0], [1], [2]], r"3 sequences in one step.*2; use Runner\(max_batch=3"),
        ([61], [3], [[0]], "token of sequence 0 is 61; use a whole number from 0 to 60"),
        ([1, -1], [3, 2], [[0], [1]], "token of sequence 1 is -1"),
        ([1.5], [3], [[0]], "token of sequence 0 is 1.5"),
        ([True], [3], [[0]], "token of sequence 0 is True"),
        ([10**30], [3], [[0]], "token of sequence 0 is 1000"),
        ([1], [-1], [[0]], "number of cached tokens of sequence 0 is -1"),
        ([1], [3.0], [[0]], "number of cached tokens of sequence 0 is 3.0"),
        ([1], [16], [[0]], "17 tokens of sequence 0 need 2 pages of 16, it has 1"),
        ([1], [3], [[]], "4 tokens of sequence 0 need 1 pages of 16, it has 0"),
        ([1], [64], [[0, 1, 2]], "65 tokens of sequence 0 are more than the 64 positions"),
        ([1], [3], [[0, 1, 2, 3]], r"4 pages of sequence 0, .* 3 a sequence; use Runner\(max_pag"),
        ([1], [3], [[4]], "page of sequence 0 is 4; use a whole number from 0 to 3"),
        ([1], [3], [[-1]], "page of sequence 0 is -1"),
        ([1], [3], [0], "pages of sequence 0 are 0; give a list of ids"),
        ([1], [3], [[2]], r"row 0 of the block tables holds pages \[0\], .* call tables.set\(0, "),
        ([1], [17], [[0, 2]], r"row 0 of the block tables holds pages \[0\]"),
        ([1, 2], [3, 2], [[0], [0]], "sequences 0 and 1 of the step both write to page 0"),
    ],
)
def test_a_decoding_step_that_does_not_fit_is_refused_before_it_caches(
    tokens, lengths, pages, message
):
    runner = prompted()
    before = runner.model.cache.data.nan_to_num().clone()
    with pytest.raises(ValueError, match=message):
        runner.decode(tokens, lengths, pages)
    assert torch.equal(runner.model.cache.data.nan_to_num(), before)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], r"the chunks are \[\]"),
        (Chunk([1], 0, [0]), r"the chunks are Chunk\(.*; give a list"),
        ([[1, 2]], r"chunk of sequence 0 is \[1, 2\]; give a Chunk"),
        ([Chunk([], 0, [0])], "number of tokens in the step of sequence 0 is 0"),
        ([Chunk("ab", 0, [0])], "tokens of sequence 0 are 'ab'; give a list of ids"),
        ([Chunk(torch.tensor(5), 0, [0])], r"tokens of sequence 0 are tensor\(5\); give"),
        ([Chunk([1], 0, [0]), Chunk([61], 0, [1])], "token of sequence 1 is 61"),
        ([Chunk([1] * 17, 0, [0])], "17 tokens of sequence 0 need 2 pages of 16, it has 1"),
        ([Chunk([1], -1, [0])], "number of cached tokens of sequence 0 is -1"),
        ([Chunk([1] * 65, 0, [0, 1, 2])], "65 tokens of sequence 0 are more than the 64 positions"),
        ([Chunk([1], 0, [0, 4])], "page of sequence 0 is 4; use a whole number from 0 to 3"),
        ([Chunk([1], 0, [-1])], "page of sequence 0 is -1"),
        ([Chunk([1], 0, [0]), Chunk([1], 0, [0])], "sequences 0 and 1 .* both write to page 0"),
    ],
)
def test_a_prompts_step_that_does_not_fit_is_refused_before_it_caches(chunks, message):
    runner = prompted()
    before = runner.model.cache.data.nan_to_num().clone()
    for step in (runner.prefill, runner.states):
        with pytest.raises(ValueError, match=message):
            step(chunks)
    assert torch.equal(runner.model.cache.data.nan_to_num(), before)


def test_verified_steps_and_block_tables_are_checked_too():
    runner = prompted()
    with pytest.raises(ValueError, match="number of tokens in the step of sequence 0 is 3; use a"):
        runner.verify([Chunk([1, 2, 3], 3, [0])])
    with pytest.raises(ValueError, match="behind is for a DraftModel, this is the decoder"):
        runner.verify([Chunk([1], 3, [0])], torch.zeros(1, 32))
    for row, pages, message in (
        (2, [0], "row of the block table is 2; use a whole number from 0 to 1"),
        (0, [4], "page of row 0 is 4; use a whole number from 0 to 3"),
        (0, [], "number of pages of row 0 is 0"),
        (0, [0, 1, 2, 3], "number of pages of row 0 is 4; use a whole number from 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.tables.set(row, pages)


def test_a_step_takes_arrays_and_gives_what_lists_give():
    expected = prompted().decode([4, 5], [3, 2], [[0], [1]])
    ids = torch.tensor([4, 5]), np.array([3, 2]), torch.tensor([[0], [1]])
    assert torch.equal(prompted().decode(*ids), expected)
    assert torch.equal(
        prompted().prefill([Chunk(np.array([4, 5]), 0, torch.tensor([2]))]),
        prompted().prefill([Chunk([4, 5], 0, [2])]),
    )
