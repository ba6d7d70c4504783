"""Latent attention kernels for MLA, GLA and MLRA; needs torch and triton only.

The operations live in `mlra_kernels.latent_decode`; the module
`mlra_kernels.benchmarks.latent_decode` measures them against the memory roof of the GPU it runs on.
"""
