"""Comparison of two checkpoints by the logits of the paper's forward pass; and `inspect`."""
