"""Hugging Face folders: config, tensor names, tokenizer files, model card."""
