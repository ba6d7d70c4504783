"""What an exported Hugging Face folder ships with: self-contained, nothing of this project.

The files import torch and transformers only, and `mlra_kernels` where it is installed and used.
"""
