"""Which module may import which: the table that keeps the rooms of the house apart."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "curvprune"

ROOMS = {  # folders whose files may import one another and count as one
    "report",
    "solve",
}

# room: the rooms it may import from
MAY_IMPORT: dict[str, set[str]] = {
    "objective": set(),
    "layers": set(),
    "options": set(),
    "groups": set(),
    "knapsack": set(),
    "plan": {"knapsack"},
    "quadratic": {"knapsack"},
    "certificate": set(),
    "lmeval": {"certificate"},
    "state": set(),
    "processes": set(),
    "report": set(),
    "curvature": set(),
    "curvature/operators": set(),
    "curvature/estimators": {"curvature/operators"},
    "curvature/products": {"curvature/operators", "objective", "processes"},
    "curvature/layerwise": {"curvature/operators", "curvature/estimators"},
    "curvature/fisher": {"curvature/estimators", "objective", "layers", "processes"},
    "curvature/measured": {"layers", "objective"},
    "curvature/forms": {
        *(
            "curvature/factors",
            "curvature/fisher",
            "curvature/operators",
            "curvature/products",
            "layers",
            "objective",
        ),
    },
    "curvature/factors": {
        *(
            "curvature/operators",
            "curvature/estimators",
            "curvature/products",
            "objective",
            "layers",
        ),
        "processes",
    },
    "analysis": {
        *(
            "curvature/estimators",
            "curvature/products",
            "curvature/layerwise",
            "curvature/fisher",
            "curvature/factors",
        ),
        *("objective", "layers"),
    },
    "solve": {"options"},
    "apply": {"objective", "layers"},
    "data": {"objective"},
    "hf": {"objective", "options"},
    "recipe": {"options", "groups"},
    "ledger": {
        "solve",
        "curvature/estimators",
        "curvature/fisher",
        "curvature/forms",
        "options",
        "quadratic",
        "work",
    },
    "work": {"knapsack", "layers", "objective", "options", "plan"},
    "controls": {"layers", "ledger"},
    "packed": {"options", "layers", "solve"},
    "shapes": set(),
    "artifact": {"options", "plan", "layers", "solve", "state", "packed", "shapes"},
    "recovery": {"data", "layers", "objective", "options", "solve"},
    "cuts": {"layers", "objective", "shapes"},
    "latency": {"cuts", "layers", "objective"},
    "structured": {
        *("apply", "cuts", "data", "knapsack", "latency", "layers", "ledger", "objective", "solve"),
        *("curvature/estimators", "curvature/fisher"),
    },
}
MAY_IMPORT["job"] = {
    *(
        "analysis",
        "artifact",
        "certificate",
        "data",
        "knapsack",
        "layers",
        "ledger",
        "objective",
        "options",
        "plan",
    ),
    *("recovery", "solve", "state", "work"),
}
MAY_IMPORT["selection"] = {
    *(
        "certificate",
        "controls",
        "data",
        "job",
        "knapsack",
        "layers",
        "ledger",
        "objective",
        "options",
        "plan",
    ),
    *("quadratic", "solve"),
}
MAY_IMPORT["sequence"] = {"job", "knapsack", "plan", "selection"}
MAY_IMPORT["stages"] = {*MAY_IMPORT} - {"hf", "lmeval", "recipe", "report", "structured"}
MAY_IMPORT["export"] = {"artifact", "hf", "layers", "options", "shapes", "state"}
MAY_IMPORT["pipeline"] = {*MAY_IMPORT}
MAY_IMPORT["api"] = {*MAY_IMPORT}
MAY_IMPORT["cli"] = {"export", "pipeline", "recipe"}
MAY_IMPORT["__init__"] = {*MAY_IMPORT} - {"cli"}
MAY_IMPORT["__main__"] = {"cli"}

ONLY_HF = {"transformers", "compressed_tensors", "datasets", "accelerate", "gguf"}
WITHOUT_TORCH = {
    "knapsack",
    "plan",
    "quadratic",
    "groups",
    "certificate",
    "lmeval",
    "options",
    "recipe",
    "report",
}
NO_SUCH_NAMES = {"utils", "util", "core", "base", "common", "helpers", "misc"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ROOMS:
        return parts[0]
    return "/".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else "/".join(parts)


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


def rooms_in(path: Path) -> set[str]:
    """The other rooms of the house that a file imports from."""
    rooms: set[str] = set()
    for name in names_in(path):
        parts = name.split(".")
        if parts[0] != "curvprune":
            continue
        target = PACKAGE.joinpath(*parts[1:])
        if target.with_suffix(".py").is_file():
            rooms.add(room_of(target.with_suffix(".py")))
        elif len(parts) > 1 and (target / "__init__.py").is_file():
            rooms.add(room_of(target / "__init__.py"))
    return rooms - {room_of(path)}


def identity(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_every_module_is_in_the_table_and_keeps_to_it(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{identity(path)} is in no room: add it to the table"
    # a package's empty __init__ is imported with whatever is inside it
    stray = {other for other in rooms_in(path) - MAY_IMPORT[room] if other != "curvature"}
    assert not stray, (
        f"{identity(path)} imports {sorted(stray)}; {room} may import {sorted(MAY_IMPORT[room]) or 'nothing'}"
    )


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_heavy_libraries_stay_in_their_room(path: Path) -> None:
    libraries = {name.split(".")[0] for name in names_in(path)}
    room = room_of(path)
    if room != "hf":
        assert not libraries & ONLY_HF, "only hf.py imports these"
    if room != "cuts":
        assert "torch_pruning" not in libraries, "only cuts.py imports it"
    if room in WITHOUT_TORCH:
        assert "torch" not in libraries


def test_nothing_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room_of(path), set()).update(rooms_in(path))
    TopologicalSorter(graph).prepare()


def test_no_room_is_a_drawer_for_odds_and_ends() -> None:
    assert not [
        identity(path)
        for path in FILES
        if NO_SUCH_NAMES & {*path.relative_to(PACKAGE).with_suffix("").parts}
    ]


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
        *(
            "a.b",
            "d",
            "d.e",
            "curvprune.report",
            "curvprune.report.f",
            "curvprune.g",
            "curvprune.g.h",
            "i",
        ),
        *("curvprune.report.j", "curvprune.report.j.k"),
    }
    assert imported("from . import x", ("curvprune", "solve", "__init__")) == {
        "curvprune.solve",
        "curvprune.solve.x",
    }
