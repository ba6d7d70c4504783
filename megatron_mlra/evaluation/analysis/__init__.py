"""What the attention of a trained latent model does, layer by layer: `mlra analyze`.

Start with cli.py: passes.py goes through the held-out text, layers.py measures one layer,
report.py tells it in a table, plots.py draws it.
"""
