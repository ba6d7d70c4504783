"""Latent attention kernels for MLA, GLA and MLRA. Needs only torch and triton.

- decoding: `latent_decode`; `grouped_decode` for grouped queries; `decoder` for the other
  operations of a decoding step, `products` for its products of few rows;
- several GPUs: `one_shot`, the sum over ranks of a decoding step;
- prompts: `prefill`, by the plan of `prompts`;
- training: `latent_attention` (the core), `latent_projections` (the passes around the core);
- `absorption`: the products around an absorbed core;
- `benchmarks`: a measurement of each.

Every public function checks sizes, strides, dtypes and devices of its arguments (`checks.py`), and
raises ValueError with one line that names the value and the fix. No check waits for a device, so
that calls can be captured in CUDA graphs. Numbers on the device (lengths, page ids, slots,
positions) are checked by the kernels: for any such number, no kernel reads or writes outside its
arguments.
"""

from mlra_kernels import interpreter

if interpreter.INTERPRETED:
    interpreter.mend()
