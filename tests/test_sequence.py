"""Which plans go to the certificate: expected bytes against simulation, chances against closed
forms."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from scipy import stats

from curvprune.planning import Budget, Infeasible, Within, cheapest
from curvprune.pricing import Ledger, Row
from curvprune.record import Trial
from curvprune.run import (
    Prices,
    Prospect,
    Task,
    Tried,
    chance_at,
    chance_of,
    expected_saving,
    next_plan,
    to_test,
)


def shipped(plans: list[Prospect], luck: float) -> int | None:
    """What ships if plans with a chance above ``luck`` pass: tested in turn, up to the first that
    does not."""
    last = None
    for i in to_test(plans):
        size, chance = plans[i]
        if chance <= luck:
            break
        last = size
    return last


@pytest.mark.parametrize("seed", range(8))
def test_the_expected_saving_is_the_mean_of_what_ships(seed):
    rng = np.random.default_rng(seed)
    plans = [
        Prospect(int(size), float(chance))
        for size, chance in zip(rng.integers(10, 99, 5), rng.uniform(size=5), strict=True)
    ]
    lucks = (np.arange(20_000) + 0.5) / 20_000
    saved = [120 - size if (size := shipped(plans, luck)) is not None else 0 for luck in lucks]
    assert expected_saving(plans, 120) == pytest.approx(np.mean(saved), rel=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_of_plans_to_test_saves_more(seed):
    """Brute force over every subset, tested from the largest to the smallest."""
    rng = np.random.default_rng(100 + seed)
    plans = [
        Prospect(int(size), float(chance))
        for size, chance in zip(rng.integers(10, 99, 5), rng.uniform(size=5), strict=True)
    ]

    def saving(subset: list[Prospect]) -> float:
        mean, before, passing = 0.0, 120, 1.0
        for size, chance in sorted(subset, reverse=True):
            passing = min(passing, chance)
            mean, before = mean + passing * (before - size), size
        return mean

    subsets = [[p for k, p in enumerate(plans) if bits >> k & 1] for bits in range(32)]
    assert expected_saving(plans, 120) == pytest.approx(max(map(saving, subsets)))


def tested(*plans: tuple[int, float]) -> list[int]:
    return to_test([Prospect(*plan) for plan in plans])


def test_a_plan_beside_a_smaller_and_likelier_one_is_not_tested():
    assert tested((90, 0.99), (80, 0.7), (70, 0.8), (60, 0.1)) == [0, 2, 3]
    assert tested((80, 0.9), (90, 0.9)) == [1, 0], (
        "as likely: what select cannot tell apart is tested all the same"
    )
    assert tested((70, 0.2), (80, 0.9995), (90, 1.0)) == [1, 0], (
        "nothing before what is as good as sure"
    )
    assert tested((80, 0.9), (80, 0.5)) == [0], "of one size the likelier one"
    assert tested((80, 0.0)) == [0]


# Four layers with four options each: 2 bytes less for twice the price.
SIZES, PRICES = (8, 6, 4, 2), (0.001, 0.002, 0.004, 0.008)
ROWS = [
    Row(
        layer=f"layer {i}",
        option=f"{k}",
        bytes=1000 * size,
        price=price * (1 + i / 10),
        stderr=0.0,
    )
    for i in range(4)
    for k, (size, price) in enumerate(zip(SIZES, PRICES, strict=True))
]
TABLE = {(row.layer, row.option): row for row in ROWS}
LEDGER = Ledger(
    rows=tuple(ROWS), sums=np.zeros((2, len(ROWS))), count=np.ones(2), measure="nats", labels=1
)
AT_FIRST = Prices(ledger=LEDGER)


def bytes_of(choices: dict[str, str]) -> int:
    return sum(TABLE[pair].bytes for pair in choices.items())


def price_of(choices: dict[str, str]) -> float:
    return sum(TABLE[pair].price for pair in choices.items())


def task_of(
    max_drop: float = 0.1,
    within: Within | None = None,
    documents: tuple[int, int] = (30, 30),
) -> Any:
    select, certify = (SimpleNamespace(documents=tuple(map(str, range(n)))) for n in documents)
    return Mock(
        spec=Task,
        within=within or Within(),
        budget=Budget("loss", max_drop=max_drop),
        max_drop=max_drop,
        splits=SimpleNamespace(select=select, certify=certify),
        bytes_of=bytes_of,
    )


def applied(task: Any, picks: str, drop: float, stderr: float, reach: float | None = None) -> Trial:
    choices = {f"layer {i}": pick for i, pick in enumerate(picks)}
    bound = drop + (2 * stderr if reach is None else reach)
    return Trial(
        name=picks,
        kind="applied",
        choices=choices,
        bytes=bytes_of(choices),
        predicted=price_of(choices),
        predicted_stderr=0.0,
        expected=price_of(choices),
        loss=drop,
        loss_stderr=stderr,
        drop=drop,
        drop_stderr=stderr,
        bound=bound,
        chance=chance_at(task, drop, stderr, bound),
        accepted=True,
        uses={},
        items=30,
    )


def test_the_chance_of_a_plan_comes_from_the_nearest_applied_one():
    task = task_of(max_drop=0.02)
    small, large = applied(task, "0000", 0.01, 0.002), applied(task, "2222", 0.02, 0.004)
    tried = [Tried(small, None), Tried(large, None)]
    for near, expected in ((small, 1.5 * small.expected), (large, 0.8 * large.expected)):
        f = expected / near.expected
        drop, stderr = f * near.drop, f * near.drop_stderr
        chance = chance_of(task, expected, tried)
        assert chance == pytest.approx(chance_at(task, drop, stderr, drop + 2 * stderr))
        assert 0.2 < chance < 0.8
    lucky = Tried(applied(task, "0000", -0.002, 0.01), None)
    assert chance_of(task, 8 * small.expected, [lucky]) == pytest.approx(
        chance_at(task, -0.002, 0.08, 0.158)
    ), "what measured better than nothing does not get better by being bolder"


def test_a_bound_comes_nearer_with_the_root_of_the_documents_and_what_skewness_adds_in_proportion():
    task, drop, stderr, skewed = task_of(max_drop=0.1, documents=(9, 36)), 0.07, 0.01, 0.03
    t9, t36 = stats.t.ppf(0.95, 8), stats.t.ppf(0.95, 35)
    reach = t36 * stderr / 2 + skewed / 4
    margin, spread = 0.1 - drop - reach, np.hypot(stderr, stderr / 2)
    assert chance_at(task, drop, stderr, drop + t9 * stderr + skewed) == pytest.approx(
        stats.norm.cdf(margin / spread)
    )
    reach = 0.8 * t36 * stderr / 2  # a bound that is nearer than normal losses would have it
    chance = stats.norm.cdf((0.1 - drop - reach) / spread)
    assert chance_at(task, drop, stderr, drop + 0.8 * t9 * stderr) == pytest.approx(chance)


def test_what_a_recovery_gave_back_grows_with_a_power_of_the_loss():
    task = task_of()
    before, after = applied(task, "1111", 0.06, 0.004), applied(task, "1111", 0.02, 0.003)
    tried = [Tried(after, before)]
    assert chance_of(task, after.expected, tried) == pytest.approx(after.chance)
    drop = 2 * 0.06 - 2**0.75 * 0.04
    assert drop > 2 * 0.02, "more slowly than the loss"
    assert chance_of(task, 2 * after.expected, tried) == pytest.approx(
        chance_at(task, drop, 0.006, drop + 0.012)
    )


def test_a_plan_without_a_bound_promises_nothing():
    task = task_of()
    endless = replace(applied(task, "0000", 0.01, 0.002), bound=float("inf"), chance=0.0)
    assert chance_of(task, endless.expected, [Tried(endless, None)]) == 0.0
    assert next_plan(task, AT_FIRST, [Tried(endless, None)]) is None


def test_the_next_plan_saves_most_of_all_plans():
    task = task_of(max_drop=0.05)
    tried = [
        Tried(applied(task, "0000", 0.012, 0.002), None),
        Tried(applied(task, "3333", 0.2, 0.02), None),
    ]
    best = next_plan(task, AT_FIRST, tried)
    assert best is not None
    plans = [Prospect(one.trial.bytes, one.trial.chance) for one in tried]

    def saving(choices):
        chance = chance_of(task, price_of(choices), tried)
        return expected_saving([*plans, Prospect(bytes_of(choices), chance)], 32_000)

    every = [{f"layer {i}": str(n // 4**i % 4) for i in range(4)} for n in range(4**4)]
    assert saving(best) == pytest.approx(max(map(saving, every)), rel=0.02)
    assert 8_000 < bytes_of(best) < 32_000


def test_there_is_no_next_plan_where_none_is_smaller_or_fits():
    task = task_of(max_drop=10.0)
    smallest = Tried(applied(task, "3333", 0.01, 0.001), None)
    assert next_plan(task, AT_FIRST, [smallest]) is None, "the smallest passes"
    free = Tried(replace(applied(task, "0000", 0.0, 0.001), expected=0.0), None)
    assert next_plan(task, AT_FIRST, [free]) is None, "how much bolder another is cannot be told"
    tight = task_of(max_drop=10.0, within=Within(max_bytes=7_999))
    with pytest.raises(Infeasible):
        cheapest(ROWS, tight.within, max_loss=1.0)
    assert next_plan(tight, AT_FIRST, [Tried(applied(tight, "0000", 0.0, 0.001), None)]) is None
