"""Inference: paged latent cache, absorbed prefill and decoding, continuous batching.

Start with engine.py (requests), runner.py (one step), model.py (one layer).

May import:   checkpoint, description, maths, sharding, data, command_line, mlra_kernels,
              fault_tolerance.handshake, fault_tolerance.fingerprint; torch
Imported by:  benchmarks, evaluation
Never:        Megatron
Held by:      tests/unit/inference, tests/distributed/test_inference.py
"""
