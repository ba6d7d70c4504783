"""The model code of exported Hugging Face folders; imports no other package of this project.

Start with modeling_mlra.py.

May import:   mlra_kernels where it is installed and used; torch, transformers
Imported by:  evaluation, checkpoint (as files)
Never:        any other package of this project: these files are copied into exported folders
Held by:      tests/unit/hf, tests/distributed/test_huggingface.py
"""
