"""Layers that must share an option because a serving engine runs them as one: query, key and value,
gate and up.

A request is a list whose entries are lists of globs, or the word ``fused`` for the names in
`FUSED`. The layers that one entry matches are grouped by their parent module, so one entry makes a
group in every block of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

Request = tuple[str | tuple[str, ...], ...]

# Last parts of layer names. What is one layer already needs no entry.
FUSED: tuple[tuple[str, ...], ...] = (
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
_EXAMPLE = 'write fused, or lists of globs such as [["*.q_proj", "*.k_proj", "*.v_proj"]]'


class GroupError(ValueError):
    """A request that cannot be met; ``position`` is the index of its entry and, where one glob is
    wrong, of that. ``key`` says who asked: ``same_option``, or ``target`` for what an engine runs
    as one."""

    def __init__(
        self, position: tuple[int, ...], message: str, *, key: str = "same_option"
    ) -> None:
        self.position, self.message, self.key = position, message, key
        where = key + "".join(f"[{index}]" for index in position)
        super().__init__(f"{where}: {message}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Groups of two or more layers that have a choice, in the model's order, and what the user
    should hear."""

    layers: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def read_request(value: object) -> Request:
    """A request as a recipe or a caller writes it; the word ``fused`` alone is short for
    ``[fused]``. Raises `GroupError`."""
    if value == "fused":
        return ("fused",)
    if isinstance(value, str) or not isinstance(value, Sequence):
        # A word alone may be meant for the one that is known.
        misspelt = isinstance(value, str) and get_close_matches(value, ["fused"])
        near = "; nearest: fused" if misspelt else ""
        raise GroupError((), f"{value!r} is not a list of groups; {_EXAMPLE}{near}")
    return tuple(_read_entry(index, entry) for index, entry in enumerate(value))


def _read_entry(index: int, entry: object) -> str | tuple[str, ...]:
    """The word ``fused``, or the globs of one group."""
    if entry == "fused":
        return "fused"
    if isinstance(entry, str) or not isinstance(entry, Sequence) or not entry:
        raise GroupError((index,), f"{entry!r} is neither fused nor a list of globs; {_EXAMPLE}")
    for position, glob in enumerate(entry):
        if not isinstance(glob, str) or not glob:
            problem = f"{glob!r} is not a glob on layer names; {_EXAMPLE}"
            raise GroupError((index, position), problem)
    return tuple(entry)


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
    for index, entry in enumerate(request):
        # 1. The layers that the entry names, parent module by parent module.
        if isinstance(entry, str):
            found = _fused(offered)
            if not found:
                notes.append(
                    "same_option: no layers of this model have names that are known to be fused"
                )
        else:
            found, alone = _matched(index, entry, offered)
            if alone:
                notes.append(_lonely(index, alone))
        # 2. Each group must be able to share an option, and no layer be in two of them.
        for group in found:
            _take(owner, index, group)
            _check_alike(index, group, offered)
            # Layers with one option share it anyway.
            if len(offered[group[0]]) > 1:
                groups.append(group)
    # 3. In the model's order.
    place = {name: position for position, name in enumerate(offered)}
    groups.sort(key=lambda group: place[group[0]])
    return Groups(layers=tuple(groups), notes=tuple(notes))


def _lonely(index: int, alone: Sequence[str]) -> str:
    """The note on layers that an entry names and that have nobody to share with."""
    shown = ", ".join(alone[:3])
    if len(alone) > 3:
        shown += f" and {len(alone) - 3} more"
    return f"same_option[{index}]: no other layer in the same parent module to share with: {shown}"


def _take(owner: dict[str, int], index: int, group: Sequence[str]) -> None:
    """Note that entry ``index`` owns the layers of a group, which no other entry may."""
    for name in group:
        if name in owner:
            raise GroupError(
                (index,),
                f"layer {name} is already in a group of same_option[{owner[name]}]; "
                "expected each layer in one group; merge the two or make one glob narrower",
            )
        owner[name] = index


def _fused(layers: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups that names in `FUSED` make, two layers or more each."""
    known: dict[str, tuple[str, ...]] = {}
    for names in FUSED:
        known.update(dict.fromkeys(names, names))
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        if leaf in known:
            groups.setdefault((parent, known[leaf]), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _matched(
    index: int, globs: Sequence[str], layers: Mapping[str, frozenset[str]]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """The groups of two layers or more that globs make, and the layers that are alone."""
    for position, glob in enumerate(globs):
        if not any(fnmatchcase(name, glob) for name in layers):
            near = get_close_matches(glob, list(layers), n=1, cutoff=0.0)
            hint = f"; nearest layer: {near[0]}" if near else ""
            problem = f"{glob!r} matches none of the {len(layers)} layers{hint}"
            raise GroupError((index, position), problem)
    # One entry makes a group in every block: the same globs, another parent.
    parents: dict[str, list[str]] = {}
    for name in layers:
        if any(fnmatchcase(name, glob) for glob in globs):
            parents.setdefault(name.rpartition(".")[0], []).append(name)
    groups = [tuple(group) for group in parents.values() if len(group) > 1]
    return groups, [group[0] for group in parents.values() if len(group) == 1]


def _check_alike(index: int, group: Sequence[str], offered: Mapping[str, frozenset[str]]) -> None:
    """Layers that share an option must be offered the same ones."""
    first = group[0]
    for other in group[1:]:
        if offered[first] == offered[other]:
            continue
        said = []
        for name, unlike in ((first, other), (other, first)):
            extra = sorted(offered[name] - offered[unlike])
            if extra:
                said.append(f"only {name} is offered {', '.join(extra)}")
        raise GroupError(
            (index,),
            f"layers {first} and {other} must share an option, but {' and '.join(said)}; offer "
            "both the same options",
        )
