"""Benchmarks of the kernels against the memory roof of the GPU they run on."""
