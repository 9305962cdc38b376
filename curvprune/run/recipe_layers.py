"""A recipe laid over a model: which layer may get which options, and which share one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping

from curvprune.model import GroupError, Groups, Request, find_groups
from curvprune.options import Keep, Option, check_fits
from curvprune.run.recipe import Recipe
from curvprune.run.recipe_errors import KeyPath


def assign_options(
    recipe: Recipe,
    layers: Mapping[str, tuple[int, int]],
    *,
    check: Callable[[str, Option], None] | None = None,
) -> dict[str, list[Option]]:
    """The options that each layer may get: the first entry with a glob that matches its name
    decides.

    Args:
        layers: name → ``(out, in)`` of the weight as a matrix.
        check: raises ``ValueError`` where the target of the recipe cannot hold a layer under an
            option; by default whether the option fits the layer at all.

    Returns:
        Layer → options, in the order of ``layers``. A layer that no entry matches is absent: it is
        kept.

    Raises:
        RecipeError: a glob that matches no layer, or only layers that earlier entries took; an
            option that does not fit its layer.
    """
    # 1. Which entry decides on which layer.
    owner = _entries_of(recipe, layers)
    # 2. Its options, each of which must fit the layer.
    assigned: dict[str, list[Option]] = {}
    for name, shape in layers.items():
        if name not in owner:
            continue
        entry = recipe.compress[owner[name]]
        for number, option in enumerate(entry.options):
            try:
                if check is None:
                    check_fits(option, name, shape)
                else:
                    check(name, option)
            except ValueError as error:
                key: KeyPath = ("compress", owner[name], "options", number)
                raise recipe.error(key, str(error)) from error
        assigned[name] = list(entry.options)
    return assigned


def _entries_of(recipe: Recipe, layers: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Layer → index of the entry of ``compress`` that decides on it."""
    owner: dict[str, int] = {}
    for index, entry in enumerate(recipe.compress):
        # Globs of one entry may overlap, those of a later entry may only add layers.
        earlier = dict(owner)
        excluded: set[str] = set()
        for number, glob in enumerate(entry.exclude):
            excluded |= set(_matched(recipe, layers, glob, ("compress", index, "exclude", number)))
        for number, glob in enumerate(entry.layers):
            key: KeyPath = ("compress", index, "layers", number)
            matched = [n for n in _matched(recipe, layers, glob, key) if n not in excluded]
            if not matched:
                raise recipe.error(
                    key, f"exclude leaves none of the layers that {glob!r} matches; remove one"
                )
            free = [name for name in matched if name not in earlier]
            if not free:
                first = earlier[matched[0]]
                line = recipe.line_of(("compress", first, "layers"))
                where = "" if line is None else f" on line {line}"
                raise recipe.error(
                    key,
                    f"every layer that {glob!r} matches ({len(matched)}) is taken by "
                    f"compress[{first}]{where}; the first entry that matches wins; expected the "
                    "narrower glob first",
                )
            owner.update(dict.fromkeys(free, index))
    return owner


def _matched(recipe: Recipe, layers: Iterable[str], glob: str, key: KeyPath) -> list[str]:
    """The layers that a glob matches, of which there must be some."""
    names = list(layers)
    matched = [name for name in names if fnmatch.fnmatchcase(name, glob)]
    if not matched:
        near = f"; nearest layer: {_nearest_layer(glob, names)}" if names else ""
        raise recipe.error(
            key,
            f"{glob!r} matches none of the {len(names)} layers; expected a glob on layer "
            f"names{near}",
        )
    return matched


def _nearest_layer(glob: str, layers: Iterable[str]) -> str:
    wanted = glob.lower()

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, wanted, name.lower(), autojunk=False).ratio()

    return max(layers, key=likeness)


def assign_groups(
    recipe: Recipe,
    layers: Iterable[str],
    assigned: Mapping[str, Iterable[Option]],
    *,
    find: Callable[[Request, Mapping[str, Iterable[str]]], Groups] = find_groups,
) -> Groups:
    """The layers that must share an option, from `assign_options` and the names of all layers.

    Args:
        find: makes groups of the recipe's request; a target adds the layers that it runs as one.

    Raises:
        RecipeError: see `curvprune.model.find_groups`.
    """
    offered = {}
    for name in layers:
        offered[name] = [option.key for option in assigned.get(name, [Keep()])]
    try:
        return find(recipe.same_option, offered)
    except GroupError as error:
        raise recipe.error((error.key, *error.position), error.message) from error
