"""No plan keeps within the limits: which ones to raise, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple

from curvprune.planning.highs import Effort, sum_of
from curvprune.planning.several_limits import Resource, best_plan


class Shortfall(NamedTuple):
    """A limit that stands in the way: `best` is the least that it would have to be raised to."""

    name: str
    limit: float
    best: float


class Infeasible(ValueError):
    """No plan keeps within the limits. `shortfalls` names those in the way: all must be raised if
    each is out of reach by itself, any one of them otherwise. `constraint`, `limit`, `best` and
    `missing` (> 0) are those of the first.
    """

    def __init__(self, message: str, *shortfalls: Shortfall) -> None:
        super().__init__(message)
        self.shortfalls = shortfalls
        self.constraint, self.limit, self.best = shortfalls[0]
        self.missing = self.best - self.limit


def infeasible(resources: Sequence[Resource], effort: Effort) -> Infeasible:
    """Which limits to raise, and by how much: all that are out of reach by themselves, or else, for
    each that can be the only one in the way of the others, the least that the others leave
    possible."""
    # 1. Limits that no plan meets, whatever the others are.
    alone = [
        Shortfall(resource.name, resource.limit, resource.shown(resource.least))
        for resource in resources
        if resource.least > resource.most
    ]
    if alone:
        parts = [
            f"{s.name}: at least {_needed(s.best)} is needed, {_number(s.limit)} allowed"
            for s in alone
        ]
        return Infeasible(f"{'; '.join(parts)}; raise the limit or add other options", *alone)

    # 2. Limits that can be raised alone, to the least that all others leave possible.
    single = []
    for resource in resources:
        others = [other for other in resources if other is not resource]
        picks = best_plan(resource.use, others, effort)
        if picks is not None:
            best = resource.shown(sum_of(resource.use, picks))
            single.append(Shortfall(resource.name, resource.limit, best))
    names = ", ".join(resource.name for resource in resources)
    if single:
        parts = [
            f"{s.name} from {_number(s.limit)} to {_needed(s.best)} "
            f"(by {_needed(s.best - s.limit)})"
            for s in single
        ]
        return Infeasible(
            f"each of {names} can be met, but not all together: raise {' or '.join(parts)}, or "
            "add other options",
            *single,
        )

    # 3. At least two stand in the way.
    unknown = [Shortfall(r.name, r.limit, math.nan) for r in resources]
    return Infeasible(
        f"no plan meets {names} together, nor all of them but one; raise at least two", *unknown
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.10g}"


def _needed(value: float) -> str:
    """Whole numbers in full, others rounded up to six digits, so that a limit can be raised to what
    is printed."""
    if value == int(value):
        return _number(value)
    exact = Decimal(value)
    sixth_digit = Decimal(1).scaleb(exact.adjusted() - 5)
    return f"{exact.quantize(sixth_digit, rounding=ROUND_CEILING).normalize():,f}"
