"""Training speed on a GPU (`mlra benchmark-training`): cases, their correctness, timing, report."""
