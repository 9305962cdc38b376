"""Which plans go to the certificate, and in which order: decided on the select split alone.

Plans are tested cautious first, and the last that is certified ships. So a bold plan behind a
cautious one costs nothing but its making: where it fails, the one before it ships. The next plan to
apply is therefore the one that is expected to save most, its bytes times its chance, and not one
that is nearly sure to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
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
# What a recovery gives back grows with this power of the loss it starts from. SmolLM2-135M, 0.016
# to 0.15 nats added, 48 steps: 0.7; 0.10 to 0.20, 24 steps: 0.9.
RECOVERED = 0.75


class Tried(NamedTuple):
    """An applied plan's trial and, where it was recovered, that of before."""

    trial: Trial
    before: Trial | None


class Candidate(NamedTuple):
    """What a plan would save, and whether it would be certified."""

    bytes: int
    chance: float


def to_test(plans: Sequence[Candidate]) -> list[int]:
    """Indices of the plans to test, largest first: all but those beside which a smaller one is
    likelier to pass, or `SURE` to. Along the rest chances fall."""
    smallest_first = sorted(range(len(plans)), key=lambda i: (plans[i].bytes, -plans[i].chance))
    kept: list[int] = []
    for i in smallest_first:
        if not kept or plans[kept[-1]].chance <= min(plans[i].chance, SURE):
            kept.append(i)
    return kept[::-1]


def expected_saving(plans: Sequence[Candidate], largest: int) -> float:
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
    plans = [Candidate(one.trial.bytes, one.trial.chance or 0.0) for one in tried]
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
        new = Candidate(task.bytes_of(choices), chance_of(task, expected, tried))
        saved = expected_saving([*plans, new], largest)
        if saved > least:
            least, best = saved, choices
    return best
