"""The planner under several limits against brute force, and what it says where none fits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from operator import itemgetter

import numpy as np
import pytest
from scipy.optimize import linprog

from curvprune.planning import Choice, Effort, Infeasible, Limit, Within, cheapest
from tests.plans import (
    Combination,
    by_layer,
    chosen_by,
    combinations,
    exact_price,
    grouped_rows,
    ladder,
    price_of,
    share,
    sharing_plans,
    size_of,
    table,
    used,
    value,
)


def whole_uses(rows: list[Choice], rng: random.Random) -> dict[tuple[str, str], float]:
    return {(row.layer, row.option): float(rng.randint(0, 9)) for row in rows}


def check_against_brute_force(
    rows: list[Choice],
    plans: list[Combination],
    within: Within,
    max_loss: float | None = None,
    effort: Effort | None = None,
) -> None:
    """The best of the plans that keep within everything, or an error where there is none."""

    def fits(plan: Combination) -> bool:
        if within.max_bytes is not None and size_of(plan) + within.fixed_bytes > within.max_bytes:
            return False
        if max_loss is not None and price_of(plan) > max_loss:
            return False
        return all(used(limit, plan) <= limit.most for limit in within.limits)

    met = [plan for plan in plans if fits(plan)]
    effort = effort or Effort()
    if not met:
        with pytest.raises(Infeasible) as error:
            cheapest(rows, within, max_loss=max_loss, effort=effort)
        assert error.value.missing > 0 or math.isnan(error.value.missing)
        return
    found = cheapest(rows, within, max_loss=max_loss, effort=effort)
    assert share(found, within.same_option)
    chosen = chosen_by(rows, found)
    assert fits(chosen)
    if max_loss is None:
        assert exact_price(chosen) == min(map(exact_price, met))
    else:
        assert size_of(chosen) == min(map(size_of, met))


@pytest.mark.parametrize("seed", range(60))
def test_prices_that_fall_with_the_bits_and_a_time_equal_brute_force(seed: int) -> None:
    """Prices from 1e-2 to 1e-14 and times with 53 random bits: as fine as whole numbers get."""
    rng = random.Random(seed)
    for _ in range(4):
        rows, use = [], {}
        for layer in range(rng.randint(3, 4)):
            weights = rng.choice([4096, 16384, 65536, 147456, 589824])
            sensitivity = 10 ** rng.uniform(-5, -1)
            for b in (2, 3, 4, 8, 16):
                price = sensitivity * 4.0**-b * rng.uniform(0.7, 1.4)
                size = weights * b // 8 + weights // 64
                rows.append(Choice(layer=f"l{layer}", option=str(b), bytes=size, price=price))
                use[f"l{layer}", str(b)] = weights * 1e-6 * (b / 16 + 0.3) * rng.uniform(0.95, 1.05)
        plans = combinations(rows)
        pick, other = rng.choice(plans), rng.choice(plans)
        spent = used(Limit(name="ms", most=0.0, use=use), other)
        limits = (Limit(name="ms", most=spent * rng.uniform(1.0, 1.1), use=use),)
        check_against_brute_force(rows, plans, Within(max_bytes=size_of(pick), limits=limits))
        loss = price_of(pick) * rng.uniform(1.0, 1.2)
        check_against_brute_force(rows, plans, Within(limits=limits), loss)


def random_limits(rows: list[Choice], rng: random.Random, count: int) -> tuple[Limit, ...]:
    """Uses that disagree with bytes and with one another, some whole, some not."""
    limits = []
    for number in range(count):
        use = whole_uses(rows, rng)
        if number:
            use = {pair: rng.random() for pair in use}
        some_plan = [rng.choice(options) for options in by_layer(rows)]
        most = sum(use[row.layer, row.option] for row in some_plan)
        limits.append(Limit(name=f"limit{number}", most=most, use=use))
    return tuple(limits)


@pytest.mark.parametrize("core", [2, 300])
@pytest.mark.parametrize("seed", range(40))
def test_several_limits_equal_brute_force(seed: int, core: int) -> None:
    """Also where the first core is so small that it has to grow."""
    rng = random.Random(seed)
    rows = []
    for layer in range(rng.randint(1, 5)):
        for option in range(rng.randint(1, 5)):
            size, price = rng.randint(0, 99), rng.choice([rng.random(), 0.5])
            rows.append(Choice(layer=f"l{layer}", option=f"o{option}", bytes=size, price=price))
    limits = random_limits(rows, rng, rng.randint(1, 3))
    plans = combinations(rows)
    pick = rng.choice(plans)
    for max_bytes in (None, size_of(pick) + 7):
        for max_loss in (None, price_of(pick)):
            within = Within(max_bytes=max_bytes, fixed_bytes=7, limits=limits)
            check_against_brute_force(rows, plans, within, max_loss, Effort(core=core))


def test_several_limits_and_groups() -> None:
    rng = random.Random(3)
    for seed in range(20):
        rows, groups = grouped_rows(seed)
        use = whole_uses(rows, rng)
        plans = sharing_plans(rows, groups)
        limit = Limit(name="operations", most=0.0, use=use)
        limit = Limit(name="operations", most=used(limit, rng.choice(plans)), use=use)
        met = [plan for plan in plans if used(limit, plan) <= limit.most]
        max_bytes = size_of(rng.choice(met))
        within = Within(max_bytes=max_bytes, limits=(limit,), same_option=groups)
        check_against_brute_force(rows, plans, within)


SLOW = {("a", "small"): 7.5, ("a", "large"): 3.0, ("b", "only"): 1.0}


@pytest.mark.parametrize(
    ("use", "time", "others", "message"),
    [
        (
            SLOW,
            2.0,
            {"max_bytes": 14},
            r"time: at least 4 is needed, 2 allowed; max_bytes: at least 15 .* 14",
        ),
        (
            SLOW,
            5.0,
            {"max_bytes": 120, "fixed_bytes": 100},
            r"each of time, max_bytes can be met, but not all together: raise time from 5 to 8.5 "
            r"\(by 3.5\) or max_bytes from 120 to 125 \(by 5\), or add other options",
        ),
        (SLOW | {("a", "large"): 9.0}, 8.5, {"max_loss": 1.0}, r"max_loss from 1 to 1.25"),
        (
            SLOW,
            9.0,
            {"max_loss": 0.5, "max_bytes": 24},
            r"raise max_loss from 0.5 to 1.25 \(by 0.75\) or max_bytes from 24 to 25",
        ),
    ],
)
def test_infeasible_names_every_limit_that_could_be_raised(
    use: dict[tuple[str, str], float], time: float, others: Mapping[str, float], message: str
) -> None:
    rows = table("a", [("small", 10, 1.0), ("large", 20, 0.0)]) + table("b", [("only", 5, 0.25)])
    max_bytes = others.get("max_bytes")
    within = Within(
        max_bytes=None if max_bytes is None else int(max_bytes),
        fixed_bytes=int(others.get("fixed_bytes", 0)),
        limits=(Limit(name="time", most=time, use=use),),
    )
    with pytest.raises(Infeasible, match=message) as error:
        cheapest(rows, within, max_loss=others.get("max_loss"))
    if time == 2.0:
        assert error.value.shortfalls == (("time", 2.0, 4.0), ("max_bytes", 14, 15))
        assert (error.value.constraint, error.value.best) == ("time", 4.0)
        assert error.value.missing == 2.0


def test_where_no_single_limit_is_the_one_to_raise_all_are_named() -> None:
    """Three options of which each meets one of three limits."""
    rows = table("a", [("x", 9, 0.0), ("y", 9, 0.0), ("z", 1, 0.0)])
    limits = []
    for option in "xy":
        use = {("a", row.option): 9.0 * (row.option != option) for row in rows}
        limits.append(Limit(name=f"no {option}", most=1.0, use=use))
    message = "no plan meets no x, no y, max_bytes together, nor all of them but one"
    with pytest.raises(Infeasible, match=message):
        cheapest(rows, Within(max_bytes=1, limits=tuple(limits)))


def small_whole_rows(rng: random.Random) -> list[Choice]:
    rows = []
    for layer in range(rng.randint(1, 4)):
        for option in range(rng.randint(2, 4)):
            size, price = rng.randint(1, 9), float(rng.randint(0, 9))
            rows.append(Choice(layer=f"l{layer}", option=f"o{option}", bytes=size, price=price))
    return rows


def least_within(
    plans: list[dict[str, float]], name: str, limits: Mapping[str, float]
) -> float | None:
    """The least of one quantity over the plans that keep within the others."""
    others = [other for other in limits if other != name]
    met = []
    for plan in plans:
        if all(plan[other] <= limits[other] for other in others):
            met.append(plan[name])
    return min(met, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_what_infeasible_says_equals_brute_force(seed: int) -> None:
    """Several limits that no plan meets: which are out of reach alone, and else how far each alone
    must be raised."""
    rng = random.Random(seed)
    rows = small_whole_rows(rng)
    time = Limit(name="time", most=0.0, use=whole_uses(rows, rng), per=rng.choice([1.0, 3.0]))
    plans = []
    for plan in combinations(rows):
        taken = used(time, plan) / time.per
        plans.append({"time": taken, "max_loss": price_of(plan), "max_bytes": 7.0 + size_of(plan)})
    limits, alone, single = {}, {}, {}
    for name in plans[0]:
        least = min(map(itemgetter(name), plans))
        limits[name] = least + rng.choice([-1, 0, 1, 2])
        if least > limits[name]:
            alone[name] = least
    for name in limits:
        best = least_within(plans, name, limits)
        if best is not None:
            single[name] = best
            if best <= limits[name]:
                pytest.skip("these can be met")

    time = Limit(name="time", most=limits["time"], use=time.use, per=time.per)
    within = Within(max_bytes=int(limits["max_bytes"]), fixed_bytes=7, limits=(time,))
    with pytest.raises(Infeasible) as error:
        cheapest(rows, within, max_loss=limits["max_loss"])
    told = {s.name: s.best for s in error.value.shortfalls}
    assert all(s.limit == limits[s.name] for s in error.value.shortfalls)
    if alone or single:
        assert told == pytest.approx(alone or single)
    else:
        assert set(told) == set(limits) and all(math.isnan(best) for best in told.values())


def test_a_limit_counts_what_a_plan_uses() -> None:
    use = {("a", "x"): 30.0, ("b", "x"): 4.0, ("b", "y"): 4.0 + 2**-40}
    limit = Limit(name="bits", most=4.25, use=use, per=8)
    assert limit.used({"a": "x", "b": "x"}) == 4.25
    assert limit.used({"a": "x", "b": "y"}) == 4.25 + 2**-43 > limit.most
    rows = table("a", [("x", 1, 0.0)]) + table("b", [("x", 1, 0.0), ("y", 1, -1.0)])
    assert cheapest(rows, Within(limits=(limit,))) == {"a": "x", "b": "x"}

    only = table("a", [("x", 1, 0.0)])
    for seed in range(20):
        odd = random.Random(seed).uniform(0.001, 1000)
        time = Limit(name="time", most=0.0, use={("a", "x"): odd})
        with pytest.raises(Infeasible) as error:
            cheapest(only, Within(limits=(time,)))
        told = float(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
        assert odd <= told <= odd * 1.00001, "a limit that is raised to what is printed can be met"
    thirds = Limit(name="time", most=1 / 3, use={("a", "x"): 1.0}, per=3)
    assert Fraction(1 / 3) < Fraction(1, 3), "met as a rounded number only"
    assert cheapest(only, Within(limits=(thirds,))) == {"a": "x"}


def relaxed(rows: list[Choice], within: Within) -> float:
    """The least price of fractions of options: no plan costs less."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    uses, most = [[float(row.bytes) for row in rows]], [float(within.max_bytes or 0)]
    for limit in within.limits:
        uses.append([limit.use[row.layer, row.option] for row in rows])
        most.append(limit.most)
    one_each = np.zeros((len(layers), len(rows)))
    for column, row in enumerate(rows):
        one_each[layers.index(row.layer), column] = 1.0
    answer = linprog(
        [row.price for row in rows],
        A_ub=np.array(uses),
        b_ub=most,
        A_eq=one_each,
        b_eq=np.ones(len(layers)),
    )
    return float(answer.fun)


@pytest.mark.parametrize("seed", [0, 5])
def test_a_plan_that_is_not_proven_says_how_much_better_one_could_be(seed: int) -> None:
    """HiGHS is stopped at its first node; the bound is that of the linear relaxation."""
    rng = random.Random(seed)
    rows = ladder(20)
    limits = []
    for number in range(2):
        use = {(row.layer, row.option): rng.random() for row in rows}
        limits.append(Limit(name=f"limit{number}", most=9.0, use=use))
    max_bytes = sum(row.bytes for row in rows if row.option == "4 bit")
    within = Within(max_bytes=max_bytes, limits=tuple(limits))
    message = r"not proven.*HiGHS stopped early.*gain at most [0-9.e-]+ of its"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        choices = cheapest(rows, within, effort=Effort(nodes_of_several=1))
    told = float(str(caught[0].message).split("at most ")[1].split()[0])
    price = float(value(rows, choices)[1])
    assert told == pytest.approx((price - relaxed(rows, within)) / price, rel=0.06)  # two digits
    best = float(value(rows, cheapest(rows, within))[1])
    assert price * (1 - told) <= best <= price


def test_where_the_solver_finds_no_plan_it_says_so() -> None:
    rows = ladder(8)
    rng = random.Random(0)
    use = {(row.layer, row.option): rng.random() for row in rows}
    within = Within(max_bytes=150_000, limits=(Limit(name="time", most=3.5, use=use),))
    with pytest.raises(RuntimeError, match="no plan within the limits was found, nor shown"):
        cheapest(rows, within, effort=Effort(nodes_of_several=0))


def all_ones(rows: list[Choice]) -> dict[tuple[str, str], float]:
    return {(row.layer, row.option): 1.0 for row in rows}


def without_the_last(use: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return dict(list(use.items())[:-1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda use: Limit(name="time", most=math.nan, use=use), "most=nan"),
        (lambda use: Limit(name="", most=1.0, use=use), "name=''"),
        (lambda use: Limit(name="time", most=1.0, use=use, per=0.0), "per=0"),
        (
            lambda use: Limit(name="time", most=1.0, use={**use, ("layer0", "keep"): math.inf}),
            "layer0.*inf",
        ),
        (
            lambda use: Limit(name="time", most=1e9, use=without_the_last(use)),
            "'layer2', option 'keep'",
        ),
    ],
)
def test_malformed_limits_are_named(
    make: Callable[[dict[tuple[str, str], float]], Limit], message: str
) -> None:
    rows = ladder(3)
    with pytest.raises(ValueError, match=message):
        cheapest(rows, Within(max_bytes=10**9, limits=(make(all_ones(rows)),)))
