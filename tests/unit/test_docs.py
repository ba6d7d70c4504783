"""The files and the Python that README and docs name are there, and run."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from pathlib import Path

import pytest

from support import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for folder in ("", "docs", "docs/*", "examples", "kernels/**")
    for path in ROOT.glob(f"{folder}/*.md".lstrip("/"))
}
# What a path in a text may start with, and where what a run makes lies.
TOP = ("docs", "examples", "kernels", "megatron_mlra", "tests", "tools")
# Tools that hand on to the entry the flags that they do not know.
PASS_ON = {"benchmark_training", "soak"}
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./-]+\.(?:py|sh|yaml|md|json|png)\b")
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A command of a text, up to the end of its line, which a backslash continues, or of its `quotes`.
COMMAND = re.compile(r"(?:tools/(\w+)|\b(pretrain_mlra))\.py((?:\\\n|[^\n`|&;#])*)")
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


def flags_of(tool: str) -> set[str]:
    """The flags that the package of a tool's command line defines."""
    shell = ast.parse((ROOT / "tools" / f"{tool}.py").read_text())
    homes = [node.module for node in ast.walk(shell) if isinstance(node, ast.ImportFrom)]
    folders = {ROOT / Path(*home.split(".")).parent for home in homes if "command_line" not in home}
    files = [ROOT / "tools" / f"{tool}.py", *(f for d in folders for f in d.glob("*.py"))]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    arguments = [arg for node in nodes if isinstance(node, ast.Call) for arg in node.args]
    words = {str(arg.value) for arg in arguments if isinstance(arg, ast.Constant)}
    # The planner makes a flag of each field of its assumptions.
    fields = {ast.unparse(node.target) for node in nodes if isinstance(node, ast.AnnAssign)}
    words |= {f"--{field.replace('_', '-')}" for field in fields}
    return {"--help"} | {word for word in words if word.startswith("--")}


@pytest.fixture(scope="module")
def entry_flags() -> set[str]:
    """Every flag of the training entry, opposites included."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mlra.training.arguments import add_mlra_arguments
    from megatron_mlra.training.presets import add_opposites

    parser = add_mlra_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    add_opposites(parser)
    return {*parser._option_string_actions}


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_flags_that_exist(page, entry_flags):
    for tool, entry, rest in COMMAND.findall(PAGES[page].read_text()):
        known = entry_flags if entry else flags_of(tool)
        if tool in PASS_ON:
            known = known | entry_flags
        unknown = {*FLAG.findall(rest)} - known
        assert not unknown, f"{page}: {tool or entry}.py has no {sorted(unknown)}"


def test_commands_are_found():
    text = "`tools/plan.py --gpus 8 \\\n  --gpu h100` and --other\npretrain_mlra.py --x | y --z"
    found = [(tool or entry, FLAG.findall(rest)) for tool, entry, rest in COMMAND.findall(text)]
    assert found == [("plan", ["--gpus", "--gpu"]), ("pretrain_mlra", ["--x"])]


def test_the_drawing_of_packages_is_theirs(tmp_path):
    figures = ROOT / "docs" / "figures"
    spec = importlib.util.spec_from_file_location("draw", figures / "draw.py")
    spec.loader.exec_module(draw := importlib.util.module_from_spec(spec))
    draw.architecture(tmp_path / "new.svg")
    drawn = (figures / "architecture.svg").read_text()
    assert (tmp_path / "new.svg").read_text() == drawn, "run python docs/figures/draw.py"
