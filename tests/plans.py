"""Small instances of the planner, and every plan of them with exact fractions."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction

from curvprune.planning import Choice, Limit

KINDS = ("small integers", "wide", "ties", "gaussian", "tiny differences", "price follows bytes")

Combination = tuple[Choice, ...]  # a row of every layer


def random_rows(seed: int, *, layers: int = 5, options: int = 5) -> list[Choice]:
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    rows = []
    for layer in range(rng.randint(1, layers)):
        for option in range(rng.randint(1, options)):
            if kind == "small integers":
                size, price = rng.randint(0, 10), float(rng.randint(0, 5))
            elif kind == "wide":
                size, price = rng.randint(1, 10**12), 10 ** rng.uniform(-9, 1)
            elif kind == "ties":
                size, price = rng.choice([64, 128, 192]) * 10**9, rng.choice([0.1, 0.2, 0.3])
            elif kind == "gaussian":
                size, price = rng.randint(1, 10**4), rng.gauss(0, 1)
            elif kind == "tiny differences":
                size, price = 10**12 + rng.randint(0, 3), 1 + rng.randint(0, 3) * 1e-12
            else:
                size = rng.randint(1, 1000)
                price = size * 1e-3 + rng.randint(0, 2) * 1e-9
            rows.append(
                Choice(layer=f"layer{layer}", option=f"option{option}", bytes=size, price=price)
            )
    return rows


def table(layers: Sequence[str] | str, options: Sequence[tuple[str, int, float]]) -> list[Choice]:
    """The same options, with their bytes and prices, for every layer."""
    rows = []
    for layer in layers:
        for option, size, price in options:
            rows.append(Choice(layer=layer, option=option, bytes=size, price=price))
    return rows


def ladder(layers: int = 12, *, scale: float = 1e-3) -> list[Choice]:
    """Layers like those of a network: 2 to 8 bits, price falling fourfold per bit, and one that
    changes nothing."""
    rng = random.Random(7)
    rows = []
    for number in range(layers):
        name = f"layer{number}"
        parameters, sensitivity = rng.choice([1, 4, 11]) * 4096, scale * 10 ** rng.uniform(-1, 1)
        for bits in (2, 3, 4, 5, 6, 8):
            size, price = parameters * bits // 8, sensitivity * 4.0 ** (2 - bits)
            rows.append(Choice(layer=name, option=f"{bits} bit", bytes=size, price=price))
        rows.append(Choice(layer=name, option="keep", bytes=parameters * 2, price=0.0))
    return rows


def grouped_rows(seed: int) -> tuple[list[Choice], tuple[tuple[str, ...], ...]]:
    """Up to six layers in groups of one to three; the layers of a group are offered the same
    options."""
    rng = random.Random(seed)
    rows: list[Choice] = []
    groups: list[tuple[str, ...]] = []
    number = 0
    for _ in range(rng.randint(1, 3)):
        group = tuple(f"layer{number + k}" for k in range(rng.randint(1, 3)))
        number += len(group)
        groups.append(group)
        for option in range(rng.randint(1, 4)):
            for layer in group:
                price = rng.choice([rng.gauss(0, 1), rng.randint(0, 3) * 0.1])
                size = rng.randint(0, 60)
                rows.append(Choice(layer=layer, option=f"option{option}", bytes=size, price=price))
    rng.shuffle(rows)
    return rows, tuple(groups)


def share(choices: dict[str, str], groups: Sequence[Sequence[str]]) -> bool:
    """Whether the layers of every group have one option."""
    different = [group for group in groups if len(set(map(choices.__getitem__, group))) > 1]
    return not different


def by_layer(rows: Sequence[Choice]) -> list[list[Choice]]:
    found: dict[str, list[Choice]] = {}
    for row in rows:
        found.setdefault(row.layer, []).append(row)
    return list(found.values())


def combinations(rows: Sequence[Choice]) -> list[Combination]:
    """Every plan, as its rows."""
    return list(itertools.product(*by_layer(rows)))


def chosen_by(rows: Sequence[Choice], choices: dict[str, str]) -> Combination:
    """A plan as its rows. It must name every layer, and no option that a layer has not."""
    assert sorted(choices) == sorted({row.layer for row in rows})
    chosen = tuple(row for row in rows if choices[row.layer] == row.option)
    assert len(chosen) == len(choices)
    return chosen


def size_of(plan: Sequence[Choice]) -> int:
    return sum(row.bytes for row in plan)


def exact_price(plan: Sequence[Choice]) -> Fraction:
    return sum((Fraction(row.price) for row in plan), Fraction(0))


def price_of(plan: Sequence[Choice]) -> float:
    """Correctly rounded."""
    return math.fsum(row.price for row in plan)


def value(rows: Sequence[Choice], choices: dict[str, str]) -> tuple[int, Fraction]:
    """Bytes and price of a plan."""
    chosen = chosen_by(rows, choices)
    return size_of(chosen), exact_price(chosen)


def every_plan(rows: Sequence[Choice]) -> list[tuple[int, Fraction]]:
    """Bytes and price of every plan."""
    return [(size_of(plan), exact_price(plan)) for plan in combinations(rows)]


def sharing_plans(rows: Sequence[Choice], groups: Sequence[Sequence[str]]) -> list[Combination]:
    """Every plan whose layers share options as the groups say."""
    found = []
    for plan in combinations(rows):
        if share({row.layer: row.option for row in plan}, groups):
            found.append(plan)
    return found


def used(limit: Limit, plan: Sequence[Choice]) -> float:
    return math.fsum(limit.use[row.layer, row.option] for row in plan)
