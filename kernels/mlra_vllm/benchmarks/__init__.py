"""What vLLM takes to serve these models: `python -m mlra_vllm.benchmarks.steps`."""
