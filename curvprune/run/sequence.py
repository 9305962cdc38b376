"""Which plans go to the certificate, and in which order: decided on the select split alone.

Plans are tested cautious first, and the last that is certified ships. So a bold plan behind a
cautious one costs nothing but its making: where it fails, the one before it ships. The next plan to
apply is therefore the one that is expected to save most, its bytes times its chance, and not one
that is nearly sure to pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from curvprune.planning import Infeasible, cheapest, corrected
from curvprune.run.selection import SAME_SIZE, chance_at, reach_of
from curvprune.run.task import Job

# a plan is looked for up to so many times the largest expected loss of those that were applied
BOLDEST = 3.0
STEPS = 40  # ... at so many losses
SURE = 0.999  # chance above which no larger plan is tested before
# What a recovery gives back grows with this power of the loss it starts from. SmolLM2-135M, 0.016
# to 0.15 nats added, 48 steps: 0.7; 0.10 to 0.20, 24 steps: 0.9.
RECOVERED = 0.75


class Tried(NamedTuple):
    """An applied plan's trial record and, where it was recovered, that of before."""

    record: Mapping[str, Any]
    before: Mapping[str, Any] | None


def to_test(plans: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the plans, given as (bytes, chance), to test, largest first: all but those beside
    which a smaller one is likelier to pass, or `SURE` to. Along the rest chances fall."""
    kept: list[int] = []
    for i in sorted(range(len(plans)), key=lambda i: (plans[i][0], -plans[i][1])):
        if not kept or plans[kept[-1]][1] <= min(plans[i][1], SURE):
            kept.append(i)
    return kept[::-1]


def expected_saving(plans: Sequence[tuple[int, float]], largest: int) -> float:
    """Bytes below ``largest`` that the shipped model is expected to have when plans, given as
    (bytes, chance), are tested in turn. Plans pass together: where one does, all with a higher
    chance do."""
    saved, before = 0.0, largest
    for i in to_test(plans):
        size, chance = plans[i]
        saved, before = saved + chance * (before - size), size
    return saved


def chance_of(job: Job, expected: float, tried: Sequence[Tried]) -> float:
    """Predicted chance of being certified that a plan with this expected loss would have once it is
    applied: that of the nearest applied one (by the ratio of losses), if what it lost on select,
    with its error and the distance to its bound, grows with the expected loss, and what its
    recovery gave back with its power `RECOVERED`."""
    record, before = min(tried, key=lambda t: abs(np.log(expected / t.record["expected"])))
    factor, drop = expected / record["expected"], record["metric_drop"]
    if before is None:
        drop *= factor if drop > 0 else 1.0
    else:
        drop = factor * before["metric_drop"] - factor**RECOVERED * (before["metric_drop"] - drop)
    return chance_at(job, drop, factor * record["metric_stderr"], drop + factor * reach_of(record))


def next_plan(job: Job, tried: Sequence[Tried]) -> dict[str, str] | None:
    """The plan whose making raises `expected_saving` most, by corrected prices, or None where none
    raises it by as much as makes two sizes differ. Cost: `STEPS` plans."""
    assert job.ledger is not None
    losses = [t.record["expected"] for t in tried]
    if not min(losses) > 0:
        return None  # how much bolder another plan is cannot be told
    plans = [(t.record["bytes"], t.record["chance"]) for t in tried]
    largest = max(size for size, _ in plans)
    least = expected_saving(plans, largest) + (SAME_SIZE - 1) * min(size for size, _ in plans)
    rows, best = corrected(job.ledger.rows, job.factors), None
    for loss in np.geomspace(min(losses), BOLDEST * max(losses), STEPS):
        try:
            choices = cheapest(rows, job.within, max_loss=float(loss))
        except Infeasible:
            continue
        expected = job.expected(choices)
        if not expected > 0:
            continue
        saved = expected_saving(
            [*plans, (job.bytes_of(choices), chance_of(job, expected, tried))], largest
        )
        if saved > least:
            least, best = saved, choices
    return best
