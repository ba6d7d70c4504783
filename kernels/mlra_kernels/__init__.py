"""Latent attention kernels for MLA, GLA and MLRA; needs torch and triton only.

Decoding is in `mlra_kernels.latent_decode` (`grouped_decode` for grouped queries, `decoder` for the
rest of a decoding step), prompts in `mlra_kernels.prefill`, the products around an absorbed core in
`mlra_kernels.absorption`, training in `mlra_kernels.latent_projections` (the passes around the
core) and `mlra_kernels.latent_attention` (the core). The modules
`mlra_kernels.benchmarks.latent_decode` and `mlra_kernels.benchmarks.latent_attention` measure
decoding, against the memory roof of the GPU they run on, and the core.
"""
