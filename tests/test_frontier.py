"""The nested plans against the lower convex hull of all plans."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from curvprune.planning import Choice, frontier
from tests.plans import (
    chosen_by,
    every_plan,
    exact_price,
    grouped_rows,
    ladder,
    random_rows,
    share,
    sharing_plans,
    size_of,
    value,
)


@pytest.mark.parametrize("seed", range(60))
def test_frontier_is_the_lower_convex_hull_of_all_plans(seed: int) -> None:
    rows = random_rows(seed)
    best: dict[int, Fraction] = {}
    for size, price in every_plan(rows):
        best[size] = min(price, best.get(size, price))
    lowest = min(best.values())
    stop = min(size for size, price in best.items() if price == lowest)
    points = sorted((size, price) for size, price in best.items() if size <= stop)

    path = frontier(rows, points=10_000)
    exact = [value(rows, plan.choices) for plan in path]
    assert exact[0] == points[0] and exact[-1] == points[-1]
    for (size, price), plan in zip(exact, path, strict=True):
        assert (size, float(price)) == (plan.bytes, plan.price)
        # On the hull: no chord between two plans passes below it.
        for (s0, p0), (s1, p1) in itertools.combinations(points, 2):
            if s0 < size < s1:
                assert (price - p0) * (s1 - s0) <= (p1 - p0) * (size - s0)
    slopes = [(p0 - p1) / (s1 - s0) for (s0, p0), (s1, p1) in itertools.pairwise(exact)]
    assert all(slope > 0 for slope in slopes) and slopes == sorted(slopes, reverse=True)


@pytest.mark.parametrize("seed", range(60))
def test_plans_of_groups_minimise_among_the_plans_that_share(seed: int) -> None:
    rows, groups = grouped_rows(seed)
    sharing = [(size_of(plan), exact_price(plan)) for plan in sharing_plans(rows, groups)]

    path = frontier(rows, points=1000, same_option=groups)
    assert all(share(plan.choices, groups) for plan in path)
    exact = [value(rows, plan.choices) for plan in path]
    assert exact[0] == min(sharing)
    assert exact[-1][1] == min(price for _, price in sharing)
    assert [(size, float(price)) for size, price in exact] == [(p.bytes, p.price) for p in path]
    # Each minimises price + λ bytes for some λ.
    for (s0, p0), (s1, p1) in itertools.pairwise(exact):
        slope = (p0 - p1) / (s1 - s0)
        assert min(price + slope * size for size, price in sharing) == p0 + slope * s0


def test_frontier_is_nested_and_thinning_keeps_both_ends() -> None:
    rows = ladder(20)
    path = frontier(rows, points=1000)
    for before, after in itertools.pairwise(path):
        moves = zip(chosen_by(rows, before.choices), chosen_by(rows, after.choices), strict=True)
        moved = [(old, new) for old, new in moves if old != new]
        assert len(moved) == 1 and moved[0][0].bytes < moved[0][1].bytes
    for count in (2, 3, 33):
        thin = frontier(rows, points=count)
        assert len(thin) == count and thin[0] == path[0] and thin[-1] == path[-1]
        assert all(plan in path for plan in thin)
    with pytest.raises(ValueError, match="points=1"):
        frontier(rows, points=1)


def test_frontier_of_one_option_is_one_plan() -> None:
    assert frontier([Choice(layer="a", option="x", bytes=3, price=-1.0)]) == [(3, -1.0, {"a": "x"})]
