"""The closed loop that measures plans until the smallest one that passes is found. The plans
themselves come from `cheapest`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from curvprune.planning.budget import UNLIMITED, Within
from curvprune.planning.corrected_prices import MeasuredPlan, corrected, corrections
from curvprune.planning.integer_program import cheapest
from curvprune.planning.priced import Priced

_ATTEMPTS = 64  # limits tried before the search ends, where none gives a plan that is new


class Measurement(NamedTuple):
    """What measuring a plan gave.

    Attributes:
        accepted: whether the plan passes.
        drop: its drop, in the unit of the budget.
        loss, stderr: the rise of its loss in the unit of the prices, and its standard error.
        allowed: the drop that would just have passed, as far as that is known.
    """

    accepted: bool
    drop: float
    loss: float
    stderr: float = 0.0
    allowed: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchStep:
    """A plan that the search measured.

    Attributes:
        limit: the most that the plan was allowed to cost, by the prices as the steps before had
            corrected them.
        predicted: what it costs by the ledger.
        expected: what it costs by the corrected prices.
        drop: in the unit of the budget.
        loss, stderr: the rise of its loss, in the unit of the prices.
        allowed: the drop that would just have passed.
    """

    choices: dict[str, str]
    limit: float
    bytes: int
    predicted: float
    expected: float
    drop: float
    loss: float
    stderr: float
    allowed: float
    accepted: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """`steps` in the order in which they were measured; `best` is the smallest accepted plan, None
    when none was accepted; `factors` is what all of them say the prices of each option must be
    multiplied by (`corrections`)."""

    steps: tuple[SearchStep, ...]
    best: dict[str, str] | None
    factors: dict[str, float]


def search_plans(
    rows: Iterable[Priced],
    measure: Callable[[dict[str, str]], Measurement],
    *,
    start: float,
    known: Sequence[MeasuredPlan] = (),
    within: Within = UNLIMITED,
    max_trials: int = 6,
    tolerance: float = 0.03,
) -> Search:
    """Closed loop: plan, measure, correct the prices with what was measured, plan again, until the
    smallest plan that passes is found. Every plan keeps `within` the other limits.

    `measure(choices)` is called at most once per plan and `max_trials` times. `start` is the
    budget, and what the first plan may cost, by prices that the plans `known` so far have
    corrected. Each plan is the smallest whose corrected price is
    within the next limit. That limit is where the drop becomes `allowed` by the measurement of the
    plan next to it, if drops grow like prices, but

    * while every plan passed, at least 1.25 times what the last one costs (2 times from the third
      plan on), and while every one failed, at most 0.8 (0.5) times as much; never beyond a factor
      of 64. With one trial left and nothing accepted, the plan with the lowest price is measured;
    * once one plan was accepted and another that costs more was rejected, the limit lies in the
      middle half between the two, on a logarithmic scale.

    Stops when no plan cheaper than the rejected one is smaller than the accepted one by `tolerance`
    of its bytes, or when the smallest model is accepted. Also when nothing is accepted and a plan
    was rejected whose price is the lowest but for `tolerance`, when the limits in between give no
    new plan, or when the trials are spent. Should `start` be a fall of accuracy, the measurements
    turn it into nats from the second limit on.

    A pure function of what `measure` returns: a caller who caches measurements by plan can stop and
    resume.

    Raises:
        Infeasible: no plan keeps within the other limits.
        ValueError: malformed rows or groups, a start that is negative or not finite, or an accepted
            plan without a finite drop.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(
            f"search_plans(start={start!r}): expected a finite number of nats >= 0, usually the "
            "budget's max_drop"
        )
    if max_trials < 1:
        raise ValueError(f"search_plans(max_trials={max_trials!r}): expected at least 1")
    rows = list(rows)
    rules = _Rules(start, within, max_trials, tolerance)

    steps: dict[_Key, SearchStep] = {}
    factors = corrections(rows, known)
    while True:
        # 1. The next plan, by the prices as all measurements so far correct them.
        prices = corrected(rows, factors)
        found = _next_plan(_Stand(prices, steps, rules))
        if found is None:
            break
        limit, choices = found

        # 2. Measure it.
        measured = measure(dict(choices))
        if measured.accepted and not math.isfinite(measured.drop):
            raise ValueError(
                f"measure() accepted a plan whose drop is {measured.drop!r}; do not accept such "
                "plans"
            )
        steps[_key(choices)] = SearchStep(
            choices=choices,
            limit=limit,
            bytes=_bytes_of(rows, choices),
            predicted=_price_of(rows, choices),
            expected=_price_of(prices, choices),
            drop=float(measured.drop),
            loss=float(measured.loss),
            stderr=float(measured.stderr),
            allowed=start if measured.allowed is None else float(measured.allowed),
            accepted=bool(measured.accepted),
        )

        # 3. Learn from it.
        trials = [MeasuredPlan(s.choices, s.loss, s.stderr) for s in steps.values()]
        factors = corrections(rows, [*known, *trials])

    passing = [step for step in steps.values() if step.accepted]
    best = min(passing, key=lambda step: step.bytes).choices if passing else None
    return Search(steps=tuple(steps.values()), best=best, factors=factors)


_Key = tuple[tuple[str, str], ...]


def _key(choices: Mapping[str, str]) -> _Key:
    return tuple(sorted(choices.items()))


def _bytes_of(rows: Iterable[Priced], choices: Mapping[str, str]) -> int:
    return sum(row.bytes for row in rows if choices[row.layer] == row.option)


def _price_of(rows: Iterable[Priced], choices: Mapping[str, str]) -> float:
    return math.fsum(row.price for row in rows if choices[row.layer] == row.option)


class _Rules(NamedTuple):
    """What a search was asked."""

    start: float
    within: Within
    max_trials: int
    tolerance: float


class _Stand:
    """Where a search stands: today's prices, and the steps so far by these prices.

    Attributes:
        cost: of every step, by today's prices.
        floor, ceiling: the lowest price there is, and that of the smallest plan.
        passing: the smallest accepted step, None where none was accepted.
        failing: the cheapest rejected step that costs more than it.
    """

    def __init__(
        self, prices: Sequence[Priced], steps: Mapping[_Key, SearchStep], rules: _Rules
    ) -> None:
        self.prices, self.steps, self.rules = prices, steps, rules
        self.floor = self.price(self.plan(max_loss=None))
        self.smallest = self.plan(max_loss=math.inf)
        self.ceiling = self.price(self.smallest)
        self.cost = {key: self.price(step.choices) for key, step in steps.items()}
        accepted = [key for key, step in steps.items() if step.accepted]
        self.passing = min(
            accepted, key=lambda key: (steps[key].bytes, self.cost[key]), default=None
        )
        # A rejected plan that costs no more than the accepted one says that the prices still err,
        # and no more than that.
        least = -math.inf if self.passing is None else self.cost[self.passing]
        rejected = [
            key for key, step in steps.items() if not step.accepted and self.cost[key] > least
        ]
        self.failing = min(rejected, key=self.cost.__getitem__, default=None)

    def plan(self, *, max_loss: float | None) -> dict[str, str]:
        """The smallest plan of at most this price, or the one with the lowest price."""
        within = self.rules.within
        if max_loss is None and within.max_bytes is None:
            everything = sum(row.bytes for row in self.prices) + within.fixed_bytes
            within = replace(within, max_bytes=everything)
        return cheapest(self.prices, within, max_loss=max_loss)

    def price(self, choices: Mapping[str, str]) -> float:
        return _price_of(self.prices, choices)

    def size(self, choices: Mapping[str, str]) -> int:
        return _bytes_of(self.prices, choices)

    def aim(self, key: _Key | None) -> float | None:
        """What a plan costs whose drop is just allowed, if drops grow like prices from this step
        on; None where that cannot be told."""
        if key is None:
            return None
        step, cost = self.steps[key], self.cost[key]
        if not (math.isfinite(step.drop) and step.drop > 0 and cost > 0 and step.allowed > 0):
            return None
        return step.allowed * cost / step.drop


def _next_plan(stand: _Stand) -> tuple[float, dict[str, str]] | None:
    """The next limit and its plan, which no step has measured; None when the search is over."""
    if _is_over(stand):
        return None
    low = None if stand.passing is None else stand.cost[stand.passing]
    high = None if stand.failing is None else stand.cost[stand.failing]
    # Planning is cheap next to measuring, so a limit that gives no new plan only narrows the
    # bracket.
    for attempt in range(_ATTEMPTS):
        # 1. The plan at the next limit.
        first = len(stand.steps) == 1 and attempt == 0
        limit = min(max(_limit(stand, low, high, first=first), stand.floor), stand.ceiling)
        choices = stand.plan(max_loss=limit)
        known = stand.steps.get(_key(choices))

        # 2. It was rejected: every limit down to what it costs gives this same plan.
        if known is not None and not known.accepted:
            if limit <= stand.floor:
                return None
            high = min(limit, stand.cost[_key(choices)])
        # 3. It was accepted, or is no smaller than the one that was: bolder.
        elif known is not None or not _is_smaller(stand, choices):
            if limit >= stand.ceiling:
                return None
            low = limit
        # 4. It is new.
        else:
            return limit, choices
        if low is not None and high is not None and high - low <= 1e-3 * abs(high):
            return None
    return None


def _is_over(stand: _Stand) -> bool:
    rules, steps = stand.rules, stand.steps
    if len(steps) >= rules.max_trials:
        return True
    if stand.passing is None:
        nearly_lowest = stand.floor + rules.tolerance * abs(stand.floor)
        return any(price <= nearly_lowest for price in stand.cost.values())
    size = steps[stand.passing].bytes
    if size <= stand.size(stand.smallest):
        return True
    if stand.failing is None:
        return False
    # Whether any plan that is cheaper than the rejected one is worth a measurement.
    below = math.nextafter(stand.cost[stand.failing], -math.inf)
    within_reach = stand.plan(max_loss=max(below, stand.floor))
    return size - stand.size(within_reach) < rules.tolerance * size


def _is_smaller(stand: _Stand, choices: Mapping[str, str]) -> bool:
    """Whether a plan is smaller than the smallest accepted one, if there is one."""
    if stand.passing is None:
        return True
    return stand.size(choices) < stand.steps[stand.passing].bytes


def _limit(stand: _Stand, low: float | None, high: float | None, *, first: bool) -> float:
    """What the next plan may cost, between what an accepted one costs (`low`) and what a rejected
    one does (`high`)."""
    if low is not None and high is not None:
        return _between(low, high, stand.aim(stand.passing))
    if low is not None:
        return _bolder(low, stand.aim(stand.passing), stand.ceiling, first=first)
    if high is not None:
        if len(stand.steps) == stand.rules.max_trials - 1:
            return stand.floor
        return _more_cautious(high, stand.aim(stand.failing), stand.floor, first=first)
    return stand.rules.start


def _bolder(low: float, aim: float | None, ceiling: float, *, first: bool) -> float:
    if low <= 0:
        return ceiling / 64 if ceiling > 0 else ceiling
    wanted = 4 * low if aim is None else aim
    return min(max(wanted, low * (1.25 if first else 2.0)), 64 * low)


def _more_cautious(high: float, aim: float | None, floor: float, *, first: bool) -> float:
    if high <= 0:
        return (high + floor) / 2
    wanted = high / 4 if aim is None else aim
    return max(min(wanted, high * (0.8 if first else 0.5)), high / 64)


def _between(low: float, high: float, aim: float | None) -> float:
    if high <= 0:
        return (low + high) / 2
    # A plan that changes nothing costs 0 nats: without a floor the logarithmic scale would never
    # leave it.
    least = max(low, 0.0, high / 256)
    ratio = high / least
    if aim is None:
        wanted = least * ratio**0.5
    else:
        wanted = min(max(aim, least * ratio**0.25), least * ratio**0.75)
    return max(wanted, low + (high - low) / 16)
