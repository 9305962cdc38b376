"""Layers that are alike as one line: ``model.layers.0–29.self_attn.q_proj``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """A layer to compress, and the keys of its options."""

    name: str
    kind: str
    shape: tuple[int, int]
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLine:
    """Layers that differ in the numbers of their names alone: ``count`` of them."""

    names: str
    count: int
    kind: str
    shape: tuple[int, int]
    options: tuple[str, ...]


def layer_lines(rows: Iterable[LayerRow]) -> list[LayerLine]:
    """One line for all layers of the same shape, kind and options whose names join, in the order of
    the first of each."""
    alike: dict[tuple[str, tuple[int, int], tuple[str, ...]], list[str]] = {}
    order: dict[str, int] = {}
    for row in rows:
        alike.setdefault((row.kind, row.shape, row.options), []).append(row.name)
        order[row.name] = len(order)
    lines: list[tuple[int, LayerLine]] = []
    for (kind, shape, options), names in alike.items():
        for joined, members in joined_names(names).items():
            line = LayerLine(
                names=joined, count=len(members), kind=kind, shape=shape, options=options
            )
            lines.append((order[members[0]], line))
    return [line for _, line in sorted(lines, key=lambda placed: placed[0])]


def joined_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Joined name → the names that it stands for.

    Parts between dots that are numbers become ranges, where all other parts agree; of several, such
    as blocks and experts, each becomes a range of its own where every combination is there.

    >>> list(joined_names(["h.0.q", "h.1.q", "h.3.q", "head"]))
    ['h.0–1, 3.q', 'head']
    """
    members = {tuple(name.split(".")): [name] for name in names}
    # From the last number to the first, so that experts are joined before blocks. A part that has
    # become a range is text from then on.
    for place in reversed(range(max(map(len, members), default=0))):
        members = _joined_at(place, members)
    return {".".join(parts): found for parts, found in members.items()}


Parts = tuple[str, ...]


def _joined_at(place: int, members: dict[Parts, list[str]]) -> dict[Parts, list[str]]:
    """Names joined over the number in one place; the others stay as they are."""
    # 1. Names that agree in every other part.
    families: dict[Parts, list[Parts]] = {}
    for parts in members:
        key = parts
        if place < len(parts) and parts[place].isdecimal():
            key = (*parts[:place], "#", *parts[place + 1 :])
        families.setdefault(key, []).append(parts)
    # 2. Each family under one name, whose number is a range.
    joined: dict[Parts, list[str]] = {}
    for family in families.values():
        first = family[0]
        if len(family) > 1:
            numbers = _ranges(sorted(int(parts[place]) for parts in family))
            first = (*first[:place], numbers, *first[place + 1 :])
        joined[first] = []
        for parts in family:
            joined[first] += members[parts]
    return joined


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``0, 2–5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = []
    for run in runs:
        texts.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}")
    return ", ".join(texts)
