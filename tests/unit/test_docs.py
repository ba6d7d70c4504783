"""The files and the Python that README and docs name are there, and run."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from support import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/**/*.md"))
}
# What a path in a text may start with, and where what a run makes lies.
TOP = ("docs", "examples", "kernels", "megatron_mlra", "tests", "tools")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./-]+\.(?:py|sh|yaml|md|json|png)\b")
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
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
