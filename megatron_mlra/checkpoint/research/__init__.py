"""Folders of the paper's research code: tensor names of every variant, both ways."""
