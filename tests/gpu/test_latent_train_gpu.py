"""The training kernels on a GPU, in bf16 and at the paper's shape, against float64.

python -m pytest -m gpu tests/gpu/test_latent_train_gpu.py
"""

from __future__ import annotations

import pytest
import torch

from megatron_mlra.maths import attention
from mlra_kernels import latent_projections

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
"""Relative difference of norms against float64 on the same rounded inputs."""

# s, b, n, g, h, nope, rope, v, l
SHAPES = {
    "MLRA-4 2.9B": (1024, 2, 4, 1, 24, 128, 64, 128, 128),
    "MLRA-2": (513, 3, 2, 2, 8, 64, 32, 64, 64),
    "GLA-2": (300, 1, 1, 2, 8, 128, 64, 128, 256),
    "odd": (77, 1, 3, 1, 5, 48, 12, 40, 24),
}


def operations(shape: tuple[int, ...]) -> dict[str, tuple[dict[str, torch.Tensor], tuple]]:
    s, b, n, g, h, nope, rope, v, l = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device="cuda")

    positions = torch.arange(s, device="cuda")
    tables = attention.rope_cos_sin(positions, rope, 10000.0, torch.float32)
    return {
        "rotate_absorb": ({"q": draw(s, b, h, nope + rope), "w": draw(n, h, nope, l)}, tables),
        "join_keys": ({"latents": draw(s, b, n, g, l), "k_rope": draw(s, b, rope)}, tables),
        "sum_branches": ({"z": draw(s, b, n, h, l), "w": draw(n, h, v, l)}, (0.5,)),
        "rms_norm": ({"x": draw(s, b, n * g, l), "weight": draw(n * g, l)}, (1e-6, 1.7)),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["rotate_absorb", "join_keys", "sum_branches", "rms_norm"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_every_gradient(shape, name: str, dtype: torch.dtype) -> None:
    inputs, constants = operations(shape)[name]
    results = []
    for module, kind in ((attention, torch.float64), (latent_projections, dtype)):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in inputs.values()]
        tables = [c.to(kind) if kind == torch.float64 and torch.is_tensor(c) else c
                  for c in constants]  # fmt: skip
        out = getattr(module, name)(*leaves, *tables)
        generator = torch.Generator("cuda").manual_seed(2)
        grad = torch.randn(out.shape, generator=generator, device="cuda").to(dtype).to(kind)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for what, expected, found in zip(("output", *inputs), *results, strict=True):
        assert found.dtype == dtype
        difference = (found.double() - expected).norm() / expected.norm()
        assert difference <= TOLERANCE[dtype], (what, float(difference))
