"""The command `mlra`: its subcommands, and the module with the body of each.

A body is imported only when its subcommand runs, and when the command line has been checked as far
as its parser declares it (early.py): `--help` and most refusals need neither torch nor Megatron.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_mlra.command_line import early
from megatron_mlra.command_line.loading import announce_loading
from megatron_mlra.command_line.output import say_error
from megatron_mlra.command_line.parser import Version, fail, run
from megatron_mlra.command_line.ranks import REFUSED
from megatron_mlra.command_line.suggest import did_you_mean

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    module: str
    """Module of the body, relative to megatron_mlra: it defines `main(argv)` and `parser()`."""
    about: str
    """One line for `mlra --help`."""
    first: tuple[str, ...] = ()
    """Arguments put in front of those of the command line: a subcommand of a shared parser."""
    flags: str = ""
    """Module of `parser`, if it is not `module`: one that imports no torch."""
    program: bool = False
    """The body is `start()`, which handles its own output and exit, and not `main(argv)`."""
    ranks: bool = False
    """Several processes may run it together, as torchrun starts them."""

    def body(self) -> Callable[..., Any]:
        """The function `main`, or `start` of a program."""
        return getattr(self._import(self.module), "start" if self.program else "main")

    def parser(self) -> Any:
        """The argparse parser of the command's flags."""
        return self._import(self.flags or self.module).parser()

    def run(self, argv: list[str]) -> int | None:
        """Check the command line, then import the body and run it; returns the exit code."""
        try:
            early.check(self.parser(), argv, ranks=self.ranks)
        except (ValueError, OSError) as error:
            return fail(str(error), REFUSED)
        announce_loading("PyTorch", "some seconds")
        return self.body()(argv)

    def is_there(self) -> bool:
        """Whether this installation has the command's module."""
        return (PACKAGE / f"{self.module.replace('.', '/')}.py").is_file()

    @staticmethod
    def _import(module: str) -> Any:
        return importlib.import_module(f"megatron_mlra.{module}")


COMMANDS = {
    "presets": Command("description.cli", "list the models that come with the package"),
    "plan": Command("planner.cli", "memory, time and layouts of a run before it starts"),
    "twin": Command(
        "planner.twin_cli", "write a preset of other attention with as many parameters"
    ),
    "preprocess": Command("data.cli", "turn text, JSON lines, parquet or token shards into data"),
    "demo-corpus": Command("data.demo_cli", "write a small corpus from the files of this Python"),
    "pretrain": Command(
        "training.cli", "train a model, or resume a run", flags="training.flags", program=True
    ),
    "launch": Command(
        "launch.cli", "start the processes of one node, as torchrun does", program=True
    ),
    "compare-losses": Command(
        "benchmarks.losses", "compare the losses of runs in a table and a plot"
    ),
    "generate": Command(
        "inference.cli",
        "continue prompts with a trained model",
        flags="inference.flags",
        ranks=True,
    ),
    "evaluate": Command("evaluation.cli", "perplexity and task accuracy of a checkpoint"),
    "analyze": Command("evaluation.analysis.cli", "measure what each layer's attention does"),
    "serve": Command("serving.cli", "answer requests over HTTP with a trained model"),
    "inspect": Command("checkpoint.cli", "say what a checkpoint holds, and check it", ("inspect",)),
    "verify": Command("checkpoint.cli", "compare the logits of two checkpoints", ("verify",)),
    "reshard": Command(
        "checkpoint.cli", "rewrite a checkpoint's files, or its weights alone", ("reshard",)
    ),
    "convert": Command("checkpoint.cli", "convert checkpoints: Hugging Face, the paper's code"),
    "soak": Command(
        "fault_tolerance.soak", "kill processes of a small run, and compare its losses"
    ),
    "benchmark-cpu": Command(
        "benchmarks.cpu", "training speed on a CPU against plain torch", flags="benchmarks.flags"
    ),
    "benchmark-training": Command(
        "benchmarks.training.cli", "training speed on the GPUs of one host", ranks=True
    ),
    "benchmark-decoding": Command(
        "benchmarks.decoding.cli",
        "time per output token, on GPUs",
        flags="benchmarks.decoding.flags",
        ranks=True,
    ),
}
"""Name -> command, in the order in which a newcomer needs them."""


def there() -> dict[str, Command]:
    """The commands that this installation has."""
    return {name: command for name, command in COMMANDS.items() if command.is_there()}


def overview() -> str:
    """What `mlra --help` prints."""
    known = there()
    width = max(map(len, known))
    lines = (f"  {name:{width}}  {command.about}" for name, command in known.items())
    return "\n".join(
        (
            "usage: mlra COMMAND [flags ...]",
            "",
            "Multi-Head Low-Rank Attention (MLRA) on Megatron-core, from text to a model.",
            "",
            "commands:",
            *lines,
            "",
            "A first run: mlra pretrain --config debug --mock-data --save runs/first",
            "mlra COMMAND --help shows a command's flags; mlra --version the versions.",
        )
    )


def main() -> NoReturn:
    """Run the program `mlra` on `sys.argv`, and exit."""
    name, *rest = sys.argv[1:] or [""]
    if name in ("-h", "--help", "help", "--version"):
        run(lambda: print(Version.text() if name == "--version" else overview()))
    run_command(name, rest)


def run_command(name: str, rest: list[str] | None = None) -> NoReturn:
    """Run one command and exit.

    Args:
        rest: its flags; None for those of `sys.argv`.
    """
    rest = sys.argv[1:] if rest is None else rest
    command = COMMANDS.get(name)
    if command is None or not command.is_there():
        _refuse(name)
    # argparse shows argv[0] as the program's name, and a parser of subcommands adds their names.
    sys.argv = ["mlra" if command.first else f"mlra {name}", *command.first, *rest]
    if command.program:
        try:
            start = command.body()
        except KeyboardInterrupt:
            # The program, which answers Ctrl-C itself, is still being imported.
            say_error("error: interrupted")
            sys.exit(128 + signal.SIGINT)
        start()
    run(lambda: command.run(sys.argv[1:]))


def _refuse(name: str) -> NoReturn:
    if name:
        near = did_you_mean(name, there()) or "; mlra --help lists the commands"
        say_error(f"error: mlra has no command {name}{near}")
    else:
        for line in (*overview().splitlines(), "", "error: name a command"):
            say_error(line)
    sys.exit(REFUSED)
