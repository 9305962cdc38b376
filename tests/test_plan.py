"""The closed loop against simulated models, and what a budget may say."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import minimize

from curvprune.planning import (
    Budget,
    Choice,
    Infeasible,
    Limit,
    Measurement,
    Plan,
    Search,
    Trial,
    cheapest,
    corrections,
    frontier,
    search_plans,
)
from tests.test_knapsack import by_layer, ladder, share, value


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

    def optimum(self) -> int:
        """The smallest plan of the whole ladder of limits whose measured loss is within the
        budget."""
        limits = [point.price for point in frontier(self.rows, points=10_000)]
        sizes = [value(self.rows, cheapest(self.rows, max_loss=limit)) for limit in limits]
        return min(size for size, price in sizes if self.measure(float(price)) <= self.budget)


def test_search_measures_only_plans_that_share() -> None:
    rows = ladder(12)
    groups = [("layer0", "layer5", "layer7"), ("layer2", "layer1")]
    truth = Truth(rows, lambda p: 1.4 * p, budget=0.02)
    result = search_plans(rows, truth, start=0.02, max_trials=6, same_option=groups)
    assert result.best is not None and len(result.trials) > 1
    for trial in result.trials:
        assert share(trial.choices, groups)
        assert value(rows, trial.choices) == (trial.bytes, pytest.approx(Fraction(trial.predicted)))
    free = search_plans(rows, Truth(rows, lambda p: 1.4 * p, budget=0.02), start=0.02, max_trials=6)
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
    assert size <= truth.optimum() * 1.03 / 0.97
    assert [trial.choices for trial in result.trials] == truth.seen
    for trial in result.trials:
        assert value(rows, trial.choices) == (trial.bytes, pytest.approx(Fraction(trial.predicted)))
        assert trial.expected <= trial.limit
        assert (trial.accepted, trial.measured) == (
            trial.measured <= 0.02,
            pytest.approx(measure(trial.predicted)),
        )


def test_the_second_plan_is_what_the_budget_buys_at_the_measured_prices() -> None:
    rows = ladder(30)
    first, second = search_plans(
        rows, Truth(rows, lambda p: 4 * p, budget=0.02), start=0.02, max_trials=3
    ).trials[:2]
    assert (first.limit, first.expected) == (0.02, first.predicted)
    assert second.choices == cheapest(rows, max_loss=0.005) and second.limit == pytest.approx(0.02)
    assert second.expected == pytest.approx(second.measured) == pytest.approx(4 * second.predicted)


@pytest.mark.parametrize("max_trials", [2, 3, 6])
def test_search_ends_at_the_most_cautious_plan_when_nothing_passes(max_trials: int) -> None:
    rows = [row for row in ladder(10) if row.option != "keep"]
    result = search_plans(
        rows, Truth(rows, lambda p: p + 1, budget=0.02), start=0.02, max_trials=max_trials
    )
    assert result.best is None and len(result.trials) <= max_trials
    assert set(result.trials[-1].choices.values()) == {"8 bit"}


def test_search_falls_back_to_the_cautious_plan_when_only_it_passes() -> None:
    rows = ladder(10)
    result = search_plans(
        rows, Truth(rows, lambda p: 0.0 if p == 0 else 1.0, budget=0.02), start=0.02, max_trials=4
    )
    assert result.best == {f"layer{i}": "keep" for i in range(10)}
    assert len(result.trials) == 4


def test_search_stops_at_the_smallest_model_when_everything_passes() -> None:
    rows = ladder(10)
    result = search_plans(
        rows, Truth(rows, lambda p: 1e-3 * p, budget=0.02), start=0.001, max_trials=6
    )
    assert result.best == {f"layer{i}": "2 bit" for i in range(10)}
    assert len(result.trials) <= 3


def test_search_survives_models_that_break() -> None:
    rows = ladder(10)
    truth = Truth(rows, lambda p: p if p < 1e-3 else math.nan, budget=0.02)
    result = search_plans(rows, truth, start=0.02, max_trials=8)
    assert result.best is not None and float(value(rows, result.best)[1]) < 1e-3
    assert Search.from_dict(json.loads(json.dumps(result.to_dict()))).best == result.best
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
    cache = {
        tuple(t.choices.items()): Measurement(t.accepted, t.measured, t.loss)
        for t in whole.trials[:2]
    }
    fresh = Truth(rows, lambda p: 1.4 * p + 20 * p**2, budget=0.02)
    resumed = search_plans(
        rows,
        lambda c: cache[tuple(c.items())] if tuple(c.items()) in cache else fresh(c),
        start=0.02,
        max_trials=8,
    )
    assert resumed == whole
    assert fresh.seen == [t.choices for t in whole.trials[2:]]
    assert Search.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    assert Trial.from_dict(whole.trials[0].to_dict()) == whole.trials[0]


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

    def evaluate(choices: dict[str, str]) -> Measurement:
        loss = float(value(true, choices)[1])
        return Measurement(loss <= budget, loss, loss)

    result = search_plans(rows, evaluate, start=budget, max_trials=6)
    assert result.best is not None
    optimum = value(true, cheapest(true, max_loss=budget))[0]
    assert value(rows, result.best)[0] < (1 + (scaled_only - 1) / 2) * optimum
    first, last = result.trials[0], result.trials[-1]
    assert first.expected == first.predicted < first.loss / 3
    assert last.expected == pytest.approx(last.loss, rel=0.1) and last.predicted < last.loss / 1.5
    factors = result.factors
    assert factors["2 bit"] > 1.5 * factors["3 bit"] and factors["3 bit"] > 1


@pytest.mark.parametrize("seed", range(12))
def test_search_under_several_limits_finds_the_smallest_plan_that_passes(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        Choice(
            layer=f"l{layer}",
            option=f"o{option}",
            bytes=rng.randint(10, 99),
            price=rng.random() * 4.0**-option,
        )
        for layer in range(5)
        for option in range(4)
    ]
    use = {(row.layer, row.option): float(rng.randint(0, 9)) for row in rows}
    plans = list(itertools.product(*by_layer(rows)))
    sums = [
        (
            sum(r.bytes for r in p),
            math.fsum(r.price for r in p),
            sum(use[r.layer, r.option] for r in p),
        )
        for p in plans
    ]
    limit = Limit(name="time", most=sorted(s[2] for s in sums)[len(sums) // 3], use=use)
    max_bytes = sorted(s[0] for s in sums)[2 * len(sums) // 3]
    within = [s for s in sums if s[2] <= limit.most and s[0] <= max_bytes]
    budget = 1.5 * sorted(s[1] for s in within)[len(within) // 5]

    def evaluate(choices: dict[str, str]) -> Measurement:
        size, price = value(rows, choices)
        assert size <= max_bytes and limit.used(choices) <= limit.most, (
            "every plan keeps to the other limits"
        )
        loss = 1.5 * float(price)
        return Measurement(loss <= budget, loss, loss)

    result = search_plans(
        rows, evaluate, start=budget, max_trials=40, tolerance=0.0,
        max_bytes=max_bytes + 7, fixed_bytes=7, limits=[limit],
    )  # fmt: skip
    assert result.best is not None
    # Limits closer than a thousandth are not told apart.
    assert value(rows, result.best)[0] <= min(s[0] for s in within if 1.5 * s[1] <= budget * 0.998)
    with pytest.raises(Infeasible, match="time: at least"):
        search_plans(rows, evaluate, start=budget, limits=[replace(limit, most=-1.0)])


def test_corrections_in_closed_form() -> None:
    rows = ladder(6)
    layers = sorted({row.layer for row in rows})
    price = {(row.layer, row.option): row.price for row in rows}
    uniform = {o: dict.fromkeys(layers, o) for o in ("2 bit", "3 bit", "4 bit", "8 bit")}
    costs = {o: math.fsum(price[pair] for pair in plan.items()) for o, plan in uniform.items()}
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


def test_search_validates_its_arguments() -> None:
    for arguments in ({"start": -0.1}, {"start": math.inf}, {"start": 0.1, "max_trials": 0}):
        with pytest.raises(ValueError, match=r"search_plans\("):
            search_plans(ladder(3), lambda choices: Measurement(True, 0.0, 0.0), **arguments)  # type: ignore[arg-type]


def test_budget_takes_any_limits() -> None:
    assert Budget("loss", max_drop=0.02) == Budget(max_drop=0.02)
    assert Budget(max_bytes=60_000_000).max_bytes == 60_000_000
    assert not Budget(max_drop=0.1).limited and Budget(max_drop=0.1, max_bits=4.5).limited
    latency = Limit(name="latency", most=2.5, use={("a", "x"): 1.0, ("a", "y"): 2.0})
    for budget in (
        Budget("accuracy", max_drop=0.01, confidence=0.9),
        Budget(max_bytes=5),
        Budget(
            max_drop=0.1, max_bytes=5, max_bits=4.25, max_macs=1e9, max_bops=1e12, limits=(latency,)
        ),
    ):
        assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "none given"),
        ({"metric": "perplexity", "max_drop": 0.1}, "perplexity"),
        ({"max_drop": -0.1}, "-0.1"),
        ({"max_drop": math.nan}, "nan"),
        ({"metric": "accuracy", "max_drop": 1.0}, "max_drop=0.01"),
        ({"max_bytes": 0}, "max_bytes=0"),
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
    with pytest.raises(ValueError, match="unknown keys"):
        Budget.from_dict({"max_drp": 0.1})


def test_plan_round_trips_through_json() -> None:
    original = Plan(
        choices={"a": "x"}, bytes=3, predicted=0.1, predicted_stderr=0.01, notes=("kept b",)
    )
    assert Plan.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    unknown = Plan(choices={"a": "x"}, bytes=3, predicted=0.1, predicted_stderr=math.nan).to_dict()
    assert unknown["predicted_stderr"] is None and math.isnan(
        Plan.from_dict(unknown).predicted_stderr
    )
