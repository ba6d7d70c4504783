"""Checkpoints: what is checked before one is loaded or written."""
