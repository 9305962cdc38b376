"""The scripts in benchmarks/ are not run here, but what they import must be there."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import curvprune as cp

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def imports(tree: ast.Module, package: str) -> list[tuple[str, str]]:
    """(module, name) of every ``from package... import name``, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def defined(tree: ast.Module) -> set[str]:
    """The names that other scripts can import from this one."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {n.id for target in node.targets for n in ast.walk(target) if is_name(n)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse((FOLDER / f"{name}.py").read_text()) for name in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_what_the_packages_offer(script, trees):
    for module, name in imports(trees[script], "curvprune"):
        parts = module.split(".")
        assert len(parts) <= 2, f"{script}.py imports {module}: a module inside a package"
        face = importlib.import_module(module)
        offered = getattr(face, "__all__", dir(face))
        assert name in offered and not name.startswith("_"), f"{script}.py: {module} has no {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_use_verbs_that_exist(script, trees):
    for node in ast.walk(trees[script]):
        if isinstance(node, ast.Attribute) and is_name(node.value) and node.value.id == "cp":
            known = node.attr in cp.__all__ or node.attr == "__file__"
            assert known, f"{script}.py: curvprune has no {node.attr}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_from_each_other_what_is_there(script, trees):
    for module, name in imports(trees[script], "benchmarks"):
        known = SCRIPTS if module == "benchmarks" else defined(trees[module.split(".")[1]])
        assert name in known, f"{script}.py: {module} has no {name}"


def test_the_zoo_examines_an_architecture():
    command = [sys.executable, str(FOLDER / "zoo.py"), "--one", "gpt2", "--operations"]
    done = subprocess.run(
        [*command, "quantize", "read back"],
        env={**os.environ, "ZOO_LIMIT": "600"},  # busy machines: no time is judged here
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| causal-lm/gpt2 | text | ok | ok | – | – | – | – | – |" in done.stdout
