"""Write the demo's corpus, English and code from the files of this Python, as JSON lines."""

from megatron_mlra.command_line.entry import run_command

if __name__ == "__main__":
    run_command("demo-corpus")
