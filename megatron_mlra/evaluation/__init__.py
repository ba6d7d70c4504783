"""Log-likelihoods and perplexity of checkpoints on local text and tasks; analysis of attention.

Start with cli.py (`mlra evaluate`) and analysis/cli.py (`mlra analyze`).

May import:   checkpoint, hf, data, inference, description, command_line, mlra_kernels; torch,
              transformers, and Megatron in held_out.py
Imported by:  training (held-out sets), benchmarks (datasets)
Never:        training code
Held by:      tests/unit/evaluation/, tests/unit/checkpoint/test_lm_eval.py
"""
