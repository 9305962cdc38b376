"""Plans that need no curvature, to hold the planner against: uniform options, a static rule, the
reversed order.

Each is made near a given size, so that what it loses can be compared with what the plan of that
size loses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from curvprune.model import Layer
from curvprune.pricing import Row

# An MLP's second matrix, whose inputs have the largest outliers, by the end of its name.
DOWN = re.compile(
    r"(^|\.)(down_proj|fc2|w2|lin2|dense_4h_to_h|mlp\.c_proj|DenseReluDense\.wo|(?<!attention\.)output\.dense)$"
)
_BLOCK = re.compile(r"(.*?)(?:^|\.)(\d+)(?:\.|$)")


class Control(NamedTuple):
    """A plan and what it is called."""

    name: str
    choices: dict[str, str]


def sensitive(layers: Mapping[str, Layer]) -> set[str]:
    """The layers that hand-written rules protect: embeddings, the first and the last block with
    whatever stands before and behind the blocks, and every block's down projection.

    A block is what the first number in a layer's name counts; a layer without a number between
    blocks is in none. A model without numbers takes its first and last layer for the two blocks.
    """
    names = list(layers)
    blocks = [None if (match := _BLOCK.match(n)) is None else match.group(1, 2) for n in names]
    numbered = [place for place, block in enumerate(blocks) if block is not None] or [
        0,
        len(names) - 1,
    ]
    first, last = numbered[0], numbered[-1]
    ends = {blocks[first], blocks[last]} - {None}
    protected = {n for n in names if layers[n].kind == "embedding" or DOWN.search(n)}
    return protected | {
        n
        for place, n in enumerate(names)
        if place <= first or place >= last or blocks[place] in ends
    }


def controls(
    rows: Iterable[Row],
    layers: Mapping[str, Layer],
    groups: Sequence[tuple[str, ...]],
    *,
    size: int,
    plan: Callable[[list[Row], int], dict[str, str]],
) -> list[Control]:
    """The controls near ``size``, bytes of all layers: the largest uniform plan that is no larger
    and the smallest that is; the static rule likewise, one of them; and the plan of that size for
    prices in reversed order.

    Args:
        groups: layers that share an option; every other layer by itself.
        plan: the best plan for given rows whose layers take at most so many bytes.

    A uniform plan gives each layer the option it is named after or, where that is not offered, the
    one nearest in bytes per weight. The static rule gives the layers of `sensitive` a larger
    uniform option than the others. The reversed order swaps the prices of the most and the least
    sensitive group, of the second most and second least, and so on.
    """
    rows = list(rows)
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(row.layer, {})[row.option] = row
    free = [group for group in groups if len(table[group[0]]) > 1]
    if not free:
        return []
    weights = {group: sum(layers[n].numel for n in group) for group in groups}

    def stored(group: tuple[str, ...], key: str) -> int:
        return sum(table[n][key].bytes for n in group)

    def total(choices: Mapping[str, str]) -> int:
        return sum(table[n][key].bytes for n, key in choices.items())

    offered = sorted({key for group in free for key in table[group[0]]})
    density = {}
    for key in offered:
        having = [group for group in free if key in table[group[0]]]
        density[key] = sum(stored(group, key) for group in having) / sum(
            weights[group] for group in having
        )

    def option(group: tuple[str, ...], key: str) -> str:
        choice = table[group[0]]
        if key in choice:
            return key
        return min(
            sorted(choice),
            key=lambda other: abs(stored(group, other) / weights[group] - density[key]),
        )

    def uniform(key: str, protected: str, rule: set[str]) -> dict[str, str]:
        """Every group ``key``, those with a layer of the rule ``protected``; in the order of the
        layers."""
        chosen = {
            n: option(group, protected if rule.intersection(group) else key)
            for group in groups
            for n in group
        }
        return {n: chosen[n] for n in layers}

    found = []
    plain = [
        Control(f"uniform {key}", uniform(key, key, set())) for key in offered if key != "keep"
    ]
    found += [c for c in _around(plain, total, size) if c is not None]
    rule = sensitive(layers)
    static = [
        Control(f"static rule, {key} and {wider}", uniform(key, wider, rule))
        for key in offered
        for wider in offered
        if density[key] < density[wider]
    ]
    below, above = _around(static, total, size)
    found += [c for c in (below or above,) if c is not None]
    found.append(Control("reversed order", plan(_reversed(table, free, weights, rows), size)))
    return found


def _around(
    plans: Sequence[Control], total: Callable[[Mapping[str, str]], int], size: int
) -> tuple[Control | None, Control | None]:
    """The largest of the plans that is no larger than ``size``, and the smallest that is."""
    sizes = [(total(control.choices), number) for number, control in enumerate(plans)]
    below = max((s for s in sizes if s[0] <= size), default=None)
    above = min((s for s in sizes if s[0] > size), default=None)
    return (None if below is None else plans[below[1]], None if above is None else plans[above[1]])


def _reversed(
    table: Mapping[str, Mapping[str, Row]],
    free: Sequence[tuple[str, ...]],
    weights: Mapping[tuple[str, ...], int],
    rows: Iterable[Row],
) -> list[Row]:
    """Rows in which the groups, ranked by the price of their dearest option per weight, have swapped
    their prices."""
    dearest = {
        group: max(sum(table[n][key].price for n in group) for key in table[group[0]])
        for group in free
    }
    order = sorted(free, key=lambda group: dearest[group] / weights[group])
    scale = {
        n: dearest[other] / dearest[group] * weights[group] / weights[other]
        if dearest[group]
        else 1.0
        for group, other in zip(order, reversed(order), strict=True)
        for n in group
    }
    return [replace(row, price=row.price * scale.get(row.layer, 1.0), stderr=0.0) for row in rows]
