"""The closed loop against simulated models, and what a budget may say."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from scipy.optimize import minimize

from curvprune.planning import (
    Budget,
    Choice,
    Infeasible,
    Limit,
    MeasuredPlan,
    Measurement,
    Plan,
    Within,
    cheapest,
    corrections,
    frontier,
    search_plans,
)
from curvprune.schema import decode
from tests.plans import combinations, ladder, price_of, share, size_of, used, value


class Truth:
    """A simulated model: the measured loss is a fixed function of the predicted one; remembers
    every evaluation."""

    def __init__(
        self, rows: list[Choice], measure: Callable[[float], float], budget: float
    ) -> None:
        self.rows, self.measure, self.budget = rows, measure, budget
        self.seen: list[dict[str, str]] = []

    def __call__(self, choices: dict[str, str]) -> Measurement:
        assert choices not in self.seen, "a plan was evaluated twice"
        self.seen.append(choices)
        measured = self.measure(float(value(self.rows, choices)[1]))
        return Measurement(measured <= self.budget, measured, measured)


@cache
def best_at_every_limit() -> list[tuple[int, Fraction]]:
    """Bytes and price of the smallest plans of `ladder(30)`, along the whole frontier."""
    rows = ladder(30)
    limits = [plan.price for plan in frontier(rows, points=10_000)]
    return [value(rows, cheapest(rows, max_loss=limit)) for limit in limits]


def test_plans_that_are_known_correct_the_first_one() -> None:
    """Losses are a fourth of the prices: who has been told so once starts where the budget is."""
    rows = ladder(30)
    told = cheapest(rows, max_loss=0.004)
    truth = lambda p: 0.25 * p  # noqa: E731
    known = [MeasuredPlan(told, truth(float(value(rows, told)[1])), 0.0)]
    (first,) = search_plans(
        rows, Truth(rows, truth, budget=0.02), start=0.02, known=known, max_trials=1
    ).steps
    assert first.choices == cheapest(rows, max_loss=0.08)
    assert first.expected == pytest.approx(first.drop)


def test_search_measures_only_plans_that_share() -> None:
    rows = ladder(12)
    groups = (("layer0", "layer5", "layer7"), ("layer2", "layer1"))
    truth = Truth(rows, lambda p: 1.4 * p, budget=0.02)
    result = search_plans(rows, truth, start=0.02, within=Within(same_option=groups))
    assert result.best is not None and len(result.steps) > 1
    for step in result.steps:
        assert share(step.choices, groups)
        assert value(rows, step.choices) == (step.bytes, pytest.approx(Fraction(step.predicted)))
    free = search_plans(rows, Truth(rows, lambda p: 1.4 * p, budget=0.02), start=0.02)
    assert free.best is not None and not share(free.best, groups)


@pytest.mark.parametrize(
    "measure",
    [
        lambda p: 1.4 * p,
        lambda p: 1.4 * p + 20 * p**2,
        lambda p: 0.3 * p,
        lambda p: 8 * p,
        lambda p: 0.4 * p**0.5,
    ],
    ids=["1.4x", "curved", "0.3x", "8x", "root"],
)
def test_search_closes_in_on_the_smallest_plan_within_the_budget(
    measure: Callable[[float], float],
) -> None:
    rows = ladder(30)
    truth = Truth(rows, measure, budget=0.02)
    result = search_plans(rows, truth, start=0.02, max_trials=10, tolerance=0.03)
    assert result.best is not None
    size, price = value(rows, result.best)
    assert measure(float(price)) <= 0.02
    optimum = min(size for size, price in best_at_every_limit() if measure(float(price)) <= 0.02)
    assert size <= optimum * 1.03 / 0.97
    assert [step.choices for step in result.steps] == truth.seen
    for step in result.steps:
        assert value(rows, step.choices) == (step.bytes, pytest.approx(Fraction(step.predicted)))
        assert step.expected <= step.limit
        assert step.accepted == (step.drop <= 0.02)
        assert step.drop == pytest.approx(measure(step.predicted))


def test_the_second_plan_is_what_the_budget_buys_at_the_measured_prices() -> None:
    rows = ladder(30)
    truth = Truth(rows, lambda p: 4 * p, budget=0.02)
    first, second = search_plans(rows, truth, start=0.02, max_trials=3).steps[:2]
    assert (first.limit, first.expected) == (0.02, first.predicted)
    assert second.choices == cheapest(rows, max_loss=0.005) and second.limit == pytest.approx(0.02)
    assert second.expected == pytest.approx(second.drop) == pytest.approx(4 * second.predicted)


@pytest.mark.parametrize("max_trials", [2, 3, 6])
def test_search_ends_at_the_most_cautious_plan_when_nothing_passes(max_trials: int) -> None:
    rows = [row for row in ladder(10) if row.option != "keep"]
    result = search_plans(
        rows, Truth(rows, lambda p: p + 1, budget=0.02), start=0.02, max_trials=max_trials
    )
    assert result.best is None and len(result.steps) <= max_trials
    assert set(result.steps[-1].choices.values()) == {"8 bit"}


def test_search_falls_back_to_the_cautious_plan_when_only_it_passes() -> None:
    rows = ladder(10)
    result = search_plans(
        rows, Truth(rows, lambda p: 0.0 if p == 0 else 1.0, budget=0.02), start=0.02, max_trials=4
    )
    assert result.best == {f"layer{i}": "keep" for i in range(10)}
    assert len(result.steps) == 4


def test_search_stops_at_the_smallest_model_when_everything_passes() -> None:
    rows = ladder(10)
    result = search_plans(
        rows, Truth(rows, lambda p: 1e-3 * p, budget=0.02), start=0.001, max_trials=6
    )
    assert result.best == {f"layer{i}": "2 bit" for i in range(10)}
    assert len(result.steps) <= 3


def test_search_survives_models_that_break() -> None:
    rows = ladder(10)
    truth = Truth(rows, lambda p: p if p < 1e-3 else math.nan, budget=0.02)
    result = search_plans(rows, truth, start=0.02, max_trials=8)
    assert result.best is not None and float(value(rows, result.best)[1]) < 1e-3
    with pytest.raises(ValueError, match="accepted a plan"):
        search_plans(rows, lambda choices: Measurement(True, math.nan, 0.0), start=0.02)


def test_search_starts_from_a_budget_of_nothing() -> None:
    rows = ladder(10)
    result = search_plans(rows, Truth(rows, lambda p: p, budget=0.0), start=0.0)
    assert result.best is not None and value(rows, result.best)[1] == 0


def test_search_accepts_negative_prices() -> None:
    rows = [
        Choice(layer=r.layer, option=r.option, bytes=r.bytes, price=r.price - 1e-3)
        for r in ladder(10)
    ]
    result = search_plans(
        rows, Truth(rows, lambda p: p + 0.02, budget=0.015), start=0.015, max_trials=10
    )
    assert result.best is not None and float(value(rows, result.best)[1]) <= -0.005


def test_search_is_a_pure_function_and_resumes_from_a_cache() -> None:
    rows = ladder(30)
    whole = search_plans(
        rows, Truth(rows, lambda p: 1.4 * p + 20 * p**2, budget=0.02), start=0.02, max_trials=8
    )
    known = whole.steps[:2]
    fresh = Truth(rows, lambda p: 1.4 * p + 20 * p**2, budget=0.02)

    def measure(choices: dict[str, str]) -> Measurement:
        for step in known:
            if step.choices == choices:
                return Measurement(step.accepted, step.drop, step.loss)
        return fresh(choices)

    assert search_plans(rows, measure, start=0.02, max_trials=8) == whole
    assert fresh.seen == [step.choices for step in whole.steps[2:]]


def beyond_second_order(row: Choice) -> float:
    """How much more an option really costs than its price: the coarser, the more."""
    return {"2 bit": 5.0, "3 bit": 2.0, "4 bit": 1.2}.get(row.option, 1.0)


@pytest.mark.parametrize(("budget", "scaled_only"), [(0.01, 1.028), (0.03, 1.028)])
def test_search_learns_which_options_cost_more_than_their_price(
    budget: float, scaled_only: float
) -> None:
    """`scaled_only` is how far the same search stays from the true optimum where all prices are
    corrected alike."""
    rows = ladder(30)
    true = [replace(row, price=row.price * beyond_second_order(row)) for row in rows]

    def measure(choices: dict[str, str]) -> Measurement:
        loss = float(value(true, choices)[1])
        return Measurement(loss <= budget, loss, loss)

    result = search_plans(rows, measure, start=budget, max_trials=6)
    assert result.best is not None
    optimum = value(true, cheapest(true, max_loss=budget))[0]
    assert value(rows, result.best)[0] < (1 + (scaled_only - 1) / 2) * optimum
    first, last = result.steps[0], result.steps[-1]
    assert first.expected == first.predicted < first.loss / 3
    assert last.expected == pytest.approx(last.loss, rel=0.1) and last.predicted < last.loss / 1.5
    factors = result.factors
    assert factors["2 bit"] > 1.5 * factors["3 bit"] and factors["3 bit"] > 1


@pytest.mark.parametrize("seed", range(12))
def test_search_under_several_limits_finds_the_smallest_plan_that_passes(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for layer in range(5):
        for option in range(4):
            size, price = rng.randint(10, 99), rng.random() * 4.0**-option
            rows.append(Choice(layer=f"l{layer}", option=f"o{option}", bytes=size, price=price))
    use = {(row.layer, row.option): float(rng.randint(0, 9)) for row in rows}
    plans = combinations(rows)
    time = Limit(name="time", most=0.0, use=use)
    times = sorted(used(time, plan) for plan in plans)
    time = replace(time, most=times[len(plans) // 3])
    max_bytes = sorted(map(size_of, plans))[2 * len(plans) // 3]
    met = [p for p in plans if used(time, p) <= time.most and size_of(p) <= max_bytes]
    budget = 1.5 * sorted(map(price_of, met))[len(met) // 5]

    def measure(choices: dict[str, str]) -> Measurement:
        size, price = value(rows, choices)
        kept = size <= max_bytes and time.used(choices) <= time.most
        assert kept, "every plan keeps to the other limits"
        loss = 1.5 * float(price)
        return Measurement(loss <= budget, loss, loss)

    within = Within(max_bytes=max_bytes + 7, fixed_bytes=7, limits=(time,))
    result = search_plans(rows, measure, start=budget, within=within, max_trials=40, tolerance=0.0)
    assert result.best is not None
    # Limits closer than a thousandth are not told apart.
    passing = [size_of(plan) for plan in met if 1.5 * price_of(plan) <= budget * 0.998]
    assert value(rows, result.best)[0] <= min(passing)
    impossible = Within(limits=(replace(time, most=-1.0),))
    with pytest.raises(Infeasible, match="time: at least"):
        search_plans(rows, measure, start=budget, within=impossible)


def test_corrections_in_closed_form() -> None:
    rows = ladder(6)
    layers = sorted({row.layer for row in rows})
    uniform = {o: dict.fromkeys(layers, o) for o in ("2 bit", "3 bit", "4 bit", "8 bit")}
    costs = {o: float(value(rows, plan)[1]) for o, plan in uniform.items()}
    assert corrections(rows, []) == {}
    alike = corrections(rows, [(uniform["3 bit"], 3 * costs["3 bit"], 0.0)])
    assert alike == pytest.approx(dict.fromkeys({row.option for row in rows}, 3.0))
    # Two plans of one option each: with f the free mean and a, b distances from it, minimise the
    # squared errors of the losses over their variances plus (a² + b²) / (common / 2)².
    measured = [
        (uniform["3 bit"], 2.0 * costs["3 bit"], 0.0),
        (uniform["4 bit"], 1.0 * costs["4 bit"], 0.0),
    ]
    factors = corrections(rows, measured)
    losses = np.array([loss for _, loss, _ in measured])
    p = np.array([costs["3 bit"], costs["4 bit"]])
    variance = (0.1 * losses) ** 2 + (0.01 * losses.max()) ** 2
    common = (p * losses / variance).sum() / (p**2 / variance).sum()

    def error(x: np.ndarray) -> float:
        fit = (x[0] + x[1:]) * p
        return float(
            (((losses - fit) ** 2) / variance).sum() + (x[1:] ** 2).sum() / (0.5 * common) ** 2
        )

    mean, a, b = minimize(error, np.array([common, 0.0, 0.0]), tol=1e-12).x
    assert [factors["3 bit"], factors["4 bit"]] == pytest.approx([mean + a, mean + b], rel=1e-4)
    assert [factors["2 bit"], factors["keep"]] == pytest.approx([mean, mean], rel=1e-4)
    # A noisy loss moves less, one that is not finite not at all, and one far off at most fourfold.
    noisy = corrections(rows, [measured[0], (*measured[1][:2], 10 * costs["4 bit"])])
    assert abs(noisy["4 bit"] - 2) < abs(factors["4 bit"] - 2)
    assert corrections(rows, [measured[0], (uniform["2 bit"], math.inf, 0.0)]) == corrections(
        rows, measured[:1]
    )
    far = corrections(rows, [(uniform["8 bit"], 100 * costs["8 bit"], 0.0), *measured])
    assert max(far.values()) <= 16.001 * min(far.values())
    for losses_of_nothing in (-1.0, 0.0, math.nan):
        assert corrections(rows, [(uniform["3 bit"], losses_of_nothing, 0.0)]) == {}


@pytest.mark.parametrize(("start", "max_trials"), [(-0.1, 6), (math.inf, 6), (0.1, 0)])
def test_search_validates_its_arguments(start: float, max_trials: int) -> None:
    with pytest.raises(ValueError, match=r"search_plans\("):
        search_plans(
            ladder(3),
            lambda choices: Measurement(True, 0.0, 0.0),
            start=start,
            max_trials=max_trials,
        )


def test_budget_takes_any_limits() -> None:
    assert Budget("loss", max_drop=0.02) == Budget(max_drop=0.02)
    assert Budget(max_bytes=60_000_000).max_bytes == 60_000_000
    assert not Budget(max_drop=0.1).limited and Budget(max_drop=0.1, max_bits=4.5).limited
    assert type(Budget(max_bits=np.float64(4.5)).max_bits) is float


def test_a_budget_is_written_in_one_order() -> None:
    """The digest of a run's stages and its report hang on it."""
    latency = Limit(name="latency", most=2, use={("a", "x"): 1, ("b", "x"): 0.5, ("a", "y"): 2.0})
    budget = Budget("accuracy", max_drop=0.01, max_bits=4, limits=[latency], confidence=0.9)
    written = (
        '{"metric": "accuracy", "max_drop": 0.01, "max_bytes": null, "max_bits": 4, '
        '"max_macs": null, "max_bops": null, "limits": [{"name": "latency", "most": 2, '
        '"use": {"a": {"x": 1, "y": 2.0}, "b": {"x": 0.5}}, "per": 1.0}], "confidence": 0.9}'
    )
    assert json.dumps(budget.to_dict()) == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "none given"),
        ({"max_drop": -0.1}, "-0.1"),
        ({"max_drop": math.nan}, "nan"),
        ({"metric": "accuracy", "max_drop": 1.0}, "max_drop=0.01"),
        ({"max_bytes": 0}, "max_bytes=0: expected a positive whole number of bytes"),
        ({"max_bytes": -5}, "max_bytes=-5"),
        ({"max_bits": 0.0}, "max_bits=0"),
        ({"max_macs": math.inf}, "max_macs=inf"),
        ({"max_bops": True}, "max_bops=True"),
        ({"limits": [Limit(name="max_bits", most=1.0, use={})]}, "'max_bits' is taken"),
        ({"limits": [Limit(name="a", most=1.0, use={})] * 2}, "'a' is taken"),
        ({"max_drop": 0.1, "confidence": 95}, "confidence=95"),
        ({"max_drop": 0.1, "confidence": 0.5}, "confidence=0.5"),
    ],
)
def test_budget_errors_say_what_to_type(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]


def test_limits_of_a_budget_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        Budget("loss", 0.02)  # type: ignore[call-arg]


def test_plan_round_trips_through_json() -> None:
    original = Plan(
        choices={"b": "x", "a": "y"},
        bytes=3,
        predicted=0.1,
        predicted_stderr=0.01,
        notes=("kept b",),
        uses={"max_bits": 4.0},
    )
    written = json.dumps(original.to_dict())
    assert written == (
        '{"choices": {"b": "x", "a": "y"}, "bytes": 3, "predicted": 0.1, '
        '"predicted_stderr": 0.01, "notes": ["kept b"], "uses": {"max_bits": 4.0}}'
    )
    assert decode(Plan, json.loads(written), source="plan.json") == original
    unknown = replace(original, predicted_stderr=math.inf).to_dict()
    assert unknown["predicted_stderr"] is None
    assert math.isnan(decode(Plan, unknown, source="plan.json").predicted_stderr)
