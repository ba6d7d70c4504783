"""Bytes of checkpoints on disk: weights read lazily, safetensors written, outputs staged."""
