"""Megatron's --save folders: torch_dist files read (no pickle is run), written, resharded."""
