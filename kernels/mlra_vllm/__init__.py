"""The vLLM plugin: MLA, GLA and MLRA models in Hugging Face's format, in unmodified vLLM.

Start with plugin.py (which vLLM loads), model.py (the decoder), backend.py (cache and attention).

May import:   vllm, torch, mlra_kernels; transformers, which vLLM brings, for the configuration
Imported by:  vLLM, through the entry point `vllm.general_plugins`
Never:        Megatron, megatron_mlra
Held by:      tests/vllm, tests/unit/test_layering.py
"""
