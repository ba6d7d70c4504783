"""Chat templates: Jinja text, of which a wrong one would fail at the first chat."""

from __future__ import annotations

from pathlib import Path

from megatron_mlra.command_line.parser import read_text
from megatron_mlra.description.model import CheckpointError


def read_template(file: str | Path) -> str:
    """The text of a chat template. It is parsed, and not run.

    Raises:
        CheckpointError: it is empty, or no Jinja; one line that names the file and the line.
        ValueError: it cannot be read.
    """
    text = read_text(file)
    if not text.strip():
        raise CheckpointError(f"--chat-template {file} is empty; give a template, or leave it out")
    from jinja2 import Environment, TemplateSyntaxError, nodes  # which torch needs
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tag by which transformers marks what the model says."""

        tags = frozenset({"generation"})

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=["jinja2.ext.loopcontrols", Generation]).parse(text)
    except (TemplateSyntaxError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise CheckpointError(
            f"--chat-template {file}{where}: {str(error).rstrip('.')}; give a Jinja template"
        ) from None
    return text
