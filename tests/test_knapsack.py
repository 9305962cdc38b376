"""The planner against brute force: every plan of small instances is enumerated with exact
fractions."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from curvprune.planning import Choice, Infeasible, Limit, cheapest, frontier
from curvprune.planning import integer_program as knapsack

KINDS = ("small integers", "wide", "ties", "gaussian", "tiny differences", "price follows bytes")


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


def by_layer(rows: list[Choice]) -> list[list[Choice]]:
    table: dict[str, list[Choice]] = {}
    for row in rows:
        table.setdefault(row.layer, []).append(row)
    return list(table.values())


def every_plan(rows: list[Choice]) -> list[tuple[int, Fraction]]:
    plans = itertools.product(*by_layer(rows))
    return [
        (sum(row.bytes for row in rows), sum((Fraction(row.price) for row in rows), Fraction(0)))
        for rows in plans
    ]


def value(rows: list[Choice], choices: dict[str, str]) -> tuple[int, Fraction]:
    assert sorted(choices) == sorted({row.layer for row in rows})
    chosen = [row for row in rows if choices[row.layer] == row.option]
    assert len(chosen) == len(choices)
    return sum(row.bytes for row in chosen), sum(
        (Fraction(row.price) for row in chosen), Fraction(0)
    )


def ladder(layers: int = 12, *, scale: float = 1e-3) -> list[Choice]:
    """Layers like those of a network: 2 to 8 bits, price falling fourfold per bit, and one that
    changes nothing."""
    rng = random.Random(7)
    rows = []
    for layer in range(layers):
        parameters, sensitivity = rng.choice([1, 4, 11]) * 4096, scale * 10 ** rng.uniform(-1, 1)
        for bits in (2, 3, 4, 5, 6, 8):
            price = sensitivity * 4.0 ** (2 - bits)
            rows.append(
                Choice(
                    layer=f"layer{layer}",
                    option=f"{bits} bit",
                    bytes=parameters * bits // 8,
                    price=price,
                )
            )
        rows.append(Choice(layer=f"layer{layer}", option="keep", bytes=parameters * 2, price=0.0))
    return rows


@pytest.fixture(params=["enumeration", "highs"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small cores are enumerated; with no states allowed every core goes to HiGHS."""
    if request.param == "highs":
        monkeypatch.setattr(knapsack, "_MAX_STATES", 0)
    return str(request.param)


@pytest.mark.parametrize("seed", range(90))
def test_cheapest_equals_brute_force_in_both_directions(seed: int, solver: str) -> None:
    rows = random_rows(seed)
    plans = every_plan(rows)
    rng = random.Random(1000 + seed)
    smallest, largest = min(size for size, _ in plans), max(size for size, _ in plans)
    lowest, highest = min(cost for _, cost in plans), max(cost for _, cost in plans)
    if solver == "highs" and KINDS[seed % len(KINDS)] in (
        "tiny differences",
        "price follows bytes",
    ):
        pytest.skip(
            "beyond double precision: only the enumeration in integers can tell these plans apart"
        )
    exact = solver == "enumeration" or KINDS[seed % len(KINDS)] == "small integers"
    with warnings.catch_warnings():
        # HiGHS refuses coefficients above 1e15, which arise when nothing but rounding separates a
        # plan from the bound.
        warnings.simplefilter("error" if solver == "enumeration" else "ignore")
        for max_bytes in (smallest, rng.randint(smallest, largest), rng.choice(plans)[0]):
            spent, price = value(rows, cheapest(rows, max_bytes=max_bytes))
            best_price, least = min((price, size) for size, price in plans if size <= max_bytes)
            assert spent <= max_bytes
            if exact:
                assert (price, spent) == (best_price, least)
            assert float(price) == pytest.approx(float(best_price), rel=1e-14)
        for max_loss in (
            float(lowest),
            rng.uniform(float(lowest), float(highest)),
            float(rng.choice(plans)[1]),
        ):
            if max_loss < float(lowest):
                continue
            size, price = value(rows, cheapest(rows, max_loss=max_loss))
            best_size, lowest_there = min(
                (size, price) for size, price in plans if float(price) <= max_loss
            )
            assert size == best_size and float(price) <= max_loss
            if exact:
                assert price == lowest_there


def grouped_rows(seed: int) -> tuple[list[Choice], list[tuple[str, ...]]]:
    """Up to six layers in groups of one to three; the layers of a group are offered the same
    options."""
    rng = random.Random(seed)
    rows, groups, number = [], [], 0
    for _ in range(rng.randint(1, 3)):
        group = tuple(f"layer{number + k}" for k in range(rng.randint(1, 3)))
        number += len(group)
        groups.append(group)
        for option in range(rng.randint(1, 4)):
            for layer in group:
                price = rng.choice([rng.gauss(0, 1), rng.randint(0, 3) * 0.1])
                rows.append(
                    Choice(
                        layer=layer, option=f"option{option}", bytes=rng.randint(0, 60), price=price
                    )
                )
    rng.shuffle(rows)
    return rows, groups


def share(choices: dict[str, str], groups: list[tuple[str, ...]]) -> bool:
    return all(len({choices[layer] for layer in group}) == 1 for group in groups)


@pytest.mark.parametrize("seed", range(60))
def test_plans_of_groups_equal_brute_force_over_the_plans_that_share(
    seed: int, solver: str
) -> None:
    rows, groups = grouped_rows(seed)
    layers = sorted({row.layer for row in rows})
    table = [
        sorted((row for row in rows if row.layer == layer), key=lambda row: row.option)
        for layer in layers
    ]
    sharing = []
    for combination in itertools.product(*table):
        choices = {row.layer: row.option for row in combination}
        if share(choices, groups):
            sharing.append(value(rows, choices))
    rng = random.Random(seed)
    max_bytes, max_loss = rng.choice(sharing)[0], float(rng.choice(sharing)[1])

    plan = cheapest(rows, max_bytes=max_bytes, same_option=groups)
    assert list(plan) == list(dict.fromkeys(row.layer for row in rows)) and share(plan, groups)
    assert value(rows, plan)[0] <= max_bytes
    best = min((price, size) for size, price in sharing if size <= max_bytes)
    assert float(value(rows, plan)[1]) == pytest.approx(float(best[0]), abs=1e-14)
    if solver == "enumeration":
        assert value(rows, plan) == best[::-1]

    plan = cheapest(rows, max_loss=max_loss, same_option=groups)
    assert share(plan, groups) and float(value(rows, plan)[1]) <= max_loss
    assert value(rows, plan)[0] == min(size for size, price in sharing if float(price) <= max_loss)

    path = frontier(rows, points=1000, same_option=groups)
    assert all(share(point.choices, groups) for point in path)
    assert value(rows, path[0].choices) == min(sharing)
    assert value(rows, path[-1].choices)[1] == min(price for _, price in sharing)
    for point in path:  # each minimises price + λ bytes among the plans that share, for some λ
        assert (point.bytes, point.price) == (
            value(rows, point.choices)[0],
            float(value(rows, point.choices)[1]),
        )
    for (s0, p0), (s1, p1) in itertools.pairwise(value(rows, point.choices) for point in path):
        slope = (p0 - p1) / (s1 - s0)
        assert min(price + slope * size for size, price in sharing) == p0 + slope * s0


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("layer0", "nowhere")], "'nowhere' has no rows"),
        ([("layer0", "layer1"), ("layer1", "layer2")], "'layer1' is named 2 times"),
        (
            [("layer0", "odd")],
            "'layer0' and 'odd' are in one group, but only one of them is offered 2 bit, .*odd bit",
        ),
    ],
)
def test_groups_that_cannot_be_are_named(groups: list[tuple[str, ...]], message: str) -> None:
    rows = [*ladder(3), Choice(layer="odd", option="odd bit", bytes=1, price=0.0)]
    with pytest.raises(ValueError, match=message):
        cheapest(rows, max_bytes=10**6, same_option=groups)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(90, 1500))
def test_cheapest_equals_brute_force_on_many_instances(seed: int, solver: str) -> None:
    test_cheapest_equals_brute_force_in_both_directions(seed, solver)


def test_an_optimum_off_the_convex_hull_is_found(solver: str) -> None:
    # The hull of each layer is {small, large}; with 11 bytes the best plan uses "middle" twice,
    # which no hull contains.
    sizes = {"small": (1, 10.0), "middle": (5, 6.5), "large": (10, 0.0)}
    rows = [
        Choice(layer=layer, option=o, bytes=b, price=p)
        for layer in "ab"
        for o, (b, p) in sizes.items()
    ]
    assert cheapest(rows, max_bytes=10) == {"a": "middle", "b": "middle"}
    assert sorted(cheapest(rows, max_bytes=11).values()) == ["large", "small"]


def test_one_byte_decides_at_a_terabyte(solver: str) -> None:
    big = 10**12
    rows = [
        Choice(layer=layer, option=option, bytes=size, price=price)
        for layer in "abc"
        for option, size, price in (("low", 1, 1.0), ("mid", big - 1, 1e-9), ("high", big, 0.0))
    ]
    assert sorted(cheapest(rows, max_bytes=3 * big - 1).values()) == ["high", "high", "mid"]
    assert sorted(cheapest(rows, max_bytes=3 * big).values()) == ["high", "high", "high"]
    assert sorted(cheapest(rows, max_loss=1e-9).values()) == ["high", "high", "mid"]


def test_a_thousand_layers_of_twenty_options() -> None:
    rng = random.Random(0)
    rows = []
    for layer in range(1000):
        parameters, sensitivity = rng.choice([1, 4, 11]) * 4096 * 1024, 10 ** rng.uniform(-6, -2)
        for option in range(20):
            bits = 1.5 + 0.35 * option
            price = sensitivity * 4**-bits * rng.uniform(0.5, 2)
            rows.append(
                Choice(
                    layer=f"l{layer}",
                    option=f"o{option}",
                    bytes=int(parameters * bits / 8),
                    price=price,
                )
            )
    path = frontier(rows, points=2000 * 20)
    index = len(path) // 2
    below, above = path[index], path[index + 1]
    between = (below.bytes + above.bytes) // 2
    spent, cost = value(rows, cheapest(rows, max_bytes=between))
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
    for limits in ({"max_bytes": 120_000}, {"max_loss": 2e-3}):
        assert cheapest(worse + rows, **limits) == cheapest(rows, **limits)


def test_ties_do_not_depend_on_the_order_of_the_rows(solver: str) -> None:
    rows = [
        Choice(layer=f"l{layer}", option=option, bytes=size, price=price)
        for layer in range(6)
        for option, size, price in (("b", 1, 1.0), ("a", 1, 1.0), ("d", 2, 0.5), ("c", 2, 0.5))
    ]
    first = cheapest(rows, max_bytes=9)
    assert sorted(first.values()) == ["a", "a", "a", "c", "c", "c"]
    for seed in range(5):
        shuffled = random.Random(seed).sample(rows, len(rows))
        again = cheapest(shuffled, max_bytes=9)
        assert again == first
        assert list(again) == list(dict.fromkeys(row.layer for row in shuffled))


def test_among_equal_prices_the_smaller_model_wins_and_among_equal_bytes_the_better(
    solver: str,
) -> None:
    # Layer a can fall from 1 to 0 for 3 bytes, layer b for 2: with 4 bytes to spend only one of
    # them can.
    rows = [
        Choice(layer="a", option="x", bytes=1, price=1.0),
        Choice(layer="a", option="y", bytes=4, price=0.0),
        Choice(layer="b", option="x", bytes=1, price=1.0),
        Choice(layer="b", option="y", bytes=3, price=0.0),
    ]
    assert cheapest(rows, max_bytes=6) == {"a": "x", "b": "y"}
    rows = [
        Choice(layer=r.layer, option=r.option, bytes=int(r.price) + 1, price=float(r.bytes))
        for r in rows
    ]
    assert cheapest(rows, max_loss=6.0) == {"a": "x", "b": "y"}


def tied_rows(rng: random.Random, most_bytes: int, most_price: int) -> list[Choice]:
    return [
        Choice(
            layer=f"l{layer}",
            option=f"o{option}",
            bytes=rng.randint(0, most_bytes),
            price=float(rng.randint(0, most_price)),
        )
        for layer in range(rng.randint(2, 7))
        for option in range(4)
    ]


def totals(rows: list[Choice]) -> set[tuple[int, float]]:
    """Size and price of every plan; small whole numbers, so that floats are exact and most plans
    coincide."""
    sums = {(0, 0.0)}
    for layer in by_layer(rows):
        sums = {(size + row.bytes, price + row.price) for size, price in sums for row in layer}
    return sums


@pytest.mark.parametrize("seed", [192, 515, 525])
def test_ties_in_price_are_broken_by_size_among_many_plans(seed: int, solver: str) -> None:
    rng = random.Random(seed)
    rows = tied_rows(rng, 20, 6)
    max_bytes = rng.choice(sorted(totals(rows)))[0]
    size, price = value(rows, cheapest(rows, max_bytes=max_bytes))
    assert (price, size) == min((price, size) for size, price in totals(rows) if size <= max_bytes)


@pytest.mark.parametrize("seed", [544, 657, 1314, 1408])
def test_ties_in_size_are_broken_by_price_among_many_plans(seed: int, solver: str) -> None:
    rng = random.Random(seed)
    rows = tied_rows(rng, 6, 20)
    max_loss = rng.choice(sorted({price for _, price in totals(rows)}))
    size, price = value(rows, cheapest(rows, max_loss=max_loss))
    assert (size, price) == min((size, price) for size, price in totals(rows) if price <= max_loss)


def test_fixed_bytes_count_towards_the_limit() -> None:
    rows = ladder()
    assert cheapest(rows, max_bytes=200_000, fixed_bytes=80_000) == cheapest(
        rows, max_bytes=120_000
    )


def test_a_price_read_off_the_frontier_can_be_met_again() -> None:
    rows = [
        Choice(layer=f"l{i}", option=o, bytes=b, price=p)
        for i in range(3)
        for o, b, p in (("x", 1, 0.1), ("y", 2, 0.0))
    ]
    for point in frontier(rows):
        assert value(rows, cheapest(rows, max_loss=point.price))[0] == point.bytes
    # Rounded, three times 0.1 is 0.30000000000000004: a limit of 0.3 excludes it.
    assert math.fsum([0.1] * 3) > 0.3 - 1e-17
    assert value(rows, cheapest(rows, max_loss=math.fsum([0.1] * 3)))[0] == 3
    assert value(rows, cheapest(rows, max_loss=math.nextafter(math.fsum([0.1] * 3), 0)))[0] == 4


def test_infeasible_says_which_limit_and_by_how_much() -> None:
    rows = [
        Choice(layer=layer, option=o, bytes=b, price=p)
        for layer in "ab"
        for o, b, p in (("x", 900, 0.5), ("y", 950, 0.25))
    ]
    with pytest.raises(
        Infeasible, match="max_bytes: at least 1,840 is needed, 1,000 allowed; raise"
    ) as bytes_error:
        cheapest(rows, max_bytes=1000, fixed_bytes=40)
    error = bytes_error.value
    assert (error.constraint, error.limit, error.best, error.missing) == (
        "max_bytes",
        1000,
        1840,
        840,
    )
    with pytest.raises(
        Infeasible, match=r"max_loss: at least 0.5 is needed, 0.2 allowed; raise"
    ) as loss_error:
        cheapest(rows, max_loss=0.2)
    assert (loss_error.value.constraint, loss_error.value.best) == ("max_loss", 0.5)
    with pytest.raises(
        Infeasible, match=r"max_loss: at least 0.5 .*; max_bytes: at least 1,840 .*; raise"
    ) as both:
        cheapest(rows, max_bytes=1000, max_loss=0.2, fixed_bytes=40)
    assert both.value.shortfalls == (("max_loss", 0.2, 0.5), ("max_bytes", 1000, 1840))
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Choice(layer="mlp.up", option="4 bit", bytes=3, price=math.nan)], "'mlp.up'.*nan"),
        ([Choice(layer="mlp.up", option="4 bit", bytes=3, price=math.inf)], "'mlp.up'.*inf"),
        ([Choice(layer="mlp.up", option="4 bit", bytes=-3, price=0.0)], "'mlp.up'.*-3"),
        ([SimpleNamespace(layer="mlp.up", option="4 bit", bytes=1.5, price=0.0)], "'mlp.up'.*1.5"),
        ([Choice(layer="mlp.up", option="4 bit", bytes=3, price=0.0)] * 2, "'mlp.up'.*twice"),
        ([], "no rows"),
    ],
)
def test_malformed_rows_are_named(rows: list[Any], message: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: cheapest(rows, max_bytes=10),
        lambda: frontier(rows),
    ]
    for action in actions:
        with pytest.raises(ValueError, match=message):
            action()


def test_at_least_one_limit() -> None:
    for limits in ({}, {"max_loss": math.nan}):
        with pytest.raises(ValueError, match=r"at least one limit|nan"):
            cheapest(ladder(), **limits)  # type: ignore[arg-type]


def test_a_limit_on_bytes_and_one_on_the_loss() -> None:
    rows = ladder()
    smallest = cheapest(rows, max_loss=2e-3)
    size, _ = value(rows, smallest)
    assert cheapest(rows, max_loss=2e-3, max_bytes=size + 5, fixed_bytes=5) == smallest
    with pytest.raises(
        Infeasible, match=r"not all together: raise max_loss from 0.002 to .* or max_bytes"
    ) as error:
        cheapest(rows, max_loss=2e-3, max_bytes=size - 1)
    loss, stored = error.value.shortfalls
    assert stored == ("max_bytes", size - 1, size)
    assert loss.best == float(value(rows, cheapest(rows, max_bytes=size - 1))[1]) > 2e-3


@pytest.mark.parametrize("seed", range(60))
def test_prices_that_fall_with_the_bits_and_a_time_equal_brute_force(seed: int) -> None:
    """Prices from 1e-2 to 1e-14 and times with 53 random bits: as fine as whole numbers get."""
    rng = random.Random(seed)
    for _ in range(10):
        rows, use = [], {}
        for layer in (f"l{i}" for i in range(rng.randint(3, 4))):
            weights, sensitivity = (
                rng.choice([4096, 16384, 65536, 147456, 589824]),
                10 ** rng.uniform(-5, -1),
            )
            for b in (2, 3, 4, 8, 16):
                price = sensitivity * 4.0**-b * rng.uniform(0.7, 1.4)
                rows.append(
                    Choice(
                        layer=layer,
                        option=str(b),
                        bytes=weights * b // 8 + weights // 64,
                        price=price,
                    )
                )
                use[layer, str(b)] = weights * 1e-6 * (b / 16 + 0.3) * rng.uniform(0.95, 1.05)
        plans = list(itertools.product(*by_layer(rows)))
        pick, other = rng.choice(plans), rng.choice(plans)
        time = Limit(name="ms", most=0.0, use=use)
        time = Limit(name="ms", most=used(time, other) * rng.uniform(1.0, 1.1), use=use)
        size, loss = (
            sum(row.bytes for row in pick),
            math.fsum(row.price for row in pick) * rng.uniform(1.0, 1.2),
        )
        met = [p for p in plans if used(time, p) <= time.most]
        for arguments in ({"max_bytes": size}, {"max_loss": loss}):
            fits = [
                p
                for p in met
                if sum(row.bytes for row in p) <= arguments.get("max_bytes", math.inf)
                and math.fsum(row.price for row in p) <= arguments.get("max_loss", math.inf)
            ]
            if not fits:
                with pytest.raises(Infeasible):
                    cheapest(rows, limits=[time], **arguments)  # type: ignore[arg-type]
                continue
            choices = cheapest(rows, limits=[time], **arguments)  # type: ignore[arg-type]
            chosen = tuple(row for row in rows if choices[row.layer] == row.option)
            assert chosen in fits
            of = (
                (lambda p: sum(r.bytes for r in p))
                if "max_loss" in arguments
                else (lambda p: sum(map(price_of, p)))
            )
            assert of(chosen) == min(map(of, fits))


def price_of(row: Choice) -> Fraction:
    return Fraction(row.price)


def limits_for(rows: list[Choice], rng: random.Random, count: int) -> list[Limit]:
    """Uses that disagree with bytes and with one another, some whole, some not."""
    limits = []
    for number in range(count):
        draw: Callable[[], float] = rng.random if number else lambda: float(rng.randint(0, 9))
        use = {(row.layer, row.option): draw() for row in rows}
        spread = [
            sum(use[row.layer, row.option] for row in combination)
            for combination in sample(rows, rng)
        ]
        limits.append(Limit(name=f"limit{number}", most=rng.choice(spread), use=use))
    return limits


def sample(rows: list[Choice], rng: random.Random) -> list[list[Choice]]:
    return [[rng.choice(layer) for layer in by_layer(rows)] for _ in range(20)]


def used(limit: Limit, combination: tuple[Choice, ...]) -> float:
    return math.fsum(limit.use[row.layer, row.option] for row in combination)


@pytest.mark.parametrize("first_core", [2, 300])
@pytest.mark.parametrize("seed", range(40))
def test_several_limits_equal_brute_force(
    seed: int, first_core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knapsack, "_FIRST_CORE", first_core)
    rng = random.Random(seed)
    rows = [
        Choice(
            layer=f"l{layer}",
            option=f"o{option}",
            bytes=rng.randint(0, 99),
            price=rng.choice([rng.random(), 0.5]),
        )
        for layer in range(rng.randint(1, 5))
        for option in range(rng.randint(1, 5))
    ]
    limits = limits_for(rows, rng, rng.randint(1, 3))
    plans = list(itertools.product(*by_layer(rows)))
    pick = rng.choice(plans)
    max_bytes, max_loss = sum(row.bytes for row in pick), math.fsum(row.price for row in pick)
    met = [p for p in plans if all(used(limit, p) <= limit.most for limit in limits)]
    for sizes, losses in ((None, None), (max_bytes, None), (None, max_loss), (max_bytes, max_loss)):
        feasible = [
            (sum(row.bytes for row in p), sum((Fraction(row.price) for row in p), Fraction(0)))
            for p in met
            if (sizes is None or sum(row.bytes for row in p) <= sizes)
            and (losses is None or math.fsum(row.price for row in p) <= losses)
        ]
        arguments = {
            "max_bytes": None if sizes is None else sizes + 7,
            "max_loss": losses,
            "fixed_bytes": 7,
        }
        if not feasible:
            with pytest.raises(Infeasible) as error:
                cheapest(rows, limits=limits, **arguments)  # type: ignore[arg-type]
            assert error.value.missing > 0 or math.isnan(error.value.missing)
            continue
        choices = cheapest(rows, limits=limits, **arguments)  # type: ignore[arg-type]
        chosen = tuple(row for row in rows if choices[row.layer] == row.option)
        assert all(used(limit, chosen) <= limit.most for limit in limits)
        size, price = value(rows, choices)
        assert (size, price) in feasible
        if losses is None:
            assert price == min(price for _, price in feasible)
        else:
            assert size == min(size for size, _ in feasible)


def test_several_limits_and_groups() -> None:
    rng = random.Random(3)
    for seed in range(20):
        rows, groups = grouped_rows(seed)
        use = {(row.layer, row.option): float(rng.randint(0, 9)) for row in rows}
        plans = [
            p
            for p in itertools.product(*by_layer(rows))
            if share({r.layer: r.option for r in p}, groups)
        ]
        limit = Limit(
            name="operations", most=sum(use[r.layer, r.option] for r in rng.choice(plans)), use=use
        )
        met = [p for p in plans if used(limit, p) <= limit.most]
        max_bytes = sum(row.bytes for row in rng.choice(met))
        choices = cheapest(rows, max_bytes=max_bytes, limits=[limit], same_option=groups)
        assert share(choices, groups)
        best = min(
            sum(Fraction(r.price) for r in p) for p in met if sum(r.bytes for r in p) <= max_bytes
        )
        assert float(value(rows, choices)[1]) == pytest.approx(float(best), abs=1e-14)


def test_infeasible_names_every_limit_that_could_be_raised() -> None:
    rows = [
        Choice(layer="a", option="small", bytes=10, price=1.0),
        Choice(layer="a", option="large", bytes=20, price=0.0),
        Choice(layer="b", option="only", bytes=5, price=0.25),
    ]
    slow = {("a", "small"): 7.5, ("a", "large"): 3.0, ("b", "only"): 1.0}
    with pytest.raises(
        Infeasible, match=r"time: at least 4 is needed, 2 allowed; max_bytes: at least 15 .* 14"
    ) as error:
        cheapest(rows, max_bytes=14, limits=[Limit(name="time", most=2.0, use=slow)])
    assert error.value.shortfalls == (("time", 2.0, 4.0), ("max_bytes", 14, 15))
    assert (error.value.constraint, error.value.best, error.value.missing) == ("time", 4.0, 2.0)
    message = (
        r"each of time, max_bytes can be met, but not all together: raise time from 5 to 8.5 \(by 3.5\) or "
        r"max_bytes from 120 to 125 \(by 5\), or add other options"
    )
    with pytest.raises(Infeasible, match=message):
        cheapest(
            rows, max_bytes=120, fixed_bytes=100, limits=[Limit(name="time", most=5.0, use=slow)]
        )
    with pytest.raises(Infeasible, match=r"max_loss from 1 to 1.25"):
        small_only = {**slow, ("a", "large"): 9.0}
        cheapest(rows, max_loss=1.0, limits=[Limit(name="time", most=8.5, use=small_only)])
    with pytest.raises(
        Infeasible, match=r"raise max_loss from 0.5 to 1.25 \(by 0.75\) or max_bytes from 24 to 25"
    ):
        cheapest(rows, max_loss=0.5, max_bytes=24, limits=[Limit(name="time", most=9.0, use=slow)])
    # Three options of which each meets one of three limits: no single limit is the one to raise.
    rows = [
        Choice(layer="a", option=o, bytes=b, price=0.0) for o, b in (("x", 9), ("y", 9), ("z", 1))
    ]
    limits = [
        Limit(
            name=f"no {o}", most=1.0, use={("a", r.option): float(r.option != o) * 9 for r in rows}
        )
        for o in "xy"
    ]
    with pytest.raises(
        Infeasible, match="no plan meets no x, no y, max_bytes together, nor all of them but one"
    ):
        cheapest(rows, max_bytes=1, limits=limits)


@pytest.mark.parametrize("seed", range(30))
def test_what_infeasible_says_equals_brute_force(seed: int) -> None:
    """Several limits that no plan meets: which are out of reach alone, and else how far each alone
    must be raised."""
    rng = random.Random(seed)
    rows = [
        Choice(
            layer=f"l{layer}",
            option=f"o{option}",
            bytes=rng.randint(1, 9),
            price=float(rng.randint(0, 9)),
        )
        for layer in range(rng.randint(1, 4))
        for option in range(rng.randint(2, 4))
    ]
    use = {(row.layer, row.option): float(rng.randint(0, 9)) for row in rows}
    per = rng.choice([1.0, 3.0])
    plans = [
        {
            "time": sum(use[r.layer, r.option] for r in p) / per,
            "max_loss": sum(r.price for r in p),
            "max_bytes": 7.0 + sum(r.bytes for r in p),
        }
        for p in itertools.product(*by_layer(rows))
    ]
    least = {name: min(p[name] for p in plans) for name in plans[0]}
    limit = {name: least[name] + rng.choice([-1, 0, 1, 2]) for name in least}
    if any(all(p[name] <= limit[name] for name in p) for p in plans):
        pytest.skip("these can be met")
    with pytest.raises(Infeasible) as error:
        cheapest(
            rows,
            max_bytes=int(limit["max_bytes"]),
            max_loss=limit["max_loss"],
            fixed_bytes=7,
            limits=[Limit(name="time", most=limit["time"], use=use, per=per)],
        )
    told = {s.name: s.best for s in error.value.shortfalls}
    assert all(s.limit == limit[s.name] for s in error.value.shortfalls)
    alone = {name: least[name] for name in least if least[name] > limit[name]}
    single = {
        name: min(p[name] for p in plans if all(p[n] <= limit[n] for n in p if n != name))
        for name in least
        if any(all(p[n] <= limit[n] for n in p if n != name) for p in plans)
    }
    if alone or single:
        assert told == pytest.approx(alone or single)
    else:
        assert set(told) == set(limit) and all(math.isnan(best) for best in told.values())


def test_a_limit_counts_what_a_plan_uses() -> None:
    limit = Limit(
        name="bits",
        most=4.25,
        use={("a", "x"): 30.0, ("b", "x"): 4.0, ("b", "y"): 4.0 + 2**-40},
        per=8,
    )
    assert limit.used({"a": "x", "b": "x"}) == 4.25
    assert limit.used({"a": "x", "b": "y"}) == 4.25 + 2**-43 > limit.most
    for seed in range(20):
        odd = random.Random(seed).uniform(0.001, 1000)
        rows = [Choice(layer="a", option="x", bytes=1, price=0.0)]
        with pytest.raises(Infeasible) as error:
            cheapest(rows, limits=[Limit(name="time", most=0.0, use={("a", "x"): odd})])
        told = float(str(error.value).split("at least ")[1].split()[0].replace(",", ""))
        assert odd <= told <= odd * 1.00001, "a limit that is raised to what is printed can be met"
    thirds = Limit(name="time", most=1 / 3, use={("a", "x"): 1.0}, per=3)
    assert cheapest([Choice(layer="a", option="x", bytes=1, price=0.0)], limits=[thirds]) == {
        "a": "x"
    }
    assert Fraction(1 / 3) < Fraction(1, 3), "met as a rounded number only"
    assert Limit.from_dict(json.loads(json.dumps(limit.to_dict()))) == limit
    rows = [
        Choice(layer=layer, option=o, bytes=1, price=-float(o == "y")) for layer, o in limit.use
    ]
    assert cheapest(rows, limits=[limit]) == {"a": "x", "b": "x"}


def test_a_plan_under_several_limits_that_is_not_proven_says_how_much_better_one_could_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(0)
    rows = ladder(8)
    plans = [[rng.choice(layer) for layer in by_layer(rows)] for _ in range(2000)]
    use = {(row.layer, row.option): rng.random() for row in rows}
    honest = knapsack.milp

    def stopped(*arguments: object, **named: object) -> object:
        answer = honest(*arguments, **named)
        answer.status, answer.message = 1, "node limit"
        return answer

    monkeypatch.setattr(knapsack, "milp", stopped)
    limit = Limit(name="time", most=4.0, use=use)
    with pytest.warns(
        RuntimeWarning, match=r"not proven.*node limit.*gain at most [0-9.e-]+ of its"
    ) as caught:
        choices = cheapest(rows, max_bytes=150_000, limits=[limit])
    share_of = float(str(caught[0].message).split("at most ")[1].split()[0])
    price = value(rows, choices)[1]
    met = [
        p
        for p in plans
        if used(limit, tuple(p)) <= limit.most and sum(row.bytes for row in p) <= 150_000
    ]
    assert met and all(
        float(sum(Fraction(r.price) for r in p)) >= float(price) * (1 - 1.01 * share_of)
        for p in met
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda use: Limit(name="time", most=math.nan, use=use), "most=nan"),
        (lambda use: Limit(name="time", most=1.0, use=use, per=0.0), "per=0"),
        (
            lambda use: Limit(name="time", most=1.0, use={**use, ("layer0", "keep"): math.inf}),
            "layer0.*inf",
        ),
        (
            lambda use: Limit(name="time", most=1e9, use=dict(list(use.items())[:-1])),
            "'layer2', option 'keep'",
        ),
    ],
)
def test_malformed_limits_are_named(
    make: Callable[[dict[tuple[str, str], float]], Limit], message: str
) -> None:
    rows = ladder(3)
    with pytest.raises(ValueError, match=message):
        cheapest(
            rows, max_bytes=10**9, limits=[make({(row.layer, row.option): 1.0 for row in rows})]
        )


def test_a_failing_solver_is_reported_and_the_plan_stays_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = random_rows(3, layers=5)
    plans = every_plan(rows)
    monkeypatch.setattr(knapsack, "_MAX_STATES", 0)

    def give_up(*args: object, **kwargs: object) -> object:
        return type("Answer", (), {"x": None, "status": 1, "message": "node limit"})()

    monkeypatch.setattr(knapsack, "milp", give_up)
    limits = sorted({size for size, _ in plans})
    with pytest.warns(RuntimeWarning, match="not proven.*node limit"):
        for max_bytes in limits:
            assert value(rows, cheapest(rows, max_bytes=max_bytes))[0] <= max_bytes


def test_a_proposal_over_the_limit_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # A solver that ignores the limit and proposes the heaviest plans: its proposals must be checked
    # and refused.
    honest = knapsack.milp
    refused = 0

    def careless(costs, *, integrality, bounds, constraints, options):  # type: ignore[no-untyped-def]
        nonlocal refused
        refused += len(constraints) > 2
        blind = [knapsack.LinearConstraint(constraints[0].A, -math.inf, math.inf), *constraints[1:]]
        return honest(
            -constraints[0].A[0],
            integrality=integrality,
            bounds=bounds,
            constraints=blind,
            options=options,
        )

    monkeypatch.setattr(knapsack, "_MAX_STATES", 0)
    monkeypatch.setattr(knapsack, "milp", careless)
    rows = ladder(12)
    for max_bytes in (120_000, 150_000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert value(rows, cheapest(rows, max_bytes=max_bytes))[0] <= max_bytes
    assert refused


@pytest.mark.parametrize("seed", range(60))
def test_frontier_is_the_lower_convex_hull_of_all_plans(seed: int) -> None:
    rows = random_rows(seed)
    plans = every_plan(rows)
    best: dict[int, Fraction] = {}
    for size, price in plans:
        best[size] = min(price, best.get(size, price))
    lowest = min(best.values())
    stop = min(size for size, price in best.items() if price == lowest)
    points = sorted((size, price) for size, price in best.items() if size <= stop)

    path = frontier(rows, points=10_000)
    exact = [value(rows, point.choices) for point in path]
    assert exact[0] == points[0] and exact[-1] == points[-1]
    for (size, price), point in zip(exact, path, strict=True):
        assert (size, float(price)) == (point.bytes, point.price)
        # On the hull: no chord between two plans passes below it.
        for (s0, p0), (s1, p1) in itertools.combinations(points, 2):
            if s0 < size < s1:
                assert (price - p0) * (s1 - s0) <= (p1 - p0) * (size - s0)
    slopes = [(p0 - p1) / (s1 - s0) for (s0, p0), (s1, p1) in itertools.pairwise(exact)]
    assert all(slope > 0 for slope in slopes) and slopes == sorted(slopes, reverse=True)


def test_frontier_is_nested_and_thinning_keeps_both_ends() -> None:
    rows = ladder(20)
    sizes = {(row.layer, row.option): row.bytes for row in rows}
    path = frontier(rows, points=1000)
    for before, after in itertools.pairwise(path):
        changed = [
            layer for layer in before.choices if before.choices[layer] != after.choices[layer]
        ]
        assert len(changed) == 1
        assert (
            sizes[changed[0], before.choices[changed[0]]]
            < sizes[changed[0], after.choices[changed[0]]]
        )
    for count in (2, 3, 33):
        thin = frontier(rows, points=count)
        assert len(thin) == count and thin[0] == path[0] and thin[-1] == path[-1]
        assert all(point in path for point in thin)
    with pytest.raises(ValueError, match="points=1"):
        frontier(rows, points=1)


def test_frontier_of_one_option_is_one_point() -> None:
    assert frontier([Choice(layer="a", option="x", bytes=3, price=-1.0)]) == [(3, -1.0, {"a": "x"})]
