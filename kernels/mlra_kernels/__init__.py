"""Latent attention kernels for MLA, GLA and MLRA; needs torch and triton only.

Decoding is in `mlra_kernels.latent_decode` (`grouped_decode` for grouped queries, `decoder` for the
rest of a decoding step), prompts in `mlra_kernels.prefill`, the products around an absorbed core in
`mlra_kernels.absorption`, training in `mlra_kernels.latent_projections` (the passes around the
core) and `mlra_kernels.latent_attention` (the core). `mlra_kernels.benchmarks` measures each of
them.

Every public function checks its arguments (`checks.py`) by sizes, strides, dtypes and devices, and
raises ValueError with one line that names the value and the fix. No check waits for a device, so
that calls can be captured in CUDA graphs. What only numbers on the device can tell (lengths, page
ids, slots, positions) the kernels guard themselves: whatever they are, no kernel reads or writes
outside its arguments.
"""

from mlra_kernels import interpreter

if interpreter.INTERPRETED:
    interpreter.mend()
