"""The portable kernels of a decoding step compiled for Blackwell (sm_100) without a GPU.

The Hopper kernels' instructions do not exist there, so these are what a Blackwell GPU runs. That
they compile says nothing of their speed; what they compute is test_mlra_kernels_interpreter.py's.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mlra_kernels.grouped_decode.kernel import grouped_decode_kernel
from mlra_kernels.latent_decode.append_kernel import latent_cache_append_kernel
from mlra_kernels.latent_decode.combine_kernel import combine_kernel, merge_states_kernel
from mlra_kernels.latent_decode.configs import combine_config, default_config
from mlra_kernels.latent_decode.decode_kernel import latent_decode_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)
BLACKWELL = GPUTarget("cuda", 100, 32)
SHARED_BYTES = 232448
"""Of a program, at most, as on Hopper."""
TENSOR_COLUMNS = 512
"""Of tensor memory, at most, of one multiprocessor."""
TYPES = {
    "latent_ptr": "*bf16", "rope_ptr": "*bf16", "scale_ptr": "*fp32", "table_ptr": "*i32",
    "seqlens_ptr": "*i32", "schedule_ptr": "*i32", "planned_ptr": "*i32", "splits_ptr": "*i32",
    "lse_ptr": "*fp32", "lses_ptr": "*fp32", "part_out_ptr": "*fp32", "part_lse_ptr": "*fp32",
    "cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "slots_ptr": "*i64",
    "slot_ptr": "*i64", "scale_log2": "fp32", "latent_scale": "fp32", "norm_eps": "fp32",
}  # fmt: skip


def built(kernel, constants: dict, options: dict, **types: str):
    """The compiled kernel; other pointers than those of TYPES are bf16, other numbers int32."""
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        usual = "*bf16" if name.endswith("_ptr") else "i32"
        signature[name] = types.get(name, TYPES.get(name, usual))
        if name.endswith("_ptr") or name.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=BLACKWELL, options=options)


def stack_bytes(compiled, folder: Path) -> int:
    """Bytes of registers that a thread spills."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = [str(tool), "--dump-resource-usage", str(binary)]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text).group(1))


@pytest.mark.parametrize(
    ("dim", "heads", "latents", "fp8", "stack"),
    [
        pytest.param(128, 64, 1, False, 256, id="MLRA-4 at TP4"),
        pytest.param(128, 64, 1, True, 0, id="MLRA-4 at TP4, FP8"),
        pytest.param(128, 24, 4, False, 0, id="MLRA-4, 24 heads, whole"),
        pytest.param(512, 64, 1, False, 1280, id="MLA"),
    ],
)
def test_latent_decode(dim, heads, latents, fp8, stack, tmp_path):
    config = default_config(heads, dim, 1 if fp8 else 2, 64, hopper=False)
    constants = {
        "Q_LEN": 1, "HEADS": heads, "LATENTS": latents, "GROUPS": 1, "M": config.block_m,
        "N": config.block_n, "D": dim, "R": 64, "PAGE": 64, "FP8": fp8, "PRECISION": "tf32",
        "STAGES": config.num_stages, "PDL": True,
    }  # fmt: skip
    latent = "*fp8e4nv" if fp8 else "*bf16"
    compiled = built(
        latent_decode_kernel, constants, {"num_warps": config.num_warps}, latent_ptr=latent
    )
    assert ".target sm_100" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_BYTES
    assert compiled.metadata.tmem_size <= TENSOR_COLUMNS
    assert stack_bytes(compiled, tmp_path) <= stack
    # Blackwell's own products take 64 or 128 rows; fewer go to the instructions of older GPUs.
    assert ("tcgen05.mma" in compiled.asm["ptx"]) == (config.block_m >= 64)


def test_merging_appending_and_grouped_queries(tmp_path):
    cut = combine_config(148, 1, 128)
    kernels = [
        (combine_kernel, {"Q_LEN": 1, "HEADS": 64, "LATENTS": 1, "D": 128, "X": cut.rows,
                          "S": cut.parts, "DB": cut.columns, "PDL": True}),
        (merge_states_kernel, {"D": 128, "DB": 128, "X": 4, "S": 4}),
        (latent_cache_append_kernel, {"L": 1, "D": 128, "H": 32, "PAGE": 64, "FP8": False,
                                      "PDL": True}),
        (grouped_decode_kernel, {"HEADS": 8, "KV_HEADS": 2, "J": 4, "M": 16, "N": 64, "D": 128,
                                 "PAGE": 64, "MIN_TOKENS": 256}),
    ]  # fmt: skip
    for kernel, constants in kernels:
        compiled = built(kernel, constants, {"num_warps": 4})
        assert ".target sm_100" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_BYTES
        assert stack_bytes(compiled, tmp_path) == 0
