"""Imports go one way: a package's docstring says what it may import; no file is in a circle."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from support import ROOT

CODE = ("pretrain_mlra.py", "megatron_mlra", "kernels", "tools", "tests")
LONGEST_FILE = 400
PACKAGE = ROOT / "megatron_mlra"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
HEADINGS = ("May import:", "Imported by:", "Never:", "Held by:")
# The public face: it names where its names live, and imports them when they are used.
FACE = "megatron_mlra"


def source_files() -> dict[str, Path]:
    """Module name -> file, of everything that is not a test."""
    files = {"pretrain_mlra": ROOT / "pretrain_mlra.py"}
    for package, folder in (
        ("megatron_mlra", PACKAGE),
        ("mlra_kernels", ROOT / "kernels" / "mlra_kernels"),
        ("mlra_vllm", ROOT / "kernels" / "mlra_vllm"),
        ("tools", ROOT / "tools"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


FILES = source_files()


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Every module that this one imports, at its top, inside a function or for type checking only,
    by absolute name."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, base)).rstrip(".")
            # `from package import name` may name a module.
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name for name in named if name in FILES} or {base}
            found |= {base} if not named <= FILES.keys() else set()
    return frozenset(found)


def room(module: str) -> str:
    """The package of megatron_mlra that a module lies in, else its own top-level package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_mlra" and len(parts) > 1 else parts[0]


def may_import(name: str) -> set[str]:
    """The packages of this project that a package's docstring allows, single modules included."""
    doc = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    said = re.search(r"^May import:(.*?)^Imported by:", doc, re.S | re.M)[1]
    words = set(re.findall(r"[\w.]+", said.partition(";")[0]))
    modules = {name.removeprefix("megatron_mlra.") for name in FILES}
    return {word.rstrip(".") for word in words} & {*ROOMS, "mlra_kernels", *modules}


def roots(module: str) -> set[str]:
    """Top-level packages a module imports."""
    return {name.partition(".")[0] for name in imports(module)}


def test_every_module_lies_in_a_package():
    assert {"pretrain_mlra", "megatron_mlra.layers.attention", "mlra_kernels.latent_decode"} <= {
        *FILES
    }
    flat = {path.name for path in PACKAGE.glob("*.py")}
    assert flat == {"__init__.py", "version.py"}


@pytest.mark.parametrize("name", ROOMS)
def test_every_package_says_its_place(name):
    doc = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    assert "Start with " in doc
    assert [heading for heading in HEADINGS if f"\n{heading}" in doc] == [*HEADINGS]


@pytest.mark.parametrize("name", ROOMS)
def test_packages_import_what_their_docstring_allows(name):
    allowed = may_import(name)
    for module in FILES:
        if room(module) != name or module == FACE:
            continue
        used = {other for other in imports(module) if other in FILES and room(other) != name}
        wrong = {
            other
            for other in used
            if room(other) not in allowed
            and other.removeprefix("megatron_mlra.") not in allowed
            and other not in ("megatron_mlra.version", FACE)
        }
        assert not wrong, f"{module} imports {sorted(wrong)}; {name} may import {sorted(allowed)}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_no_file_is_in_a_circle():
    graph = {
        module: {other for other in imports(module) if other in FILES and other != module}
        for module in FILES
        if module != FACE
    }
    graph = {module: others & graph.keys() for module, others in graph.items()}
    assert circles(graph) == []


def test_no_package_is_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module in FILES:
        if module != FACE:
            others = {room(other) for other in imports(module) if other in FILES and other != FACE}
            graph.setdefault(room(module), set()).update(others - {room(module)})
    graph = {name: others & graph.keys() for name, others in graph.items()}
    assert circles(graph) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_the_tests(module):
    assert "tests" not in roots(module) and "support" not in roots(module)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("mlra_kernels")])
def test_kernels_stand_alone(module):
    # Benchmarks plot, and measure rivals where they are installed.
    rivals = {"flash_attn_interface", "flash_attn", "flashinfer", "cudnn", "transformer_engine"}
    extra = {"matplotlib", "numpy", *rivals} if ".benchmarks" in module else set()
    allowed = sys.stdlib_module_names | {"torch", "triton", "mlra_kernels"} | extra
    assert roots(module) <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if room(name) == "mlra_vllm"])
def test_the_vllm_plugin_stands_alone(module):
    allowed = sys.stdlib_module_names | {"vllm", "torch", "mlra_kernels", "mlra_vllm"}
    # transformers, which vLLM brings, knows the configuration's class.
    extra = {"transformers"} if module in ("mlra_vllm.config", "mlra_vllm.plugin") else set()
    extra |= {"matplotlib"} if module == "mlra_vllm.benchmarks.throughput_plot" else set()
    assert roots(module) <= allowed | extra


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_the_vllm_plugin(module):
    assert room(module) == "mlra_vllm" or "mlra_vllm" not in roots(module)


@pytest.mark.parametrize("module", [name for name in FILES if room(name) == "data"])
def test_preprocessing_needs_no_torch(module):
    assert not roots(module) & {"torch", "mlra_kernels"}


@pytest.mark.parametrize("module", [name for name in FILES if room(name) == "hf"])
def test_exported_models_stand_alone(module):
    allowed = {"torch", "transformers", "mlra_kernels", "megatron_mlra"}
    assert roots(module) <= sys.stdlib_module_names | allowed


@pytest.mark.parametrize("module", [name for name in FILES if room(name) == "maths"])
def test_the_maths_needs_only_torch(module):
    assert roots(module) <= sys.stdlib_module_names | {"torch", "megatron_mlra"}


PURE = ("cost", "description", "planner", "command_line")


@pytest.mark.parametrize("module", [name for name in FILES if room(name) in PURE])
def test_plain_python(module):
    assert not roots(module) & {"torch", "megatron", "mlra_kernels", "transformer_engine"}


def test_transformer_engine_is_imported_in_one_file():
    for module in FILES:
        named = {name for name in imports(module) if "transformer_engine" in name}
        if room(module) == "layers" and module != "megatron_mlra.layers.transformer_engine":
            # HAVE_TE and the row-parallel linear are Megatron's own names.
            assert named <= {
                "megatron.core.extensions.transformer_engine",
                "megatron_mlra.layers.transformer_engine",
            }


def test_imports_are_seen_in_every_form(tmp_path, monkeypatch):
    path = tmp_path / "sample.py"
    path.write_text(
        "import torch.distributed as dist\n"
        "from . import config\n"
        "from .specs import block_spec\n"
        "from megatron_mlra.training import batches, steps\n"
        "from megatron_mlra.fault_tolerance import integrity\n"
        "def f():\n    import numpy\n"
    )
    monkeypatch.setitem(FILES, "megatron_mlra.layers.sample", path)
    assert imports("megatron_mlra.layers.sample") == {
        "torch.distributed",
        "numpy",
        "megatron_mlra.layers.config",
        "megatron_mlra.layers.specs",
        "megatron_mlra.training.batches",
        "megatron_mlra.training.steps",
        "megatron_mlra.fault_tolerance.integrity",
    }


def test_the_public_face_is_lazy_and_true():
    import megatron_mlra

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    named = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_mlra.")
        for alias in node.names
    }
    assert named.pop("__version__") == "megatron_mlra.version"
    assert named == megatron_mlra._HOMES
    assert set(megatron_mlra.__all__) == {"__version__", *named}


def test_tools_are_thin_shells():
    lengths = {p.stem: len(p.read_text().splitlines()) for p in (ROOT / "tools").glob("*.py")}
    assert max(lengths.values()) <= 10


def test_files_stay_short():
    paths = [ROOT / name for name in CODE]
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*.py"))]
    assert len(files) > len(FILES)
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert not too_long, f"longer than {LONGEST_FILE} lines: {too_long}"
