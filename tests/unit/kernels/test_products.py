"""Products of a few rows under Triton's interpreter, on the CPU, and compiled for sm_90a.

As test_mlra_kernels_interpreter.py, this file runs itself in a child process.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from support.interpreted import INTERPRETING, run_interpreted

TYPES = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64", "eps": "fp32"}

if not INTERPRETING:
    from mlra_kernels.products import configs
    from mlra_kernels.products.heads_kernel import heads_kernel
    from mlra_kernels.products.kernel import SWIGLU, product_kernel

    def test_products_under_the_interpreter():
        printed = run_interpreted(__file__)
        assert " passed" in printed and "skipped" not in printed

    def machine_code(kernel, constants, warps, folder):
        """SASS for sm_90a, bytes of stack a thread, and the name that a trace shows."""
        signature, values, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], values[(i,)] = "constexpr", constants[name]
                continue
            signature[name] = TYPES.get(name, "*bf16" if name.endswith("_ptr") else "i32")
            if name != "eps":
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, values, attributes)
        options = {"num_warps": warps, "launch_pdl": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        binary = folder / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        run = [str(tool), "--dump-resource-usage", "--dump-sass", str(binary)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        return text, int(re.search(r"STACK:(\d+)", text).group(1)), compiled.metadata.name

    def reads_weights_before_it_waits(sass):
        """Every load in front of the wait is of 16 bytes, there is one, and no store is."""
        before, after = sass.split("ACQBULK")
        assert "STG" not in before and "STG" in after
        loads = re.findall(r"LDG\S*", before)
        return bool(loads) and all(load.endswith(".128") for load in loads)

    def test_no_spills_and_weights_before_the_wait(tmp_path):
        """The first half of the MLP at two rows, which needs most registers."""
        cut = configs.default_config(19760, 3072, pairs=True)
        constants = {
            "T": configs.MOST_TOKENS, "K": 3072, "R": 19760, "STRIDE": 3072, "N": cut.rows,
            "CHUNK": cut.chunk, "NORM": True, "EPILOGUE": SWIGLU.value, "HEAD": 2, "START": 0,
            "EARLY": True,
        }  # fmt: skip
        sass, stack, name = machine_code(product_kernel, constants, cut.warps, tmp_path)
        assert stack == 0 and reads_weights_before_it_waits(sass)
        assert name == "product_kernel_swiglu_19760x3072" and name in sass

    def test_products_per_head_too(tmp_path):
        inputs, outputs = 512, 128
        rows, columns = configs.heads_cut(24, inputs, outputs)
        constants = {
            "T": 1, "K": inputs, "J": outputs, "X_PART": 128, "OUT_PART": 128, "ROWS": rows,
            "PASS": 1024 // columns, "COLUMNS": columns, "EARLY": True,
        }  # fmt: skip
        sass, stack, name = machine_code(heads_kernel, constants, 4, tmp_path)
        assert stack == 0 and reads_weights_before_it_waits(sass)
        assert name == "heads_kernel_512to128" and name in sass

else:
    from mlra_kernels import products
    from mlra_kernels.products import ProductConfig, reference

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    ONE = ProductConfig(8, 256, 1)
    CUTS = (
        None, ONE, ProductConfig(4, 256, 2, persistent=2), ProductConfig(2, 512, 2, persistent=1)
    )  # fmt: skip

    def draw(*size, dtype=torch.float32, wide=0):
        """Normal numbers, with `wide` columns of NaN behind them."""
        generator = torch.Generator().manual_seed(sum(size) + wide)
        x = torch.randn(*size[:-1], size[-1] + wide, generator=generator).to(dtype)
        x[..., size[-1] :] = torch.nan
        return x[..., : size[-1]]

    def close(found, expected):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        tolerance = 2e-4 if found.dtype == torch.float32 else 4e-3
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)

    @pytest.mark.parametrize(
        ("tokens", "inputs", "outputs", "kind", "normed", "dtype", "config"),
        [
            (1, 1, 1, "plain", False, torch.float32, None),
            (1, 200, 7, "residual", True, torch.float16, CUTS[1]),
            (1, 256, 9, "gated", False, torch.float32, CUTS[2]),
            (2, 530, 3, "plain", True, torch.float16, CUTS[3]),
            (2, 300, 7, "residual", False, torch.float32, CUTS[2]),
            (2, 30, 5, "gated", True, torch.float16, None),
        ],
    )
    def test_product(tokens, inputs, outputs, kind, normed, dtype, config):
        """Odd shapes, slices of wider tensors with NaN beside them, several blocks a program."""
        x = draw(tokens, inputs, dtype=dtype, wide=3)
        weight = draw(outputs, inputs, dtype=dtype, wide=5).mul_(inputs**-0.5)
        more = {} if kind == "plain" else {kind: draw(tokens, outputs, dtype=dtype, wide=2)}
        if normed:
            more |= {"norm": draw(inputs), "eps": 1e-6}
        found = products.product(x, weight, **more, config=config)
        close(found, reference.product_reference(x, weight, **more))

    @pytest.mark.parametrize(
        ("tokens", "f", "config"), [(1, 1, None), (1, 5, CUTS[3]), (2, 9, ONE)]
    )
    def test_swiglu_product(tokens, f, config):
        x, weight = draw(tokens, 270), draw(2 * f, 270) * 270**-0.5
        more = {"norm": draw(270), "eps": 1e-6} if tokens == 2 else {}
        found = products.swiglu_product(x, weight, **more, config=config)
        close(found, reference.swiglu_product_reference(x, weight, **more))

    @pytest.mark.parametrize(
        ("positions", "head", "start", "config"),
        [([8], 12, 10, None), ([-1, 0], 6, 0, CUTS[2]), ([5, 9], 12, 8, ONE)],
    )
    def test_rotated_product(positions, head, start, config):
        x, weight = draw(len(positions), 64), draw(2 * head, 64)
        angles, positions = draw(9, (head - start) // 2), torch.tensor(positions)
        arguments = {
            "head": head, "start": start, "cos": angles.cos(), "sin": angles.sin(),
            "positions": positions, "norm": draw(64), "eps": 1e-6,
        }  # fmt: skip
        found = products.rotated_product(x, weight, **arguments, config=config)
        close(found, reference.rotated_product_reference(x, weight, **arguments))
        assert found.isnan().sum() == 2 * (head - start) * sum(not 0 <= p < 9 for p in positions)

    @pytest.mark.parametrize(
        ("tokens", "branches", "heads", "part", "dim", "dtype"),
        [(1, 1, 1, 5, 3, torch.float32), (2, 2, 2, 12, 70, torch.float16)],
    )  # fmt: skip
    def test_products_per_head(tokens, branches, heads, part, dim, dtype):
        q = draw(tokens, heads, dim, dtype=dtype, wide=7)
        w_uk = draw(heads, dim, branches * part, dtype=dtype) * dim**-0.5
        found = products.absorb_queries(q, w_uk, branches)
        close(found, reference.absorb_queries_reference(q, w_uk, branches))
        z = draw(tokens, branches, heads, part, dtype=dtype, wide=4)
        w_uv = draw(heads, branches * part, dim, dtype=dtype) * (branches * part) ** -0.5
        close(products.sum_branches(z, w_uv), reference.sum_branches_reference(z, w_uv))
        wide = torch.full((tokens, heads, 2 * dim), torch.nan, dtype=dtype)
        products.sum_branches(z, w_uv, out=wide[..., :dim])
        assert torch.equal(wide[..., :dim], products.sum_branches(z, w_uv))
        assert wide[..., dim:].isnan().all()
        with pytest.raises(ValueError, match=r"out is \[.*give \["):
            products.sum_branches(z, w_uv, out=wide)

    def test_a_row_has_the_same_bits_however_many_are_beside_it():
        x, weight, norm = draw(2, 300), draw(5, 300), draw(300)
        whole = products.product(x, weight, norm=norm, config=ONE)
        assert torch.equal(products.product(x[1:], weight, norm=norm, config=ONE), whole[1:])

    def test_refusals_in_one_line():
        x, weight = draw(2, 8), draw(6, 8)
        with pytest.raises(ValueError, match="give 1 to 2, and more to torch"):
            products.product(draw(3, 8), weight)
        with pytest.raises(ValueError, match="residual and gated are both given"):
            products.product(x, weight, residual=draw(2, 6), gated=draw(2, 6))
        with pytest.raises(ValueError, match="gates and ups"):
            products.swiglu_product(x, weight[:5])
        with pytest.raises(ValueError, match="give whole heads, and even numbers"):
            products.rotated_product(
                x, weight, head=4, start=2, cos=draw(3, 1), sin=draw(3, 1),
                positions=torch.zeros(2, dtype=torch.int64),
            )  # fmt: skip
        # A view with heads 2^30 numbers apart, of memory that nobody touches.
        far = torch.empty(2**31 + 8, dtype=torch.float16).as_strided((1, 3, 4), (0, 2**30, 1))
        with pytest.raises(ValueError, match=r"q_nope reaches over 2\^31 numbers of memory: call"):
            products.absorb_queries(far, draw(3, 4, 8, dtype=torch.float16), 2)
        with pytest.raises(ValueError, match="rows is 3: give a power of two"):
            ProductConfig(3, 256, 1)
