"""Log-likelihoods and perplexity of checkpoints, on local text and tasks.

Start with cli.py.

May import:   checkpoint, hf, data, description, command_line; torch, transformers, and
              Megatron in held_out.py
Imported by:  training (held-out sets)
Never:        training code
Held by:      tests/unit/checkpoint/test_lm_eval.py
"""
