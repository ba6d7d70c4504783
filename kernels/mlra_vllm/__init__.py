"""The vLLM plugin: MLA, GLA and MLRA models, exported to Hugging Face's layout, in unmodified vLLM.

Start with plugin.py (what vLLM loads), model.py (one layer), backend.py (the cache and its step).

May import:   vllm, torch, mlra_kernels; transformers, which vLLM brings, for the configuration
Imported by:  vLLM, through the entry point `vllm.general_plugins`
Never:        Megatron, megatron_mlra
Held by:      tests/vllm, tests/unit/test_layering.py
"""
