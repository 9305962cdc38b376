"""Plans under several limits at once: Lagrangian bounds, and integer programs of growing cores."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from curvprune.planning.highs import (
    Core,
    Effort,
    Program,
    best_in_core,
    warn_unproven,
)


class Resource(NamedTuple):
    """What a limit counts, in whole numbers `scale` times as large: of every option of every group,
    and at most. `offset` counts besides, `limit` is what was asked."""

    name: str
    limit: float
    most: int
    use: list[list[int]]
    scale: Fraction
    offset: int = 0

    def shown(self, whole: int) -> float:
        """A whole number of the resource in the unit of its limit."""
        return float(whole / self.scale) + self.offset

    @property
    def least(self) -> int:
        """The least that any plan uses."""
        return sum(map(min, self.use))


def best_plan(
    costs: Sequence[Sequence[int]], resources: Sequence[Resource], effort: Effort
) -> list[int] | None:
    """Indices that minimise the total cost with the total use of every resource within its limit;
    None if there are none.

    Warns (RuntimeWarning) where it is not proven that no plan is better. Raises RuntimeError where
    HiGHS gave up before it found any.
    """
    # 1. A limit that is out of reach by itself, or no limit at all.
    if any(resource.least > resource.most for resource in resources):
        return None
    if not resources:
        return [values.index(min(values)) for values in costs]

    # 2. A lower bound on the cost, and how far above it every useful option is.
    program = _program(costs, resources)
    useful = [_useful(*group) for group in zip(program.costs, program.uses, strict=True)]
    multipliers = _multipliers(program, useful)
    if multipliers is None:
        return None
    bound = _bound(program, useful, multipliers)
    ranked = bound.ranked()

    # 3. Solve growing cores, until no option outside can improve the plan.
    size = effort.core
    picks: list[int] | None = None
    while True:
        whole_problem = size >= len(ranked)
        reach = ranked[min(size, len(ranked) - 1)] if ranked else 0
        gap = None
        if picks is not None:
            above = bound.above(program.cost(picks))
            reach = min(reach, above)
            gap = Fraction(above, bound.scale)
        picks, failure = best_in_core(
            program,
            _core(bound, reach),
            gap=gap,
            incumbent=picks,
            nodes=effort.nodes_of_several,
        )
        if failure:
            if picks is None:
                raise RuntimeError(
                    f"no plan within the limits was found, nor shown that there is none ({failure})"
                )
            most_gain = bound.most_gain(program.cost(picks))
            warn_unproven(
                failure, f"a better one could gain at most {most_gain:.2g} of its bytes or loss"
            )
            return picks
        # An option outside the core costs more than `reach` above the bound, whatever the rest
        # does.
        if picks is not None and bound.above(program.cost(picks)) <= reach:
            return picks
        if whole_problem:
            return picks
        size = len(ranked) if picks is not None else 4 * size


def _program(costs: Sequence[Sequence[int]], resources: Sequence[Resource]) -> Program:
    uses = []
    for number in range(len(costs)):
        of_limits = [resource.use[number] for resource in resources]
        uses.append(list(zip(*of_limits, strict=True)))
    return Program(costs=costs, uses=uses, limits=[resource.most for resource in resources])


def _useful(costs: Sequence[int], uses: Sequence[tuple[int, ...]]) -> list[int]:
    """The options of a group that no other one beats or equals in the cost and in every use, the
    first of equal ones."""
    # In order of the cost, an option can only be beaten by one that was there before it.
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], uses[i], i)):
        if not any(all(map(operator.le, uses[other], uses[index])) for other in kept):
            kept.append(index)
    return kept


class _Bound(NamedTuple):
    """A lower bound on the cost of all plans: `lowest` / `scale`. `excess` is how far the reduced
    cost of every useful option is above the least of its group, times `scale`."""

    lowest: int
    scale: int
    excess: list[dict[int, int]]

    def above(self, cost: int) -> int:
        """How far a cost is above the bound, times `scale`."""
        return self.scale * cost - self.lowest

    def ranked(self) -> list[int]:
        """The excess of all options but the best of each group, ascending."""
        found: list[int] = []
        for values in self.excess:
            found += [value for value in values.values() if value]
        return sorted(found)

    def most_gain(self, cost: int) -> float:
        """The share of a cost that a better plan could save at most."""
        return float(Fraction(self.above(cost), self.scale * max(1, abs(cost))))


def _bound(
    program: Program, useful: Sequence[Sequence[int]], multipliers: Sequence[Fraction]
) -> _Bound:
    """Whatever the multipliers, no plan costs less than the sum of the least reduced costs minus
    what the limits are worth. Everything is multiplied by the common denominator to stay in
    integers."""
    scale = math.lcm(*(value.denominator for value in multipliers))
    whole = [int(value * scale) for value in multipliers]
    lowest = 0
    excess = []
    for costs, uses, indices in zip(program.costs, program.uses, useful, strict=True):
        reduced = {i: scale * costs[i] + _product(whole, uses[i]) for i in indices}
        low = min(reduced.values())
        lowest += low
        excess.append({index: value - low for index, value in reduced.items()})
    return _Bound(lowest - _product(whole, program.limits), scale, excess)


def _product(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(map(operator.mul, one, other))


def _core(bound: _Bound, reach: int) -> Core:
    """The options whose reduced cost is at most `reach` above the least of their group."""
    core = []
    for values in bound.excess:
        core.append([(index, value) for index, value in values.items() if value <= reach])
    return core


def _multipliers(program: Program, useful: Sequence[Sequence[int]]) -> list[Fraction] | None:
    """What a unit of each limited quantity is worth, from the linear relaxation; None if even that
    has no solution."""
    # 1. Costs and uses of every useful option above the least of its group, and what is left.
    entries: list[tuple[int, int]] = []
    for number, indices in enumerate(useful):
        entries += [(number, index) for index in indices]
    costs, _ = _above_least(program.costs, useful)
    uses, rooms = [], []
    for k, limit in enumerate(program.limits):
        above, least = _above_least(program.uses_of(k), useful)
        uses.append(above)
        rooms.append(limit - least)

    # 2. Each row in units of its largest number, for floating point.
    cost_unit = max(1, *costs)
    use_units = [max(1, *row) for row in uses]
    limited = list(zip(uses, rooms, use_units, strict=True))
    groups = [number for number, _ in entries]
    one_each = coo_array(
        (np.ones(len(entries)), (groups, np.arange(len(entries)))),
        shape=(len(useful), len(entries)),
    )
    answer = linprog(
        _in_units(costs, cost_unit),
        A_ub=np.array([_in_units(row, unit) for row, _, unit in limited]),
        b_ub=[float(Fraction(room, unit)) for _, room, unit in limited],
        A_eq=one_each.tocsr(),
        b_eq=np.ones(len(useful)),
        method="highs",
    )

    # 3. The marginals of the limits, back in whole numbers. Zeros are multipliers too.
    if answer.status == 2:
        return None
    marginals = answer.ineqlin.marginals if answer.status == 0 else np.zeros(len(uses))
    return [
        Fraction(max(0.0, -float(marginal))) * cost_unit / unit
        for marginal, unit in zip(marginals, use_units, strict=True)
    ]


def _above_least(
    values: Sequence[Sequence[int]], useful: Sequence[Sequence[int]]
) -> tuple[list[int], int]:
    """Every useful option's number above the least of its group, and the sum of those."""
    above: list[int] = []
    total = 0
    for options, indices in zip(values, useful, strict=True):
        least = min(options[index] for index in indices)
        above += [options[index] - least for index in indices]
        total += least
    return above, total


def _in_units(values: Sequence[int], unit: int) -> list[float]:
    return [float(Fraction(value, unit)) for value in values]
