"""Latent attention kernels for MLA, GLA and MLRA; needs torch and triton only.

Decoding is in `mlra_kernels.latent_decode` (`grouped_decode` for grouped queries, `decoder` for the
rest of a decoding step), training in `mlra_kernels.latent_train` (the passes around the core) and
`mlra_kernels.latent_attention` (the core). The module `mlra_kernels.benchmarks.latent_decode`
measures decoding against the memory roof of the GPU it runs on.
"""
