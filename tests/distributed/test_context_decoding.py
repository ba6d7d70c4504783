"""Ranks among which the tokens of each sequence are cut answer as one rank does.

All cases run in one driver (support/drivers/context_decoding.py), which imports no Megatron; that
one rank's logits are Megatron's is test_inference.py's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.drivers.context_decoding import case_name, cases

TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32."""
FP8_TOLERANCE = 0.05
"""A sum in another order may round a latent to the next e4m3 number."""


@pytest.fixture(scope="module")
def results(run_driver) -> Path:
    """Run all cases once."""
    return run_driver("context_decoding", timeout=900)


@pytest.mark.parametrize("case", cases(), ids=case_name)
def test_ranks_answer_as_one_does(case, results):
    tp, context, *_, cache_dtype = case
    for rank in range(tp * context):
        found = json.loads((results / f"{case_name(case)}-{rank}.json").read_text())
        assert "failed" not in found, found["failed"]
        if cache_dtype == "auto":
            assert found["same"]
        assert found["logprobs"] <= (TOLERANCE if cache_dtype == "auto" else FP8_TOLERANCE)
        # The same tokens in all, to within a page of a sequence and rank.
        (most,) = found["most_alone"]
        assert max(found["most"]) <= -(-most // context) + 4
        assert found["rank_bytes"] * context <= found["alone_bytes"] * 1.3
