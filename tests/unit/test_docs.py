"""The files and the Python that README and docs name are there, and run."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re

import pytest

from megatron_mlra.command_line import flags_page
from megatron_mlra.command_line.commands import COMMANDS
from support import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for folder in ("", "docs", "docs/*", "examples", "kernels/**")
    for path in ROOT.glob(f"{folder}/*.md".lstrip("/"))
}
# What a path in a text may start with, and where what a run makes lies.
TOP = ("docs", "examples", "kernels", "megatron_mlra", "tests", "tools")
# Commands that hand on to the entry the flags that they do not know.
PASS_ON = {"benchmark-training", "soak"}
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./-]+\.(?:py|sh|yaml|md|json|png)\b")
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A command of a text, up to the end of its line, which a backslash continues, or of its `quotes`.
COMMAND = re.compile(
    r"(?:^|`|\"|--no-python |\()mlra ([a-z][\w-]*)((?:\\\n|[^\n`|&;#])*)", re.MULTILINE
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
UNCONVENTIONAL = re.compile(
    r"\.venv\S*/bin/(?!activate)\w+|tools/\w+\.py|pretrain_mlra\.py"
    r"|python -m megatron_mlra\.(?!command_line)\w+"
)
FLAG = re.compile(r"(?<=\s)--[a-z][\w-]*")
SNIPPETS = [
    pytest.param(code, id=f"{page}-{i}")
    for page, path in PAGES.items()
    for i, code in enumerate(SNIPPET.findall(path.read_text()))
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = [match[1] for match in LINK.finditer(PAGES[page].read_text())]
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (PAGES[page].parent / target).exists()]
    assert not missing, f"{page} links to what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    missing = sorted({n for n in PATH.findall(PAGES[page].read_text()) if not (ROOT / n).exists()})
    assert not missing, f"{page} names files that are not there: {missing}"


def test_patterns_find_links_and_paths():
    assert len(PAGES) > 10 and SNIPPETS
    assert LINK.findall("[a](docs/x.md), ![b](c.png#d)") == [("docs/x.md", ""), ("c.png", "#d")]
    assert PATH.findall("`tools/no.py`, python tests/a/b.py; /tools/x.py my/docs/y.md") == [
        "tools/no.py",
        "tests/a/b.py",
    ]


def test_readme_names_every_package():
    """The file map has each package of megatron_mlra by its name."""
    readme = PAGES["README.md"].read_text()
    table = readme[readme.index("## File map") :].partition("kernels/mlra")[0]
    packages = {path.parent.name for path in (ROOT / "megatron_mlra").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/", table, re.MULTILINE)) == packages


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_import_what_exists(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_mlra"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def test_readme_snippet_runs_as_printed():
    (code,) = SNIPPET.findall(PAGES["README.md"].read_text())
    exec(code, names := {})
    layers = names["transformer_layer_spec"].layer_specs
    attentions = [layer.submodules.self_attention.module.__name__ for layer in layers]
    assert attentions == ["MLRASelfAttention"] * 24


def flags_of(command: str) -> set[str]:
    """The flags of a command and its subcommands."""
    found, left = set(), [COMMANDS[command].parser()]
    while left:
        parser = left.pop()
        found |= {*parser._option_string_actions}
        left += flags_page.subcommands(parser).values()
    return found


@pytest.fixture(scope="module")
def entry_flags() -> set[str]:
    """Every flag of the training entry, opposites included."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mlra.training.flags import add_mlra_arguments
    from megatron_mlra.training.presets import add_opposites

    parser = add_mlra_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    add_opposites(parser)
    return {*parser._option_string_actions}


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_that_exist(page, entry_flags):
    for command, rest in COMMAND.findall(PAGES[page].read_text()):
        assert command in COMMANDS, f"{page}: there is no mlra {command}"
        if command in flags_page.THEIRS or not COMMANDS[command].is_there():
            continue
        known = entry_flags if command == "pretrain" else flags_of(command)
        if command in PASS_ON:
            known = known | entry_flags
        if COMMANDS[command].parser().passes_on:
            rest = rest.partition(" -- ")[0]  # behind it are another program's
        unknown = {*FLAG.findall(rest)} - known
        assert not unknown, f"{page}: mlra {command} has no {sorted(unknown)}"


def test_commands_are_found():
    text = (
        "`mlra plan --gpus 8 \\\n  --gpu h100` and --other\n--no-python mlra pretrain --x | y --z"
    )
    found = [(command, FLAG.findall(rest)) for command, rest in COMMAND.findall(text)]
    assert found == [("plan", ["--gpus", "--gpu"]), ("pretrain", ["--x"])]
    assert COMMAND.findall("run `mlra` on\nmlra-kernels, the command mlra, and") == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_follow_the_convention(page):
    """The environment is activated, the commands are `mlra ...` and `torchrun ... mlra ...`."""
    for kind, block in FENCE.findall(PAGES[page].read_text()):
        if kind in ("", "bash", "sh"):
            assert not (found := UNCONVENTIONAL.findall(block)), f"{page}: {found} in {block}"


def test_other_commands_are_seen():
    text = "```\npython pretrain_mlra.py\n```\n```text\ntools/plan.py\n```\n"
    assert [kind for kind, _ in FENCE.findall(text)] == ["", "text"]
    for line in (
        ".venv/bin/python -m pytest",
        "python tools/plan.py --gpus 8",
        "torchrun --nproc-per-node 2 pretrain_mlra.py",
        "python -m megatron_mlra.launch --standalone",
    ):
        assert UNCONVENTIONAL.findall(line), line
    for line in ("source .venv/bin/activate", "python -m mlra_kernels.benchmarks.operators"):
        assert not UNCONVENTIONAL.findall(line), line


def test_the_drawing_of_packages_is_theirs(tmp_path):
    figures = ROOT / "docs" / "figures"
    spec = importlib.util.spec_from_file_location("draw", figures / "draw.py")
    spec.loader.exec_module(draw := importlib.util.module_from_spec(spec))
    draw.architecture(tmp_path / "new.svg")
    drawn = (figures / "architecture.svg").read_text()
    assert (tmp_path / "new.svg").read_text() == drawn, "run python docs/figures/draw.py"
