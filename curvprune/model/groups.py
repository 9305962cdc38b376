"""Layers that must share an option, because a serving engine runs them as one: query, key and
value, gate and up.

A request is a list whose entries are lists of globs, or the word ``fused`` for the names in
`FUSED`. The layers that one entry matches are grouped by their parent module, so one entry makes a
group in every block of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

Request = tuple[str | tuple[str, ...], ...]

FUSED: tuple[
    tuple[str, ...], ...
] = (  # last parts of layer names; what is one layer already needs no entry
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


class GroupError(ValueError):
    """A request that cannot be met; ``position`` is the index of its entry and, where one glob is
    wrong, of that."""

    def __init__(self, position: tuple[int, ...], message: str) -> None:
        self.position, self.message = position, message
        where = "same_option" + "".join(f"[{index}]" for index in position)
        super().__init__(f"{where}: {message}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Groups of two or more layers that have a choice, in the model's order, and what the user
    should hear."""

    layers: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def read_request(value: Any) -> Request:
    """A request as a recipe or a caller writes it; the word ``fused`` alone is short for
    ``[fused]``. Raises `GroupError`."""
    example = 'write fused, or lists of globs such as [["*.q_proj", "*.k_proj", "*.v_proj"]]'
    if value == "fused":
        return ("fused",)
    if isinstance(value, str) or not isinstance(value, Sequence):
        near = (
            "; nearest: fused"
            if isinstance(value, str) and get_close_matches(value, ["fused"])
            else ""
        )
        raise GroupError((), f"{value!r} is not a list of groups; {example}{near}")
    request: list[str | tuple[str, ...]] = []
    for index, entry in enumerate(value):
        if entry == "fused":
            request.append(entry)
            continue
        if isinstance(entry, str) or not isinstance(entry, Sequence) or not entry:
            raise GroupError((index,), f"{entry!r} is neither fused nor a list of globs; {example}")
        for position, glob in enumerate(entry):
            if not isinstance(glob, str) or not glob:
                raise GroupError(
                    (index, position), f"{glob!r} is not a glob on layer names; {example}"
                )
        request.append(tuple(entry))
    return tuple(request)


def find_groups(request: Request, options: Mapping[str, Iterable[str]]) -> Groups:
    """The groups that a request makes of a model's layers.

    Args:
        options: the keys of the options that each compressible layer of the model is offered, in
            the model's order; a layer that is left alone is offered ``keep``.

    Raises `GroupError` for a glob that matches no layer (naming the nearest), a layer in two
    groups, and layers of one group that are offered different options. A layer alone in its parent
    module is a note.
    """
    offered = {name: frozenset(keys) for name, keys in options.items()}
    owner: dict[str, int] = {}
    groups: list[tuple[str, ...]] = []
    notes: list[str] = []
    alone: list[str]
    for index, entry in enumerate(request):
        if isinstance(entry, str):
            found, alone = _fused(offered), []
            if not found:
                notes.append(
                    "same_option: no layers of this model have names that are known to be fused"
                )
        else:
            found, alone = _matched(index, entry, offered)
        if alone:
            shown = ", ".join(alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
            notes.append(
                f"same_option[{index}]: no other layer in the same parent module to share with: "
                f"{shown}"
            )
        for group in found:
            for name in group:
                if name in owner:
                    raise GroupError(
                        (index,),
                        f"layer {name} is already in a group of same_option[{owner[name]}]; "
                        "expected each layer in one group; merge the two or make one glob "
                        "narrower",
                    )
                owner[name] = index
            _check_alike(index, group, offered)
            if len(offered[group[0]]) > 1:
                groups.append(group)
    place = {name: position for position, name in enumerate(offered)}
    return Groups(
        layers=tuple(sorted(groups, key=lambda group: place[group[0]])), notes=tuple(notes)
    )


def _fused(layers: Iterable[str]) -> list[tuple[str, ...]]:
    known = {leaf: names for names in FUSED for leaf in names}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        if leaf in known:
            groups.setdefault((parent, known[leaf]), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _matched(
    index: int, globs: Sequence[str], layers: Mapping[str, frozenset[str]]
) -> tuple[list[tuple[str, ...]], list[str]]:
    for position, glob in enumerate(globs):
        if not any(fnmatchcase(name, glob) for name in layers):
            near = get_close_matches(glob, list(layers), n=1, cutoff=0.0)
            hint = f"; nearest layer: {near[0]}" if near else ""
            raise GroupError(
                (index, position), f"{glob!r} matches none of the {len(layers)} layers{hint}"
            )
    parents: dict[str, list[str]] = {}
    for name in layers:
        if any(fnmatchcase(name, glob) for glob in globs):
            parents.setdefault(name.rpartition(".")[0], []).append(name)
    groups = [tuple(group) for group in parents.values() if len(group) > 1]
    return groups, [group[0] for group in parents.values() if len(group) == 1]


def _check_alike(index: int, group: Sequence[str], offered: Mapping[str, frozenset[str]]) -> None:
    first = group[0]
    for other in group[1:]:
        if offered[first] == offered[other]:
            continue
        said = [
            f"only {name} is offered {', '.join(extra)}"
            for name, extra in (
                (first, sorted(offered[first] - offered[other])),
                (other, sorted(offered[other] - offered[first])),
            )
            if extra
        ]
        raise GroupError(
            (index,),
            f"layers {first} and {other} must share an option, but {' and '.join(said)}; offer "
            "both the same options",
        )
