"""The training kernels under Triton's interpreter, on the CPU: values and every gradient against
the plain torch forms, at sizes that are no power of two and strides that are not contiguous.

Triton fixes at import whether it interprets, so this file runs itself in a child process with
TRITON_INTERPRET=1.
"""

from dataclasses import replace

import pytest
import torch

from support.interpreted import INTERPRETING, run_interpreted

if not INTERPRETING:

    def test_kernels_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert " passed" in printed and "skipped" not in printed

else:
    from megatron_mlra.maths import attention as functional
    from mlra_kernels import latent_projections
    from support.modules import (
        BATCH,
        TOKENS,
        VARIANTS,
        assert_near,
        build,
        run,
    )
    from support.oracle import reference

    TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    """Largest difference over the largest number expected."""

    # s, b, n, g, h, nope, rope, v, l
    SHAPES = {
        "MLRA-4": (70, 2, 4, 1, 4, 16, 8, 16, 16),
        "MLRA-2": (9, 3, 2, 2, 4, 16, 8, 24, 32),
        "odd": (33, 1, 3, 1, 5, 12, 6, 20, 10),
        "one token": (1, 1, 2, 1, 2, 16, 4, 16, 16),
    }

    def draw(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def angles(s: int, rope: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Positions do not start at zero: token 0 must turn too.
        return functional.rope_cos_sin(torch.arange(5, s + 5), rope, 100.0, torch.float32)

    def check(name: str, inputs: dict[str, torch.Tensor], constants: tuple, dtype) -> None:
        """Output and the gradient of every input of operation `name`, by both implementations."""
        results = []
        for module, kind in ((functional, torch.float64), (latent_projections, dtype)):
            leaves = {k: x.to(dtype).to(kind).requires_grad_() for k, x in inputs.items()}
            # As slices of wider tensors, which is how the attention holds several of them.
            held = {k: torch.cat((x, x), dim=-1)[..., : x.size(-1)] for k, x in leaves.items()}
            tables = tuple(
                c.to(kind) if kind == torch.float64 and torch.is_tensor(c) else c for c in constants
            )
            out = getattr(module, name)(*held.values(), *tables)
            grad = draw(*out.shape, seed=7).to(dtype).to(kind)
            results.append((out, *torch.autograd.grad(out, list(leaves.values()), grad)))
        tolerance = TOLERANCES[dtype]
        for what, expected, found in zip(("output", *inputs), *results, strict=True):
            assert found.shape == expected.shape and found.dtype == dtype
            difference = (found.double() - expected).abs().max()
            assert difference <= tolerance * expected.abs().max(), (what, float(difference))

    DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCES))

    @DTYPES
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    def test_rotate_absorb(shape, dtype):
        s, b, n, _, h, nope, rope, _, l = shape
        inputs = {"q": draw(s, b, h, nope + rope, seed=1), "w_uk": draw(n, h, nope, l, seed=2)}
        check("rotate_absorb", inputs, angles(s, rope), dtype)

    @DTYPES
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    def test_join_keys(shape, dtype):
        s, b, n, g, _, _, rope, _, l = shape
        inputs = {"latents": draw(s, b, n, g, l, seed=1), "k_rope": draw(s, b, rope, seed=2)}
        check("join_keys", inputs, angles(s, rope), dtype)

    @DTYPES
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    def test_sum_branches(shape, dtype):
        s, b, n, _, h, _, _, v, l = shape
        inputs = {"z": draw(s, b, n, h, l, seed=1), "w_uv": draw(n, h, v, l, seed=2)}
        check("sum_branches", inputs, (0.5,), dtype)

    @DTYPES
    @pytest.mark.parametrize("tokens, parts, width", [(7, 1, 48), (300, 4, 16), (1, 3, 10)])
    def test_rms_norm(tokens, parts, width, dtype):
        inputs = {"x": draw(tokens, 1, parts, width, seed=1), "weight": draw(parts, width, seed=2)}
        check("rms_norm", inputs, (1e-6, 1.7), dtype)

    @pytest.mark.parametrize("form", ["absorbed", "materialized"])
    @pytest.mark.parametrize("variant", ["MLRA-2", "MLRA-4"])
    def test_the_module_on_these_kernels(variant, form, groups):
        case = replace(VARIANTS[variant], head_norm=variant == "MLRA-2")
        expected = reference(case, TOKENS, BATCH)
        attention = build(
            case,
            groups,
            expected.parameters,
            core_form=form,
            latent_kernels="mlra_kernels",
        )
        assert (
            attention.latent_functions is latent_projections
            and attention.q_norm.latent_functions is latent_projections
        )
        assert_near(run(attention, expected.x, expected.upstream), expected)
