"""Imports go one way, the arithmetic-only parts import nothing heavy, and files stay readable."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("pretrain_mlra.py", "megatron_mlra", "kernels", "tools", "tests")
LONGEST_FILE = 420

# Each layer imports only from layers below it, and from its own. A name stands for what is in it.
LAYERS = (
    ("pretrain_mlra", "tools", "megatron_mlra.training_benchmark"),
    (
        "megatron_mlra.model",
        "megatron_mlra.arguments",
        "megatron_mlra.data",
        "megatron_mlra.argument_checks",
        "megatron_mlra.presets",
        "megatron_mlra.console",
        "megatron_mlra.progress",
        "megatron_mlra.layer_specs",
        "megatron_mlra.inference",
        "megatron_mlra.checkpoint",
        "megatron_mlra.fault_tolerance",
        "megatron_mlra.launch",
        "megatron_mlra.preprocess",
        "megatron_mlra.evaluation",
        "megatron_mlra.planner",
        "megatron_mlra.dry_run",
    ),
    ("megatron_mlra.attention", "megatron_mlra.baselines", "megatron_mlra.te_linear"),
    (
        "megatron_mlra.projections",
        "megatron_mlra.recompute",
        "megatron_mlra.rotary",
        "megatron_mlra.sharding",
        "megatron_mlra.token_plan",
        "megatron_mlra.context_parallel",
        "megatron_mlra.core_attention",
    ),
    (
        "megatron_mlra.functional",
        "megatron_mlra.routing",
        "megatron_mlra.config",
        "megatron_mlra.fp8",
        "megatron_mlra.baseline_config",
        "megatron_mlra.partition",
        "megatron_mlra.accounting",
        "megatron_mlra.communication",
        "megatron_mlra.hf",
    ),
    ("mlra_kernels",),
)
# Below every layer of megatron_mlra, beside mlra_kernels: they import nothing of this project.
FREE = (
    "megatron_mlra",
    "megatron_mlra.command_line",
    "megatron_mlra.cpu_backend",
    "megatron_mlra.foreign_text",
    "megatron_mlra.latent_sizes",
    "megatron_mlra.tensor_parallel_fit",
    "megatron_mlra.upstream_fixes",
    "megatron_mlra.version",
)


def source_files() -> dict[str, Path]:
    """Module name -> file, of everything that is not a test."""
    files = {"pretrain_mlra": ROOT / "pretrain_mlra.py"}
    for package, folder in (
        ("megatron_mlra", ROOT / "megatron_mlra"),
        ("mlra_kernels", ROOT / "kernels" / "mlra_kernels"),
        ("tools", ROOT / "tools"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


FILES = source_files()


def imports(module: str) -> set[str]:
    """Every module that this one imports, at its top or inside a function, by absolute name."""
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
    return found


def depth(module: str) -> int:
    """Index of the layer a module of this project is in."""
    if module in FREE:
        return len(LAYERS) - 1
    for i, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return i
    raise AssertionError(f"{module} is in no layer; add it to LAYERS")


def roots(module: str) -> set[str]:
    """Top-level packages a module imports."""
    return {name.partition(".")[0] for name in imports(module)}


def test_every_module_is_found_and_has_a_layer():
    assert {"pretrain_mlra", "megatron_mlra.attention", "mlra_kernels.latent_decode"} <= set(FILES)
    for module in FILES:
        depth(module)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    wrong = {name for name in imports(module) if name in FILES and depth(name) < depth(module)}
    assert not wrong, f"{module} imports {sorted(wrong)} from above it"
    assert "tests" not in roots(module)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("mlra_kernels")])
def test_kernels_stand_alone(module):
    # Benchmarks plot, and measure a rival where it is installed.
    extra = {"matplotlib", "numpy", "flash_attn_interface"} if ".benchmarks" in module else set()
    allowed = sys.stdlib_module_names | {"torch", "triton", "mlra_kernels"} | extra
    assert roots(module) <= allowed


@pytest.mark.parametrize("module", [name for name in FILES if ".preprocess" in name])
def test_preprocessing_needs_no_torch(module):
    assert not roots(module) & {"torch", "mlra_kernels"}
    own = {name for name in imports(module) if name.startswith("megatron_mlra.")}
    assert own <= {"megatron_mlra.command_line", "megatron_mlra.foreign_text"} | {
        name for name in FILES if name.startswith("megatron_mlra.preprocess")
    }


@pytest.mark.parametrize("module", [name for name in FILES if ".hf" in name])
def test_exported_models_stand_alone(module):
    own = {name for name in imports(module) if name.startswith("megatron_mlra")}
    assert all(name.startswith("megatron_mlra.hf.") for name in own)
    allowed = {"torch", "transformers", "mlra_kernels", "megatron_mlra"}
    assert roots(module) <= sys.stdlib_module_names | allowed


def test_the_maths_needs_no_megatron():
    assert roots("megatron_mlra.functional") <= sys.stdlib_module_names | {"torch"}


def test_accounting_is_plain_python():
    assert roots("megatron_mlra.accounting") <= sys.stdlib_module_names


@pytest.mark.parametrize("module", FREE)
def test_free_modules_import_nothing_of_this_project(module):
    assert not roots(module) & {"megatron_mlra", "mlra_kernels", "pretrain_mlra", "tools"}


def test_imports_are_seen_in_every_form(tmp_path, monkeypatch):
    path = tmp_path / "sample.py"
    path.write_text(
        "import torch.distributed as dist\n"
        "from . import config\n"
        "from .sharding import LatentShard\n"
        "from megatron_mlra import data, model\n"
        "from megatron_mlra.checkpoint import integrity\n"
        "def f():\n    import numpy\n"
    )
    monkeypatch.setitem(FILES, "megatron_mlra.sample", path)
    assert imports("megatron_mlra.sample") == {
        "torch.distributed",
        "numpy",
        "megatron_mlra.config",
        "megatron_mlra.sharding",
        "megatron_mlra.data",
        "megatron_mlra.model",
        "megatron_mlra.checkpoint.integrity",
    }


def test_files_stay_short():
    paths = [ROOT / name for name in CODE]
    files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("*.py"))]
    assert len(files) > len(FILES)
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}
    assert not too_long, f"longer than {LONGEST_FILE} lines: {too_long}"
