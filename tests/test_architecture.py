"""Which package may import which: the table that keeps the rooms of the house apart."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "curvprune"

# package or module of the floor: what it may import. docs/architecture.md points to this table.
MAY_IMPORT: dict[str, set[str]] = {
    "options": set(),
    "failures": set(),
    "places": set(),
    "files": {"failures", "places"},
    "distributed": set(),
    "compat": set(),
    "schema": set(),
    "model": {"options", "schema", "compat"},
    "planning": {"schema"},
    "certificate": {"model", "planning", "schema"},
    "curvature": {"model", "distributed", "schema", "compat"},
    "compression": {"model", "options", "schema", "compat"},
    "pricing": {
        *("curvature", "compression", "planning", "model", "options", "schema", "compat"),
    },
    "structured": {
        *("pricing", "planning", "compression", "curvature", "model", "schema"),
        *("compat", "failures"),
    },
    "artifact": {
        *("compression", "planning", "model", "options", "files", "failures", "compat", "schema"),
    },
    "targets": {
        *("artifact", "compression", "model", "options", "files", "failures", "compat"),
        *("schema", "places"),
    },
    "record": {"planning", "certificate", "curvature", "files", "schema"},
    "report": {"record"},
}
BELOW_RUN = {*MAY_IMPORT}
MAY_IMPORT["run"] = BELOW_RUN
MAY_IMPORT["api"] = {*BELOW_RUN, "run"}
MAY_IMPORT["cli"] = {"run", "artifact", "targets", "failures"}
MAY_IMPORT["__init__"] = {*MAY_IMPORT} - {"cli"}
MAY_IMPORT["__main__"] = {"cli", "failures"}

# library: the only modules that import it
ONLY_IN = {
    "transformers": {"compat"},
    "accelerate": set(),
    "compressed_tensors": {"compat"},
    "datasets": {"run/sources"},
    "matplotlib": {"compat"},
    "torch_pruning": {"structured/cuts"},
}
WITHOUT_TORCH = {"planning", "record", "report", "options"}  # nor do they import what imports it
NO_SUCH_NAMES = {"utils", "util", "core", "base", "common", "helpers", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The package that a file lies in, or the file itself if it lies on the floor."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return "/".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(source: str, module: tuple[str, ...]) -> set[str]:
    """Dotted names that a file imports, anywhere in it.

    ``from a import b`` gives both ``a`` and ``a.b``: b may be a module. ``module`` is the dotted
    name of the file, in parts, with ``__init__`` kept, to resolve relative imports.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [*module[: -node.level]] if node.level else []
            origin += node.module.split(".") if node.module else []
            names.add(".".join(origin))
            names.update(".".join([*origin, alias.name]) for alias in node.names)
    return names


def names_in(path: Path) -> set[str]:
    module = ("curvprune", *path.relative_to(PACKAGE).with_suffix("").parts)
    return imported(path.read_text(encoding="utf-8"), module)


def is_module(parts: list[str]) -> bool:
    target = PACKAGE.joinpath(*parts)
    return target.with_suffix(".py").is_file() or (target / "__init__.py").is_file()


def modules_in(path: Path) -> set[str]:
    """The other modules of the house that a file imports, as paths with slashes."""
    found = set()
    for name in names_in(path):
        house, *parts = name.split(".")
        if house == "curvprune" and parts and is_module(parts):
            found.add("/".join(parts))
    return found


def rooms_in(path: Path) -> set[str]:
    return {module.split("/")[0] for module in modules_in(path)} - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_is_in_the_table_and_keeps_to_it(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{name_of(path)} is in no room: add it to the table"
    stray = rooms_in(path) - MAY_IMPORT[room]
    assert not stray, f"{name_of(path)} imports {sorted(stray)}; see the table of {room}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_are_entered_by_their_face(path: Path) -> None:
    inside = {m for m in modules_in(path) if "/" in m and m.split("/")[0] != room_of(path)}
    assert not inside, f"{name_of(path)} imports {sorted(inside)}: import the package instead"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_stay_in_their_room(path: Path) -> None:
    libraries = {name.split(".")[0] for name in names_in(path)}
    for library, allowed in ONLY_IN.items():
        assert library not in libraries or name_of(path) in allowed, f"only {allowed} imports it"
    if room_of(path) in WITHOUT_TORCH:
        assert "torch" not in libraries


def test_nothing_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room_of(path), set()).update(rooms_in(path))
    TopologicalSorter(graph).prepare()


def test_no_room_is_a_drawer_for_odds_and_ends() -> None:
    parts = {name_of(path): {*name_of(path).split("/")} for path in FILES}
    assert not [name for name, words in parts.items() if NO_SUCH_NAMES & words]


def test_the_reader_sees_every_form_of_import() -> None:
    source = """
import a.b as c
from d import e
from . import f
from ..g import h
if TYPE_CHECKING:
    import i
def later():
    from .j import k
"""
    seen = imported(source, ("curvprune", "report", "html"))
    assert seen == {
        *("a.b", "d", "d.e", "curvprune.report", "curvprune.report.f", "curvprune.g"),
        *("curvprune.g.h", "i", "curvprune.report.j", "curvprune.report.j.k"),
    }
    inside = imported("from . import x", ("curvprune", "solve", "__init__"))
    assert inside == {"curvprune.solve", "curvprune.solve.x"}
