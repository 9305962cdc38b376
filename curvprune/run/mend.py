"""Damaged intermediate results of a run: found when it goes on, and removed, so that they are made
anew. All that depends on them came out the same and stays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from curvprune import artifact
from curvprune.files import State
from curvprune.run.recipe_errors import RecipeError

REMOVED_MODEL = "structured/model"
# What is made anew from other files alone. The rest of a run that has taken over plans may depend
# on what only the other run had.
_ALONE = ("solved/", "rounds/", "measured/", "curvature/", "certify/", "fisher", "forms")


def mend_(state: State, *, taken_over: str) -> list[str]:
    """Remove what is damaged in a run's state; its names.

    Cost: 1 to 3 seconds per gigabyte of state.

    Args:
        taken_over: the file that says that plans of another run were taken over.

    Raises ``ValueError`` where what is damaged cannot be made anew.
    """
    found = list(damaged(state))
    for name in found:
        again = f"delete {state.folder} to start again, or give --out a new folder"
        alone = name.startswith(_ALONE)
        if name == taken_over or (state.has(taken_over) and not alone):
            raise RecipeError(f"{state.path(name)} is damaged, and other runs made it; {again}")
    for name in found:
        _remove(state, name)
    return found


def damaged(state: State) -> Iterator[str]:
    """Files that are not what was written under their names, and folders of models with such."""
    models = set()
    # 1. Models, if they were finished.
    for manifest in sorted(state.folder.rglob(artifact.MANIFEST)):
        folder = manifest.parent
        models.add(folder)
        try:
            artifact.verify(folder)
        except ValueError:
            yield folder.relative_to(state.folder).as_posix()
    for mark in sorted(state.folder.rglob("model/complete")):
        if mark.parent not in models:
            models.add(mark.parent)
            yield mark.parent.relative_to(state.folder).as_posix()
    # 2. Everything else.
    for path in sorted(state.folder.rglob("*")):
        ours = path.suffix in (".json", ".safetensors") and not path.name.startswith(".")
        if not ours or path.is_dir() or not models.isdisjoint(path.parents):
            continue
        name = path.relative_to(state.folder).as_posix()
        if name != "inputs.json" and not _is_whole(state, name):
            yield name


def _is_whole(state: State, name: str) -> bool:
    try:
        if name.endswith(".json"):
            state.read_json(name)
        else:
            state.read_tensors(name)
    except ValueError:
        return False
    return True


def _remove(state: State, name: str) -> None:
    path = state.folder / name
    if name == REMOVED_MODEL or name.startswith("structured/"):
        # All else is about the smaller model, which may come out another one.
        for one in state.folder.iterdir():
            if one.name != "inputs.json":
                _delete(one)
        return
    if path.is_dir():
        _delete(path)
        return
    # A record says that the tensors beside it are whole, and the end of the pricing pass that all
    # that it measured is there. How many inputs are dead comes of solving the layer.
    stem = path.stem.removesuffix(".dead")
    partners = list(path.parent.glob(f"{stem}.*"))
    if path.parent == state.folder and path.stem.startswith(("fisher", "forms")):
        partners.append(state.folder / "fisher.json")
    for one in partners:
        _delete(one)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
