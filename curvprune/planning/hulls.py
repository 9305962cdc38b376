"""Lower convex hulls of ladders of options: the linear relaxation of a plan under one limit."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

Ladder = Sequence[tuple[int, int]]  # (weight rising, cost falling), integers


class Step(NamedTuple):
    """From one corner of a ladder's hull to the next, and the cost saved per unit of weight."""

    slope: Fraction
    group: int
    start: int
    stop: int


def hull_steps(ladders: Sequence[Ladder]) -> list[Step]:
    """The steps along the lower convex hulls of all ladders, steepest first.

    Cost: linear in the rungs, and a sort.
    """
    steps = []
    for number, ladder in enumerate(ladders):
        for start, stop in pairwise(_corners(ladder)):
            (light, dear), (heavy, cheap) = ladder[start], ladder[stop]
            steps.append(Step(Fraction(dear - cheap, heavy - light), number, start, stop))
    return sorted(steps, key=lambda step: (-step.slope, step.group, step.start))


def _corners(ladder: Ladder) -> list[int]:
    """Indices of the rungs on the lower convex hull (Andrew's monotone chain)."""
    hull: list[int] = []
    for index, (weight, cost) in enumerate(ladder):
        while len(hull) > 1:
            (w0, c0), (w1, c1) = ladder[hull[-2]], ladder[hull[-1]]
            # The middle one stays where the line turns upwards at it.
            if (c0 - c1) * (weight - w1) > (c1 - cost) * (w1 - w0):
                break
            hull.pop()
        hull.append(index)
    return hull
