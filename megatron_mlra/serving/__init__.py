"""Serves a finished run: an export, vLLM's own server, a chat page.

Start with cli.py.

May import:   checkpoint, command_line, description
Imported by:  the command `mlra serve`
Never:        vllm and mlra_vllm, which run in their own environment
Held by:      tests/unit/serving, tests/vllm/test_serve.py
"""
