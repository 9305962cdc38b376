"""Plans with pairs of layers against brute force over all plans."""

from __future__ import annotations

import numpy as np
import pytest

from curvprune.planning import Choice, Infeasible, Limit, Quadratic, Within, cheapest, scaled
from tests.plans import combinations


def problem(
    seed: int, *, layers: int = 6, options: int = 4, draws: int = 40, together: float = 1.0
) -> Quadratic:
    """Changes that get fourfold shorter with each step up in bytes, along directions that layers
    share."""
    rng = np.random.default_rng(seed)
    rows, columns = [], []
    common = rng.normal(size=draws)
    for n in range(layers):
        own = (common * rng.choice([-1, 1]) * together + rng.normal(size=draws)) * np.exp(
            rng.normal()
        )
        for o in range(options):
            g = own * 2.0**-o / draws**0.5
            rows.append(
                Choice(
                    layer=f"l{n}",
                    option=f"o{o}",
                    bytes=(o + 1) * int(10 + 10 * n),
                    price=0.5 * g @ g,
                )
            )
            columns.append(g)
    return Quadratic(rows=tuple(rows), draws=np.stack(columns, axis=1))


def every_plan(q: Quadratic) -> list[dict[str, str]]:
    plans = []
    for rows in combinations(q.rows):
        plans.append({row.layer: row.option for row in rows})
    return plans


def every_size_and_value(q: Quadratic) -> tuple[np.ndarray, np.ndarray]:
    """Of every plan, in the order of `every_plan`. ½ |Σ g|² over draws is the whole change at once:
    prices here are exact, so nothing else is left, but that pairs save 90 % at most."""
    where = {(row.layer, row.option): i for i, row in enumerate(q.rows)}
    picks = np.array([list(map(where.__getitem__, plan.items())) for plan in every_plan(q)])
    together = 0.5 * (q.draws[:, picks].sum(2) ** 2).sum(0)
    alone = np.array([row.price for row in q.rows])[picks].sum(1)
    sizes = np.array([row.bytes for row in q.rows])[picks].sum(1)
    return sizes, np.maximum(together, 0.1 * alone)


def size(q: Quadratic, choices: dict[str, str]) -> int:
    return sum(row.bytes for row in q.rows if choices[row.layer] == row.option)


def test_the_value_is_that_of_the_whole_change():
    q = problem(0)
    sizes, values = every_size_and_value(q)
    for number, choices in enumerate(every_plan(q)):
        if number % 97 == 0:
            assert q.value(choices) == pytest.approx(values[number])
            assert size(q, choices) == sizes[number]


def test_close_to_the_best_there_is_and_never_worse_than_adding_up():
    gaps, adding = [], []
    for seed in range(30):
        q = problem(seed)
        sizes, values = every_size_and_value(q)
        for most in np.quantile(sizes, [0.2, 0.5, 0.8]).astype(int).tolist():
            best = values[sizes <= most].min()
            found = q.cheapest(Within(max_bytes=most))
            assert size(q, found) <= most
            plain = q.value(cheapest(q.rows, Within(max_bytes=most)))
            assert best - 1e-12 <= q.value(found) <= plain + 1e-12
            gaps.append(q.value(found) / best)
            adding.append(plain / best)
    assert np.median(gaps) < 1.02 and np.mean(gaps) < 1.15
    assert np.mean(gaps) - 1 < 0.5 * (np.mean(adding) - 1), "it must be worth its cost"


def test_without_pairs_it_is_the_knapsack():
    q = problem(1)
    q = Quadratic(rows=q.rows, draws=np.zeros_like(q.draws))
    for most in (300, 500, 700):
        assert q.cheapest(Within(max_bytes=most)) == cheapest(q.rows, Within(max_bytes=most))


def test_a_smaller_plan_of_no_higher_value():
    gained = 0
    for seed in range(20):
        q = problem(seed)
        start = cheapest(q.rows, Within(max_bytes=450))
        found = q.smaller(start, Within(fixed_bytes=7))
        assert q.value(found) <= q.value(start) + 1e-12 and size(q, found) <= size(q, start)
        gained += size(q, found) < size(q, start)
        sizes, values = every_size_and_value(q)
        smallest = sizes[values <= q.value(start) * (1 + 1e-12)].min()
        assert size(q, found) <= 1.25 * smallest
    assert gained >= 5


def test_limits_and_groups_hold():
    q = problem(2)
    use = {(row.layer, row.option): 4.0 - int(row.option[1]) for row in q.rows}
    limit = Limit(name="ms", most=12.0, use=use)
    within = Within(max_bytes=600, limits=(limit,), same_option=(("l0", "l1"),))
    for found in (q.cheapest(within), q.smaller(cheapest(q.rows, within), within)):
        assert found["l0"] == found["l1"] and sum(use[pair] for pair in found.items()) <= 12
    with pytest.raises(Infeasible, match="max_bytes"):
        q.cheapest(Within(max_bytes=10))


def test_factors_scale_prices_and_pairs_alike():
    q = problem(3)
    choices = {f"l{n}": "o1" for n in range(6)}
    assert scaled(q, {"o1": 4.0}).value(choices) == pytest.approx(4 * q.value(choices))
    assert scaled(q, {"o2": 4.0}).value(choices) == pytest.approx(q.value(choices))
    mixed = {**choices, "l0": "o2"}
    doubled = Quadratic(
        rows=q.rows,
        draws=q.draws * (1.0 + np.array([row.option == "o2" for row in q.rows])),
    )
    alone = sum(r.price for r in q.rows if mixed[r.layer] == r.option)
    pairs = doubled.value(mixed) - alone
    own = next(r.price for r in q.rows if (r.layer, r.option) == ("l0", "o2"))
    assert scaled(q, {"o2": 4.0}).value(mixed) == pytest.approx(alone + 3 * own + pairs)
