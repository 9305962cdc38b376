"""Plans for every size at once: the nested plans of the Lagrangian relaxation."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from curvprune.planning.hulls import hull_steps
from curvprune.planning.priced import Priced, prices_by_bytes, table_of


class FrontierPlan(NamedTuple):
    """A plan on the frontier; unpacks as (bytes, price, choices)."""

    bytes: int
    price: float
    choices: dict[str, str]


def frontier(
    rows: Iterable[Priced], *, points: int = 33, same_option: Iterable[Collection[str]] = ()
) -> list[FrontierPlan]:
    """The nested plans of the Lagrangian relaxation, from the smallest model to the one with the
    lowest predicted loss.

    Each plan minimises sum(price) + lambda * sum(bytes) for some lambda: the lower convex hulls of
    the layers, merged by slope. From one plan to the next (before thinning) one layer, or one group
    of layers that share an option, moves to a larger and cheaper option. So bytes rise strictly,
    the price falls strictly, and no layer ever moves back. At most `points` >= 2 plans, both ends
    kept, evenly spaced in steps. Exact; no integer program. Cost: O(rows log rows).

    Raises ValueError on malformed rows or groups.
    """
    if points < 2:
        raise ValueError(
            f"frontier(points={points}): expected at least 2, the smallest and the largest model"
        )
    table = table_of(rows, same_option)
    ladders = table.ladders()
    scale = table.scale
    steps = hull_steps([prices_by_bytes(ladder) for ladder in ladders])
    stops = np.linspace(0, len(steps), min(points, len(steps) + 1)).round().astype(int)
    kept = set(stops.tolist())

    # Walk along the hulls from the smallest option of every group.
    now = [ladder[0] for ladder in ladders]
    size = sum(rung.bytes for rung in now)
    price = sum(rung.price for rung in now)
    path: list[FrontierPlan] = []
    for number in range(len(steps) + 1):
        if number:
            step = steps[number - 1]
            before, after = now[step.group], ladders[step.group][step.stop]
            size += after.bytes - before.bytes
            price += after.price - before.price
            now[step.group] = after
        if number in kept:
            choices = table.plan([rung.option for rung in now])
            path.append(FrontierPlan(size, float(Fraction(price, scale)), choices))
    return path
