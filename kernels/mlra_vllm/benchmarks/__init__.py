"""Benchmarks of these models in vLLM: `python -m mlra_vllm.benchmarks.steps` and `.throughput`."""
