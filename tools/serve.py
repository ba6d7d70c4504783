"""Serve a trained model over HTTP by vLLM; see docs/serving.md."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("serve")
