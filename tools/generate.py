"""Continue prompts with a trained model; see docs/inference.md."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("generate")
