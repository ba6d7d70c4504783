"""Whether two checkpoints are the same model: the paper's forward pass, compared."""
