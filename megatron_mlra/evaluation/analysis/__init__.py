"""Analysis of the attention of a trained latent model, layer by layer: `mlra analyze`.

Start with cli.py. passes.py runs the model over held-out text, layers.py measures one layer,
report.py prints a table, plots.py draws a figure.
"""
