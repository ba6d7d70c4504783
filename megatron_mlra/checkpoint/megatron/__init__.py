"""Megatron's --save folders (torch_dist): read without running code, written, resharded."""
