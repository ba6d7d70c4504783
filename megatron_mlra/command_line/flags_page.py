"""Writes docs/flags.md: every command's own flags, from its parser.

    python -m megatron_mlra.command_line.flags_page > docs/flags.md

The page omits Megatron's flags, which `mlra pretrain` takes too.
"""

from __future__ import annotations

import argparse
import re

from megatron_mlra.command_line.commands import COMMANDS, Command, there

HEAD = """\
# Flags

Every command with its own flags. `--help` prints the same in a terminal, `--version` the versions;
`mlra pretrain --help-megatron` lists Megatron's flags too. This page is written by
`python -m megatron_mlra.command_line.flags_page > docs/flags.md`.

What is at the place of an output: the files of results (`--json`, `--output` of `mlra generate`,
`--png`, `--plot`, `--out`) replace earlier results and empty files, and no other file. Models and
data (`mlra convert`, `reshard`, `preprocess`, `demo-corpus`, `twin`) replace nothing, unless a
command has `--overwrite` and it is given.

Exit codes: 0 done; 1 failed, or the answer is no (logits differ, no layout fits); 2 the command
line or an input was refused; 128 + the number of a signal that ended the command: 130 for Ctrl-C,
with one line on standard error, also for `mlra serve`, which runs until then. `mlra pretrain` and
`mlra launch` end with 0 where a first Ctrl-C or another stop signal stopped the run in order (what
is trained is saved where there is `--save`), since launchers and schedulers take other codes for a
failure and start again. They end with 130 where Ctrl-C came before the run began, or twice.
"""
THEIRS = {
    "launch": "Flags of torchrun, then `-m megatron_mlra.training` (or a script) and its flags:"
    " `mlra launch --help`.\n"
}
"""Command -> text in place of a table, for commands whose flags another program defines."""
HIDDEN = ("--help", "--version")


def page() -> str:
    """The text of docs/flags.md."""
    return "\n".join([HEAD, *(_section(name, command) for name, command in there().items())])


def _section(name: str, command: Command) -> str:
    lines = [f"## mlra {name}", "", f"{command.about[0].upper()}{command.about[1:]}.", ""]
    if name in THEIRS:
        return "\n".join([*lines, THEIRS[name]])
    parser = command.parser()
    below = subcommands(parser)
    if command.first:
        lines += _tables(below[command.first[0]])
    elif below:
        aliases = {other.first[0] for other in COMMANDS.values() if other.first}
        for word, sub in below.items():
            lines += [f"### mlra {name} {word}", ""]
            if word in aliases:
                lines += [f"The same as `mlra {word}`.", ""]
            else:
                lines += [sub.description, "", *_tables(sub)]
    else:
        lines += _tables(parser)
    return "\n".join(lines)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of each subcommand; empty for a parser without subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def _tables(parser: argparse.ArgumentParser) -> list[str]:
    """Lines of the tables of a parser: one per argument group that the parser itself defines, and
    one for all other arguments."""
    lines: list[str] = []
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if not {*HIDDEN} & {*a.option_strings}]
        if not shown:
            continue
        if group.title not in ("positional arguments", "options"):
            lines += [f"{group.title[0].upper()}{group.title[1:]}:", ""]
        elif lines and lines[-1] == "":
            # Positional arguments and flags share one table.
            lines.pop()
            lines += [*map(_row, shown), ""]
            continue
        lines += ["| flag | what |", "|---|---|", *map(_row, shown), ""]
    return lines


def _row(action: argparse.Action) -> str:
    flags = ", ".join(f"`{option}`" for option in action.option_strings)
    values = _values(action)
    if not flags:
        flags = f"`{values.strip()}`"
    elif values:
        flags += f" `{values.strip()}`"
    about = re.sub(r"\s+", " ", (action.help or "") % vars(action))
    return f"| {_cell(flags)} | {_cell(about)} |"


def _values(action: argparse.Action) -> str:
    """The placeholder of the flag's values, as `--help` prints it."""
    name = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    if action.choices is not None and action.metavar is None:
        name = f"{{{','.join(map(str, action.choices))}}}"
    if action.nargs == 0:
        return ""
    return {"+": f"{name} ...", "*": f"[{name} ...]", "?": f"[{name}]"}.get(action.nargs, name)


def _cell(text: str) -> str:
    """The text with its vertical bars escaped, which would end a cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page().rstrip())
