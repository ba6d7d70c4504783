"""Inference: paged latent cache, absorbed prefill and decoding, continuous batching."""
