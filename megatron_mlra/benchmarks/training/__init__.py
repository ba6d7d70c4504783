"""Training speed on a GPU: cases, their correctness, timing and report.

`tools/benchmark_training.py` is its command line.
"""
