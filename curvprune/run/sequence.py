"""Which plans go to the certificate, and in which order: decided on the select split alone.

Plans are tested cautious first, and the last that is certified ships. So a bold plan behind a
cautious one costs nothing but its making: where it fails, the one before it ships. The next plan to
apply is therefore the one that is expected to save most, its bytes times its chance, and not one
that is nearly sure to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from curvprune.planning import Infeasible, cheapest
from curvprune.record import Trial
from curvprune.run.evaluation import chance_at
from curvprune.run.price import Prices
from curvprune.run.select import SAME_SIZE, reach_of
from curvprune.run.task import Task

BOLDEST = 3.0  # a plan is looked for up to so many times the largest expected loss of those applied
STEPS = 40  # ... at so many losses
SURE = 0.999  # chance above which no larger plan is tested before
SAFE = 0.95  # predicted probability of being certified that some plan of the sequence should have
CAUTION = 0.6  # a more cautious plan may cost so much of the next one's predicted loss
# What a recovery gives back grows with this power of the loss it starts from. SmolLM2-135M, 0.016
# to 0.15 nats added, 48 steps: 0.7; 0.10 to 0.20, 24 steps: 0.9.
RECOVERED = 0.75


class Tried(NamedTuple):
    """What an applied plan says about the next: its trial and, where it was recovered, that of
    before."""

    trial: Trial
    before: Trial | None

    @property
    def chance(self) -> float:
        return self.trial.chance or 0.0


class Prospect(NamedTuple):
    """What a plan would save, and whether it would be certified."""

    bytes: int
    chance: float


def to_test(plans: Sequence[Prospect]) -> list[int]:
    """Indices of the plans to test, largest first: all but those beside which a smaller one is
    likelier to pass, or `SURE` to. Along the rest chances fall."""
    smallest_first = sorted(range(len(plans)), key=lambda i: (plans[i].bytes, -plans[i].chance))
    kept: list[int] = []
    for i in smallest_first:
        if not kept or plans[kept[-1]].chance <= min(plans[i].chance, SURE):
            kept.append(i)
    return kept[::-1]


def expected_saving(plans: Sequence[Prospect], largest: int) -> float:
    """Bytes below ``largest`` that the shipped model is expected to have when plans are tested in
    turn. Plans pass together: where one does, all with a higher chance do."""
    saved, before = 0.0, largest
    for i in to_test(plans):
        size, chance = plans[i]
        saved += chance * (before - size)
        before = size
    return saved


def chance_of(task: Task, expected: float, tried: Sequence[Tried]) -> float:
    """Predicted chance of being certified that a plan with this expected loss would have once it is
    applied.

    It is that of the nearest applied plan (by the ratio of losses), if what that lost on select
    grows with the expected loss, with its error and the distance to its bound. What its recovery
    gave back grows with the power `RECOVERED`.
    """

    def distance(one: Tried) -> float:
        assert one.trial.expected is not None
        return float(abs(np.log(expected / one.trial.expected)))

    trial, before = min(tried, key=distance)
    assert trial.expected is not None
    factor, drop = expected / trial.expected, trial.drop
    if before is None:
        drop *= factor if drop > 0 else 1.0
    else:
        given_back = before.drop - drop
        drop = factor * before.drop - factor**RECOVERED * given_back
    return chance_at(task, drop, factor * trial.drop_stderr, drop + factor * reach_of(trial))


def next_plan(task: Task, prices: Prices, tried: Sequence[Tried]) -> dict[str, str] | None:
    """The plan whose making raises `expected_saving` most, by corrected prices, or None where none
    raises it by as much as makes two sizes differ. Cost: `STEPS` plans."""
    losses = [one.trial.expected or 0.0 for one in tried]
    if not min(losses) > 0:
        return None  # how much bolder another plan is cannot be told
    plans = [Prospect(one.trial.bytes, one.trial.chance or 0.0) for one in tried]
    largest = max(plan.bytes for plan in plans)
    smallest = min(plan.bytes for plan in plans)
    least = expected_saving(plans, largest) + (SAME_SIZE - 1) * smallest
    rows, best = prices.rows, None
    for loss in np.geomspace(min(losses), BOLDEST * max(losses), STEPS):
        try:
            choices = cheapest(rows, task.within, max_loss=float(loss))
        except Infeasible:
            continue
        expected = prices.expected(choices)
        if not expected > 0:
            continue
        new = Prospect(task.bytes_of(choices), chance_of(task, expected, tried))
        saved = expected_saving([*plans, new], largest)
        if saved > least:
            least, best = saved, choices
    return best


def more_cautious(task: Task, prices: Prices, trial: Trial) -> dict[str, str] | None:
    """A larger plan with `CAUTION` times the expected loss of an applied one, if there is any."""
    assert trial.expected is not None
    try:
        choices = cheapest(prices.rows, task.within, max_loss=CAUTION * trial.expected)
    except Infeasible:
        return None
    return choices if task.bytes_of(choices) > trial.bytes else None


def fix_sequence(
    task: Task,
    prices: Prices,
    best: Trial,
    apply: Callable[[str, Mapping[str, str]], Tried],
    earlier: Sequence[Tried] = (),
) -> list[int]:
    """The plans to certify, cautious first; everything here is judged on select alone.

    Unless an earlier run has left a safe one, the best plan is applied, and more cautious ones
    until one is safe. Then come those that `next_plan` finds: a recovered model leaves room.
    ``settings.attempts`` counts what this run applies.

    Args:
        best: the plan that select found best.
        apply: applies a plan of this name and says how it did.
        earlier: plans that a reused run has applied.

    Returns the places of the plans to test, in that order, among ``earlier`` and those applied.
    """
    tried = list(earlier)
    left = 1 if task.max_drop is None else task.settings.attempts
    # 1. The plan that select found best.
    known = [one.trial.choices for one in tried]
    if not _any_safe(tried) and best.choices not in known:
        tried.append(apply(best.name, best.choices))
        left -= 1
    # 2. Others, more cautious until one is safe, then bolder.
    for number in range(1, left + 1):
        safe = _any_safe(tried)
        if safe:
            choices = next_plan(task, prices, tried)
        else:
            largest = max(tried, key=lambda one: one.trial.bytes)
            choices = more_cautious(task, prices, largest.trial)
        if choices is None:
            break
        name = f"{best.name}, {'bolder' if safe else 'more cautious'}"
        tried.append(apply(name if number == 1 else f"{name} {number}", choices))
    # 3. In which order, and which are not worth a test.
    return to_test([Prospect(one.trial.bytes, one.chance) for one in tried])


def _any_safe(tried: Sequence[Tried]) -> bool:
    return any(one.chance >= SAFE for one in tried)
