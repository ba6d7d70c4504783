"""From a finished run to a server: an export, vLLM's own server, a page to talk to.

Start with cli.py.

May import:   checkpoint, command_line, description
Imported by:  the command `mlra serve`
Never:        vllm, mlra_vllm: they run in an environment of their own
Held by:      tests/unit/serving, tests/vllm/test_serve.py
"""
