"""The planner under one limit against brute force: every plan of small instances is enumerated with
exact fractions."""

from __future__ import annotations

import math
import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from curvprune.planning import Choice, Effort, Infeasible, Within, cheapest, frontier
from tests.plans import (
    KINDS,
    by_layer,
    every_plan,
    exact_price,
    grouped_rows,
    ladder,
    random_rows,
    share,
    sharing_plans,
    size_of,
    table,
    value,
)

ENUMERATED, BY_HIGHS = Effort(), Effort(states=0)  # with no states allowed, HiGHS gets every core


@pytest.fixture(params=[ENUMERATED, BY_HIGHS], ids=["enumeration", "highs"])
def effort(request: pytest.FixtureRequest) -> Effort:
    found: Effort = request.param
    return found


def check_against_brute_force(seed: int, effort: Effort) -> None:
    kind = KINDS[seed % len(KINDS)]
    if effort == BY_HIGHS and kind in ("tiny differences", "price follows bytes"):
        pytest.skip(
            "beyond double precision: only the enumeration in integers can tell these plans apart"
        )
    rows = random_rows(seed)
    plans = every_plan(rows)
    exact = effort == ENUMERATED or kind == "small integers"
    with warnings.catch_warnings():
        # HiGHS refuses coefficients above 1e15, which arise when nothing but rounding separates a
        # plan from the bound.
        warnings.simplefilter("error" if effort == ENUMERATED else "ignore")
        rng = random.Random(1000 + seed)
        sizes = [size for size, _ in plans]
        random_size = rng.randint(min(sizes), max(sizes))
        for max_bytes in (min(sizes), random_size, rng.choice(plans)[0]):
            found = cheapest(rows, Within(max_bytes=max_bytes), effort=effort)
            spent, price = value(rows, found)
            best, least = min((price, size) for size, price in plans if size <= max_bytes)
            assert spent <= max_bytes
            assert float(price) == pytest.approx(float(best), rel=1e-14)
            assert not exact or (price, spent) == (best, least)
        prices = [price for _, price in plans]
        lowest, highest = float(min(prices)), float(max(prices))
        random_loss = rng.uniform(lowest, highest)
        for max_loss in (lowest, random_loss, float(rng.choice(plans)[1])):
            if max_loss < lowest:
                continue
            size, price = value(rows, cheapest(rows, max_loss=max_loss, effort=effort))
            met = [plan for plan in plans if float(plan[1]) <= max_loss]
            assert size == min(met)[0] and float(price) <= max_loss
            assert not exact or price == min(met)[1]


@pytest.mark.parametrize("seed", range(90))
def test_cheapest_equals_brute_force_in_both_directions(seed: int, effort: Effort) -> None:
    check_against_brute_force(seed, effort)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(90, 1500))
def test_cheapest_equals_brute_force_on_many_instances(seed: int, effort: Effort) -> None:
    check_against_brute_force(seed, effort)


@pytest.mark.parametrize("seed", range(60))
def test_plans_of_groups_equal_brute_force_over_the_plans_that_share(
    seed: int, effort: Effort
) -> None:
    rows, groups = grouped_rows(seed)
    sharing = [(size_of(plan), exact_price(plan)) for plan in sharing_plans(rows, groups)]
    rng = random.Random(seed)
    max_bytes, max_loss = rng.choice(sharing)[0], float(rng.choice(sharing)[1])

    within = Within(max_bytes=max_bytes, same_option=groups)
    plan = cheapest(rows, within, effort=effort)
    assert list(plan) == list(dict.fromkeys(row.layer for row in rows)) and share(plan, groups)
    assert value(rows, plan)[0] <= max_bytes
    price, size = min((price, size) for size, price in sharing if size <= max_bytes)
    assert float(value(rows, plan)[1]) == pytest.approx(float(price), abs=1e-14)
    assert effort == BY_HIGHS or value(rows, plan) == (size, price)

    plan = cheapest(rows, Within(same_option=groups), max_loss=max_loss, effort=effort)
    assert share(plan, groups) and float(value(rows, plan)[1]) <= max_loss
    assert value(rows, plan)[0] == min(size for size, price in sharing if float(price) <= max_loss)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((("layer0", "nowhere"),), "'nowhere' has no rows"),
        ((("layer0", "layer1"), ("layer1", "layer2")), "'layer1' is named 2 times"),
        (
            (("layer0", "odd"),),
            "'layer0' and 'odd' are in one group, but only one of them is offered 2 bit, .*odd bit",
        ),
    ],
)
def test_groups_that_cannot_be_are_named(groups: tuple[tuple[str, ...], ...], message: str) -> None:
    rows = [*ladder(3), Choice(layer="odd", option="odd bit", bytes=1, price=0.0)]
    with pytest.raises(ValueError, match=message):
        cheapest(rows, Within(max_bytes=10**6, same_option=groups))


def test_an_optimum_off_the_convex_hull_is_found(effort: Effort) -> None:
    # The hull of each layer is {small, large}; with 11 bytes the best plan uses "middle" twice,
    # which no hull contains.
    rows = table("ab", [("small", 1, 10.0), ("middle", 5, 6.5), ("large", 10, 0.0)])
    assert cheapest(rows, Within(max_bytes=10), effort=effort) == {"a": "middle", "b": "middle"}
    found = cheapest(rows, Within(max_bytes=11), effort=effort)
    assert sorted(found.values()) == ["large", "small"]


def test_one_byte_decides_at_a_terabyte(effort: Effort) -> None:
    """HiGHS lets three terabytes through where one byte less is allowed. Its proposal must be
    refused, and the plan be asked for again."""
    big = 10**12
    rows = table("abc", [("low", 1, 1.0), ("mid", big - 1, 1e-9), ("high", big, 0.0)])
    found = cheapest(rows, Within(max_bytes=3 * big - 1), effort=effort)
    assert sorted(found.values()) == ["high", "high", "mid"]
    found = cheapest(rows, Within(max_bytes=3 * big), effort=effort)
    assert sorted(found.values()) == ["high", "high", "high"]
    found = cheapest(rows, max_loss=1e-9, effort=effort)
    assert sorted(found.values()) == ["high", "high", "mid"]


def test_a_thousand_layers_of_twenty_options() -> None:
    rng = random.Random(0)
    rows = []
    for layer in range(1000):
        parameters, sensitivity = rng.choice([1, 4, 11]) * 4096 * 1024, 10 ** rng.uniform(-6, -2)
        for option in range(20):
            bits = 1.5 + 0.35 * option
            price = sensitivity * 4**-bits * rng.uniform(0.5, 2)
            size = int(parameters * bits / 8)
            rows.append(Choice(layer=f"l{layer}", option=f"o{option}", bytes=size, price=price))
    path = frontier(rows, points=2000)
    index = len(path) // 2
    below, above = path[index], path[index + 1]
    between = (below.bytes + above.bytes) // 2
    spent, cost = value(rows, cheapest(rows, Within(max_bytes=between)))
    # A hull plan is optimal at its own size, so the optimum between two of them lies between their
    # prices.
    assert spent <= between and above.price < cost and float(cost) <= below.price
    spent, cost = value(rows, cheapest(rows, max_loss=below.price))
    assert float(cost) <= below.price and spent == below.bytes


def test_dominated_options_are_never_chosen() -> None:
    rows = ladder()
    worse = [
        Choice(layer=r.layer, option="0 " + r.option, bytes=r.bytes + 1, price=r.price + 1e-9)
        for r in rows
    ]
    within = Within(max_bytes=120_000)
    assert cheapest(worse + rows, within) == cheapest(rows, within)
    assert cheapest(worse + rows, max_loss=2e-3) == cheapest(rows, max_loss=2e-3)


def test_ties_do_not_depend_on_the_order_of_the_rows(effort: Effort) -> None:
    options = [("b", 1, 1.0), ("a", 1, 1.0), ("d", 2, 0.5), ("c", 2, 0.5)]
    rows = table([f"l{layer}" for layer in range(6)], options)
    first = cheapest(rows, Within(max_bytes=9), effort=effort)
    assert sorted(first.values()) == ["a", "a", "a", "c", "c", "c"]
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        again = cheapest(shuffled, Within(max_bytes=9), effort=effort)
        assert again == first
        assert list(again) == list(dict.fromkeys(row.layer for row in shuffled))


def test_among_equal_prices_the_smaller_model_wins_and_among_equal_bytes_the_better(
    effort: Effort,
) -> None:
    # Layer a can fall from 1 to 0 for 3 bytes, layer b for 2: with 4 bytes to spend only one of
    # them can.
    rows = table("a", [("x", 1, 1.0), ("y", 4, 0.0)]) + table("b", [("x", 1, 1.0), ("y", 3, 0.0)])
    assert cheapest(rows, Within(max_bytes=6), effort=effort) == {"a": "x", "b": "y"}
    rows = [
        Choice(layer=r.layer, option=r.option, bytes=int(r.price) + 1, price=float(r.bytes))
        for r in rows
    ]
    assert cheapest(rows, max_loss=6.0, effort=effort) == {"a": "x", "b": "y"}


def tied_rows(rng: random.Random, most_bytes: int, most_price: int) -> list[Choice]:
    rows = []
    for layer in range(rng.randint(2, 7)):
        for option in range(4):
            size, price = rng.randint(0, most_bytes), float(rng.randint(0, most_price))
            rows.append(Choice(layer=f"l{layer}", option=f"o{option}", bytes=size, price=price))
    return rows


def totals(rows: list[Choice]) -> set[tuple[int, float]]:
    """Size and price of every plan; small whole numbers, so that floats are exact and most plans
    coincide."""
    sums = {(0, 0.0)}
    for layer in by_layer(rows):
        grown = set()
        for row in layer:
            grown |= {(size + row.bytes, price + row.price) for size, price in sums}
        sums = grown
    return sums


@pytest.mark.parametrize("seed", [192, 515, 525])
def test_ties_in_price_are_broken_by_size_among_many_plans(seed: int, effort: Effort) -> None:
    rng = random.Random(seed)
    rows = tied_rows(rng, 20, 6)
    max_bytes = rng.choice(sorted(totals(rows)))[0]
    size, price = value(rows, cheapest(rows, Within(max_bytes=max_bytes), effort=effort))
    assert (price, size) == min((price, size) for size, price in totals(rows) if size <= max_bytes)


@pytest.mark.parametrize("seed", [544, 657, 1314, 1408])
def test_ties_in_size_are_broken_by_price_among_many_plans(seed: int, effort: Effort) -> None:
    rng = random.Random(seed)
    rows = tied_rows(rng, 6, 20)
    max_loss = rng.choice(sorted({price for _, price in totals(rows)}))
    size, price = value(rows, cheapest(rows, max_loss=max_loss, effort=effort))
    assert (size, price) == min((size, price) for size, price in totals(rows) if price <= max_loss)


def test_fixed_bytes_count_towards_the_limit() -> None:
    rows = ladder()
    found = cheapest(rows, Within(max_bytes=200_000, fixed_bytes=80_000))
    assert found == cheapest(rows, Within(max_bytes=120_000))


def test_a_price_read_off_the_frontier_can_be_met_again() -> None:
    rows = table(["l0", "l1", "l2"], [("x", 1, 0.1), ("y", 2, 0.0)])
    for plan in frontier(rows):
        assert value(rows, cheapest(rows, max_loss=plan.price))[0] == plan.bytes
    # Rounded, three times 0.1 is 0.30000000000000004: a limit of 0.3 excludes it.
    thrice = math.fsum([0.1] * 3)
    assert thrice > 0.3 - 1e-17
    assert value(rows, cheapest(rows, max_loss=thrice))[0] == 3
    assert value(rows, cheapest(rows, max_loss=math.nextafter(thrice, 0)))[0] == 4


def test_infeasible_says_which_limit_and_by_how_much() -> None:
    rows = table("ab", [("x", 900, 0.5), ("y", 950, 0.25)])
    tight = Within(max_bytes=1000, fixed_bytes=40)
    message = "max_bytes: at least 1,840 is needed, 1,000 allowed; raise"
    with pytest.raises(Infeasible, match=message) as too_large:
        cheapest(rows, tight)
    error = too_large.value
    assert (error.constraint, error.limit, error.best) == ("max_bytes", 1000, 1840)
    assert error.missing == 840 and isinstance(error, ValueError)
    message = r"max_loss: at least 0.5 is needed, 0.2 allowed; raise"
    with pytest.raises(Infeasible, match=message) as too_dear:
        cheapest(rows, max_loss=0.2)
    assert (too_dear.value.constraint, too_dear.value.best) == ("max_loss", 0.5)
    message = r"max_loss: at least 0.5 .*; max_bytes: at least 1,840 .*; raise"
    with pytest.raises(Infeasible, match=message) as both:
        cheapest(rows, tight, max_loss=0.2)
    assert both.value.shortfalls == (("max_loss", 0.2, 0.5), ("max_bytes", 1000, 1840))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table(["mlp.up"], [("4 bit", 3, math.nan)]), "'mlp.up'.*nan"),
        (table(["mlp.up"], [("4 bit", 3, math.inf)]), "'mlp.up'.*inf"),
        (table(["mlp.up"], [("4 bit", -3, 0.0)]), "'mlp.up'.*-3"),
        ([SimpleNamespace(layer="mlp.up", option="4 bit", bytes=1.5, price=0.0)], "'mlp.up'.*1.5"),
        (table(["mlp.up"], [("4 bit", 3, 0.0)] * 2), "'mlp.up'.*twice"),
        ([], "no rows"),
    ],
)
def test_malformed_rows_are_named(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cheapest(rows, Within(max_bytes=10))
    with pytest.raises(ValueError, match=message):
        frontier(rows)


def test_at_least_one_limit() -> None:
    with pytest.raises(ValueError, match=r"at least one limit"):
        cheapest(ladder())
    with pytest.raises(ValueError, match=r"nan"):
        cheapest(ladder(), max_loss=math.nan)


def test_a_limit_on_bytes_and_one_on_the_loss() -> None:
    rows = ladder()
    smallest = cheapest(rows, max_loss=2e-3)
    size, _ = value(rows, smallest)
    assert cheapest(rows, Within(max_bytes=size + 5, fixed_bytes=5), max_loss=2e-3) == smallest
    message = r"not all together: raise max_loss from 0.002 to .* or max_bytes"
    with pytest.raises(Infeasible, match=message) as error:
        cheapest(rows, Within(max_bytes=size - 1), max_loss=2e-3)
    loss, stored = error.value.shortfalls
    assert stored == ("max_bytes", size - 1, size)
    best = cheapest(rows, Within(max_bytes=size - 1))
    assert loss.best == float(value(rows, best)[1]) > 2e-3


def test_a_solver_that_gives_up_is_reported_and_the_plan_stays_valid() -> None:
    rows = ladder(8)
    nothing_tried = Effort(states=0, nodes=0)
    with pytest.warns(RuntimeWarning, match=r"not proven.*HiGHS stopped early.*frontier\(\)"):
        for max_bytes in range(133_898, 140_000, 997):
            found = cheapest(rows, Within(max_bytes=max_bytes), effort=nothing_tried)
            assert value(rows, found)[0] <= max_bytes
