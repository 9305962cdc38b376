"""Plans that need no curvature, to hold the planner against: uniform options, a static rule, the
reversed order.

Each is made near a given size, so that what it loses can be compared with what the plan of that
size loses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from curvprune.model import Layer
from curvprune.planning import Priced
from curvprune.pricing import Row

# An MLP's second matrix, whose inputs have the largest outliers, by the end of its name.
DOWN = re.compile(
    r"(^|\.)(down_proj|fc2|w2|lin2|dense_4h_to_h|mlp\.c_proj|DenseReluDense\.wo"
    r"|(?<!attention\.)output\.dense)$"
)
_BLOCK = re.compile(r"(.*?)(?:^|\.)(\d+)(?:\.|$)")

Group = tuple[str, ...]  # names of layers that share an option


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
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
    # 1. The block of each layer: what stands before the first number, and the number.
    blocks = [_block_of(name) for name in names]
    numbered = [place for place, block in enumerate(blocks) if block is not None]
    # 2. Where the first block begins and the last one ends.
    first, last = (numbered[0], numbered[-1]) if numbered else (0, len(names) - 1)
    ends = {blocks[first], blocks[last]} - {None}
    # 3. What is in those two, outside all blocks, or sensitive wherever it stands.
    protected = set()
    for place, name in enumerate(names):
        outside = place <= first or place >= last
        everywhere = layers[name].kind == "embedding" or DOWN.search(name) is not None
        if outside or everywhere or blocks[place] in ends:
            protected.add(name)
    return protected


def _block_of(name: str) -> tuple[str, str] | None:
    match = _BLOCK.match(name)
    return None if match is None else (match[1], match[2])


def controls(
    rows: Iterable[Row],
    layers: Mapping[str, Layer],
    groups: Sequence[Group],
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
    offers = _Offers(rows, layers, groups)
    if not offers.free:
        return []
    options = sorted(offers.density)
    found: list[Control] = []

    # 1. One option for all, below the size and above it.
    uniform = _uniform(offers)
    below, above = _around(uniform, offers.total, size)
    found += [control for control in (below, above) if control is not None]

    # 2. A larger option for what is known to be sensitive: below the size, or else above it.
    rule = sensitive(layers)
    static = []
    for key in options:
        for wider in options:
            if offers.density[key] < offers.density[wider]:
                choices = offers.plan(key, protected=wider, rule=rule)
                static.append(Control(name=f"static rule, {key} and {wider}", choices=choices))
    below, above = _around(static, offers.total, size)
    nearest = above if below is None else below
    if nearest is not None:
        found.append(nearest)

    # 3. The plan that takes the most sensitive layers for the least.
    choices = plan(_reversed(offers, rows), size)
    found.append(Control(name="reversed order", choices=choices))
    return found


def uniform_plans(
    rows: Iterable[Priced], layers: Mapping[str, Layer], groups: Sequence[Group]
) -> list[Control]:
    """One option for all layers, for every option that any of them has; see `controls`."""
    offers = _Offers(rows, layers, groups)
    if offers.free:
        return _uniform(offers)
    only = {name: key for name, options in offers.table.items() for key in options}
    return [Control(name="the only plan", choices=only)]


def _uniform(offers: _Offers) -> list[Control]:
    found = []
    for key in sorted(offers.density):
        if key != "keep":
            choices = offers.plan(key, protected=key, rule=set())
            found.append(Control(name=f"uniform {key}", choices=choices))
    return found


class _Offers:
    """What is offered to each group of layers.

    Attributes:
        table: layer → option → its row.
        free: the groups that have a choice.
        weights: group → its number of weights.
        density: option → bytes per weight, over the free groups that are offered it.
    """

    def __init__(
        self, rows: Iterable[Priced], layers: Mapping[str, Layer], groups: Sequence[Group]
    ) -> None:
        self.layers, self.groups = layers, groups
        self.table: dict[str, dict[str, Priced]] = {}
        for row in rows:
            self.table.setdefault(row.layer, {})[row.option] = row
        self.weights: dict[Group, int] = {}
        for group in groups:
            self.weights[group] = sum(layers[n].numel for n in group)
        self.free = [group for group in groups if len(self.options(group)) > 1]
        having: dict[str, list[Group]] = {}
        for group in self.free:
            for key in self.options(group):
                having.setdefault(key, []).append(group)
        self.density: dict[str, float] = {}
        for key, offered in having.items():
            stored = sum(self.stored(group, key) for group in offered)
            self.density[key] = stored / sum(self.weights[group] for group in offered)

    def options(self, group: Group) -> Mapping[str, Priced]:
        """The options of a group, whose layers are all offered the same."""
        return self.table[group[0]]

    def stored(self, group: Group, key: str) -> int:
        return sum(self.table[n][key].bytes for n in group)

    def total(self, choices: Mapping[str, str]) -> int:
        """Bytes of all layers under a plan."""
        return sum(self.table[n][key].bytes for n, key in choices.items())

    def plan(self, key: str, *, protected: str, rule: set[str]) -> dict[str, str]:
        """Every group ``key``, those with a layer of the rule ``protected``; in the order of the
        layers."""
        chosen: dict[str, str] = {}
        for group in self.groups:
            wanted = protected if rule.intersection(group) else key
            chosen.update(dict.fromkeys(group, self._nearest(group, wanted)))
        return {name: chosen[name] for name in self.layers}

    def _nearest(self, group: Group, key: str) -> str:
        """The option ``key`` or, where a group is not offered it, the one nearest in bytes per
        weight."""
        if key in self.options(group):
            return key

        def distance(other: str) -> float:
            return abs(self.stored(group, other) / self.weights[group] - self.density[key])

        return min(sorted(self.options(group)), key=distance)


def _around(
    plans: Sequence[Control], total: Callable[[Mapping[str, str]], int], size: int
) -> tuple[Control | None, Control | None]:
    """The largest of the plans that is no larger than ``size``, and the smallest that is."""
    sizes = [(total(control.choices), number) for number, control in enumerate(plans)]
    below = max((entry for entry in sizes if entry[0] <= size), default=None)
    above = min((entry for entry in sizes if entry[0] > size), default=None)
    largest = None if below is None else plans[below[1]]
    smallest = None if above is None else plans[above[1]]
    return largest, smallest


def _reversed(offers: _Offers, rows: Iterable[Row]) -> list[Row]:
    """Rows in which the free groups have swapped their prices, the first of their ranks with the
    last; they are ranked by the price of their dearest option per weight."""
    # 1. The ranks.
    dearest: dict[Group, float] = {}
    for group in offers.free:
        prices = []
        for key in offers.options(group):
            prices.append(sum(offers.table[n][key].price for n in group))
        dearest[group] = max(prices)
    weights = offers.weights
    ranked = sorted(offers.free, key=lambda group: dearest[group] / weights[group])
    # 2. What a group's prices are multiplied by to be those of its opposite, per weight.
    scale: dict[str, float] = {}
    for group, other in zip(ranked, reversed(ranked), strict=True):
        factor = 1.0
        if dearest[group]:
            factor = dearest[other] / dearest[group] * weights[group] / weights[other]
        scale.update(dict.fromkeys(group, factor))
    return [replace(row, price=row.price * scale.get(row.layer, 1.0), stderr=0.0) for row in rows]
