"""What a run replaces in Megatron and torch: it is all in one list, it is there, and once."""

import ast
import importlib.metadata
import sys
import types

import pytest

from megatron_mlra.training import hook, hooks
from support import ROOT

LISTS = (*hooks.BEFORE_CHECKS, *hooks.BEFORE_TRAINING)
# What sets attributes of Megatron or torch and is no part of a training process's list.
ELSEWHERE = {
    "training/cpu_backend.py": "CUDA read as the CPU, which tests and benchmarks use without a run",
    "training/upstream_fixes.py": "APEX's product by Transformer Engine, a default of arguments",
    "launch/cli.py": "of torchrun: the agent, the order of hosts, which is the first",
}


@pytest.mark.parametrize("hook", LISTS, ids=lambda hook: hook.target)
def test_the_target_is_there_upstream(hook):
    assert hook.target.startswith(("megatron.", "torch."))
    hook.find()
    assert hook.why and hook.by


def test_a_target_that_is_gone_is_named():
    gone = hooks.Hook("megatron.training.training.trains", "", ())
    with pytest.raises(AttributeError, match="trains"):
        hooks.apply((gone,), hooks.Run(None))


def test_each_target_stands_in_the_list_once():
    targets = [hook.target for hook in LISTS]
    assert len(set(targets)) == len(targets)


def test_the_versions_are_those_that_were_read():
    assert importlib.metadata.version("megatron-core") == hooks.READ_IN["megatron-core"]
    assert f"torch=={hooks.READ_IN['torch']}" in (ROOT / "constraints.txt").read_text().split()


@pytest.fixture
def upstream(monkeypatch):
    """A module to replace things in."""
    module = types.ModuleType("upstream_of_a_test")
    exec(
        "class Writer:\n    @staticmethod\n    def write(x): return x\ndef step(x): return x",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(hook, "_applied", set())
    return module


def around(letter: str):
    return lambda function, run: lambda x: f"{letter}{function(x)}{letter}"


def test_wrapping_twice_is_refused(upstream):
    step = hooks.Hook("upstream_of_a_test.step", "", (around("a"), around("b")))
    write = hooks.Hook("upstream_of_a_test.Writer.write", "", (around("c"),))
    hooks.apply((step,), None)
    assert upstream.step("x") == "baxab"
    for again in ((step,), (write, step), (write, write)):
        with pytest.raises(RuntimeError, match="is replaced already"):
            hooks.apply(again, None)
    assert upstream.step("x") == "baxab" and upstream.Writer.write("x") == "x"
    hooks.apply((write,), None)
    assert upstream.Writer.write("x") == upstream.Writer().write("x") == "cxc"


def test_what_a_wrapper_leaves_stays(upstream):
    before = upstream.step
    hooks.apply((hooks.Hook("upstream_of_a_test.step", "", (lambda f, run: f,)),), None)
    assert upstream.step is before


def assigned(path) -> set[str]:
    """Attributes of imported names of Megatron and torch that a file sets."""
    tree, theirs, found = ast.parse(path.read_text()), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None)
            for alias in node.names:
                if (base or alias.name).split(".")[0] in ("megatron", "torch"):
                    theirs.add((alias.asname or alias.name).split(".")[0])
    for node in ast.walk(tree):
        targets = [node.args[0]] if is_setattr(node) else []
        if isinstance(node, ast.Assign):
            targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in theirs:
                found.add(ast.unparse(target))
    return found


def is_setattr(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr"


def test_nothing_else_is_replaced():
    package = ROOT / "megatron_mlra"
    paths = [ROOT / "pretrain_mlra.py", *package.rglob("*.py")]
    found = {str(path.relative_to(package)) for path in paths[1:] if assigned(path)}
    assert found == {*ELSEWHERE} and not assigned(paths[0])
