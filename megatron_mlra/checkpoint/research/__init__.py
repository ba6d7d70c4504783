"""Folders of the paper's research code, read and written, of every variant."""
