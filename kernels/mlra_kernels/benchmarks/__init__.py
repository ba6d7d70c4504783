"""Benchmarks of the kernels, compared with the memory roof of the same GPU."""
