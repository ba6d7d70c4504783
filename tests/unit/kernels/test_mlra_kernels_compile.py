"""The Hopper kernel compiled for sm_90a without a GPU: no spills, and registers that stay apart.

ptxas once gave the probabilities of an FP8 tile the registers of the queries, which the next tile
needs again; the results were wrong from the second tile on. The machine code shows it.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mlra_kernels.latent_decode.configs import default_config
from mlra_kernels.latent_decode.descriptors import GL_DTYPES
from mlra_kernels.latent_decode.hopper_kernel import latent_decode_hopper_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)
POINTERS = {
    "q_ptr": "*bf16",
    "q_rope_ptr": "*bf16",
    "table_ptr": "*i32",
    "seqlens_ptr": "*i32",
    "schedule_ptr": "*i32",
    "out_ptr": "*bf16",
    "lse_ptr": "*fp32",
    "part_out_ptr": "*fp32",
    "part_lse_ptr": "*fp32",
}


def descriptor_type(rows, columns, dtype):
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, "fp8e4nv")
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], GL_DTYPES[dtype])
    return f"tensordesc<{name}[{rows}, {columns}],{layout!r}>"


def compile_kernel(dim, rope, heads, latents, fp8, folder):
    """Return the compiled kernel's SASS and its bytes of stack a thread."""
    config = default_config(heads, dim, 1 if fp8 else 2, 64, True)
    tile = config.block_n
    constants = {
        "Q_LEN": 1, "HEADS": heads, "LATENTS": latents, "GROUPS": 1, "M": config.block_m,
        "N": tile, "D": dim, "R": rope, "PAGE": 64, "FP8": fp8, "STAGES": config.num_stages,
        "WARPS_N": config.warps_n, "W": config.consumers,
        "CONSUMER_REGS": config.consumer_registers,
    }  # fmt: skip
    rope_type = descriptor_type(tile, rope, torch.bfloat16)
    types = {
        **POINTERS,
        "c_desc": descriptor_type(tile, dim, torch.float8_e4m3fn if fp8 else torch.bfloat16),
        "r_desc": rope_type,
        "s_desc": descriptor_type(1, tile, torch.float32) if fp8 else rope_type,
        "scale_log2": "fp32",
    }
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(latent_decode_hopper_kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "i32")
        if name in POINTERS or name.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        GluonASTSource(latent_decode_hopper_kernel, signature, values, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": config.num_warps, "maxnreg": config.max_registers},
    )
    assert kernel.metadata.shared <= 232448, "more shared memory than a block of an H100 has"
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = [str(tool), "--dump-resource-usage", "--dump-sass", str(binary)]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return text, int(re.search(r"STACK:(\d+)", text).group(1))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("dim", "rope", "heads", "latents", "stack"),
    [(64, 32, 24, 4, 0), (128, 64, 64, 1, 0), (256, 64, 32, 1, 0), (512, 64, 64, 1, 32)],
)
def test_no_spills_and_queries_keep_their_registers(
    dim, rope, heads, latents, stack, fp8, tmp_path
):
    sass, spilled = compile_kernel(dim, rope, heads, latents, fp8, tmp_path)
    assert "HGMMA" in sass and "UTMALDG" in sass
    assert spilled <= stack, f"{spilled} bytes of stack"
    queries = set(re.findall(r"HGMMA\.\S+ R\d+, (R\d+), gdesc\[UR\d+\], ", sass))
    values = set(re.findall(r"HGMMA\.\S+ R\d+, (R\d+), gdesc\[UR\d+\]\.tnspB", sass))
    assert not queries & values, f"queries and probabilities share {queries & values}"
    assert bool(queries) == (fp8 and dim == 128)
