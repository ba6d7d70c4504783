"""Training speed on a GPU: cases, their correctness, timing and report.

`mlra benchmark-training` is its command line.
"""
