"""Products of few rows on a GPU: against float64, chains of early launches, captured graphs.

Run with `pytest -m gpu tests/gpu/test_products_gpu.py`; needs torch and Triton only.
"""

import time

import pytest
import torch

from mlra_kernels import products
from mlra_kernels.latent_decode import rope_tables
from mlra_kernels.products import ProductConfig, reference
from mlra_kernels.products.configs import candidates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = ((1600, 3072), (3072, 9880), (37, 1030), (4608, 1024), (1, 8), (3072, 2480))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("plain", "residual", "gated", "swiglu")


def normal(*size, dtype=torch.bfloat16, wide=0):
    """Normal numbers, with `wide` columns of NaN behind them."""
    x = torch.randn(*size[:-1], size[-1] + wide, device="cuda", dtype=dtype)
    x[..., size[-1] :] = torch.nan
    return x[..., : size[-1]]


def close(found, expected, limit=None):
    """Relative difference of norms; expected is computed from float64."""
    limit = limit or (2e-5 if found.dtype == torch.float32 else 5e-3)
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < limit, error


@pytest.fixture(autouse=True)
def _seed():
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_epilogue_at_every_size(kind, tokens):
    """Each size with one dtype, others at other epilogues and numbers of tokens."""
    for i, (outputs, inputs) in enumerate(SIZES):
        if kind == "swiglu" and outputs % 2:
            continue
        turn = i + tokens + KINDS.index(kind)
        dtype = DTYPES[turn % 3]
        x = normal(tokens, inputs, dtype=dtype, wide=8)
        weight = normal(outputs, inputs, dtype=dtype) * inputs**-0.5
        more = {"norm": 1 + normal(inputs) / 10, "eps": 1e-6} if turn % 2 else {}
        run = products.swiglu_product if kind == "swiglu" else products.product
        if kind in ("residual", "gated"):
            more[kind] = normal(tokens, outputs, dtype=dtype)
        expected = getattr(reference, run.__name__ + "_reference")(x, weight, **more)
        found = run(x, weight, **more)
        close(found, expected)
        assert torch.equal(run(x, weight, **more, early=True), found)


@pytest.mark.parametrize("tokens", [1, 2])
def test_rotated_queries_are_the_separate_operations(tokens):
    x, weight, norm = normal(tokens, 1024, wide=576), normal(24 * 192, 1024) / 32, normal(1024)
    cos, sin = rope_tables(100, 64, device="cuda")
    arguments = {
        "head": 192, "start": 128, "cos": cos, "sin": sin, "norm": norm, "eps": 1e-6,
        "positions": torch.randint(0, 100, (tokens,), device="cuda"),
    }  # fmt: skip
    found = products.rotated_product(x, weight, **arguments, early=True)
    close(found, reference.rotated_product_reference(x, weight, **arguments))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    ("heads", "branches", "part", "dim"), [(24, 4, 128, 128), (24, 1, 128, 128), (5, 2, 64, 40)]
)
def test_products_per_head(tokens, heads, branches, part, dim):
    q, z = normal(tokens, heads, dim, wide=64), normal(tokens, branches, heads, part)
    w_uk = normal(heads, dim, branches * part) * dim**-0.5
    w_uv = normal(heads, branches * part, dim) * (branches * part) ** -0.5
    for early in (False, True):
        found = products.absorb_queries(q, w_uk, branches, early=early)
        close(found, reference.absorb_queries_reference(q, w_uk, branches))
        found = products.sum_branches(z, w_uv, early=early)
        close(found, reference.sum_branches_reference(z, w_uv))


@pytest.mark.parametrize("pairs", [False, True])
def test_every_cut(pairs):
    x, weight = normal(1, 3072), normal(3000, 3072) / 55
    run = products.swiglu_product if pairs else products.product
    expected = getattr(reference, run.__name__ + "_reference")(x, weight)
    for config in candidates(3072, pairs):
        close(run(x, weight, config=config, early=True), expected)


def _chain(x, weights, norms, early):
    """Layers of norm, SwiGLU, product and residual, of weights whose products are slow and quick
    in turn, so that a kernel that does not wait reads what is not there yet."""
    for (fc1, fc2), norm in zip(weights, norms, strict=True):
        hidden = products.swiglu_product(x, fc1, norm=norm, eps=1e-6, early=early)
        x = products.product(hidden, fc2, residual=x, early=early)
    return x


@pytest.mark.parametrize("tokens", [1, 2])
def test_chains_of_early_launches_are_the_chains_of_whole_ones(tokens):
    """Bitwise, eager and captured, many times, with memory that the allocator gives out again."""
    sizes = [(4096, 64), (64, 8192), (256, 16), (8192, 4096), (32, 32), (2048, 6000)] * 4
    weights = [
        (normal(2 * b, 1024) / 32, normal(1024, b) * b**-0.5) for pair in sizes for b in pair
    ]
    norms = [1 + normal(1024) / 10 for _ in weights]
    x = normal(tokens, 1024)
    expected = _chain(x, weights, norms, False)
    torch.cuda.synchronize()
    _chain(x, weights, norms, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _chain(x, weights, norms, True)
    for i in range(50):
        x.copy_(x.roll(1, 1))
        expected = _chain(x, weights, norms, False)
        assert torch.equal(_chain(x, weights, norms, True), expected), i
        graph.replay()
        assert torch.equal(captured, expected), i


def test_a_result_repeats_to_the_bit():
    x, weight = normal(2, 9880), normal(3072, 9880) / 99
    first = products.product(x, weight, config=ProductConfig(4, 1024, 4, 3))
    for early in (False, True):
        for _ in range(10):
            again = products.product(x, weight, config=ProductConfig(4, 1024, 4, 3), early=early)
            assert torch.equal(first, again)
