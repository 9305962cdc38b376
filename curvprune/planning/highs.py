"""The integer program of a few options per group, by HiGHS.

HiGHS works in floating point, so it only proposes plans: they are checked here in whole numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

_MAX_CUTS = 50
_OPTIMAL, _INFEASIBLE, _OTHER_ERROR = 0, 2, 4  # status of scipy.optimize.milp

Core = Sequence[Sequence[tuple[int, int]]]  # of every group: index of an option, reduced cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How far the exact planner goes before it changes its method or settles for a plan.

    Attributes:
        states: partial plans up to which a core is enumerated, under one limit; with more, HiGHS
            solves it.
        core: options, beside the best of each group, of the first core under several limits.
        nodes: of HiGHS's search tree, under one limit.
        nodes_of_several: the same under several limits. There each costs more, and the bound is
            within some 1e-5 by then.
    """

    states: int = 50_000
    core: int = 300
    nodes: int = 200_000
    nodes_of_several: int = 2_000


DEFAULT_EFFORT = Effort()


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Choose one option per group: the least total cost with every total use within its limit.

    Attributes:
        costs: of every option of every group.
        uses: of every option of every group, one for each limit.
        limits: the most of each.
    """

    costs: Sequence[Sequence[int]]
    uses: Sequence[Sequence[tuple[int, ...]]]
    limits: Sequence[int]

    def cost(self, picks: Sequence[int]) -> int:
        return sum_of(self.costs, picks)

    def uses_of(self, k: int) -> list[list[int]]:
        """How much of one limit every option of every group uses."""
        found = []
        for uses in self.uses:
            found.append([use[k] for use in uses])
        return found

    def rooms(self, picks: Sequence[int]) -> list[int]:
        """What a plan leaves of every limit."""
        left = list(self.limits)
        for uses, pick in zip(self.uses, picks, strict=True):
            for k, use in enumerate(uses[pick]):
                left[k] -= use
        return left

    def fits(self, picks: Sequence[int]) -> bool:
        return min(self.rooms(picks)) >= 0


class Answer(NamedTuple):
    """The best plan found, None if there is none; and why it may not be the best one, if so."""

    picks: list[int] | None
    failure: str = ""


def sum_of(values: Sequence[Sequence[int]], picks: Sequence[int]) -> int:
    return sum(options[pick] for options, pick in zip(values, picks, strict=True))


def best_in_core(
    program: Program, core: Core, *, gap: Fraction | None, incumbent: list[int] | None, nodes: int
) -> Answer:
    """Minimise the cost over the options in `core`. `incumbent` is a plan that fits, `gap` its cost
    above the bound."""
    # 1. A 0/1 variable for every option but the one of least reduced cost in its group.
    base = [min(options, key=lambda option: option[1])[0] for options in core]
    columns: list[tuple[int, int]] = []
    for number, options in enumerate(core):
        columns += [(number, index) for index, _ in options if index != base[number]]
    if not columns:
        return Answer(base if incumbent is None and program.fits(base) else incumbent)

    # 2. What they save, a row for every limit, and at most one of them in each group.
    objective = _objective(program, base, columns, gap)
    constraints = [*_limit_rows(program, base, columns), _one_each(columns)]

    # 3. Ask HiGHS. A plan that exceeds a limit by less than HiGHS can see is forbidden, and it is
    #    asked again.
    best = incumbent
    for _ in range(_MAX_CUTS):
        answer = _ask(objective, constraints, nodes)
        proposal = _read(answer.x, base, columns)
        if answer.x is not None and program.fits(proposal):
            if best is None or program.cost(proposal) < program.cost(best):
                best = proposal
            if answer.status == _OPTIMAL:
                return Answer(best)
        if answer.status == _INFEASIBLE and best is None:
            return Answer(None)
        if answer.status != _OPTIMAL:
            return Answer(best, f"HiGHS stopped early: {answer.message}")
        constraints.append(_forbid(proposal, columns))
    return Answer(best, "HiGHS's tolerances let too many plans through that exceed the limit")


def _objective(
    program: Program, base: Sequence[int], columns: Sequence[tuple[int, int]], gap: Fraction | None
) -> np.ndarray:
    """What every variable adds to the cost. HiGHS's tolerance on it is absolute, 1e-6, so the gap,
    not the whole cost, is its unit."""
    added = [
        program.costs[number][index] - program.costs[number][base[number]]
        for number, index in columns
    ]
    # No coefficient above 1e9; with a gap, one of at most 1e4.
    finest = Fraction(10**9, max(1, *map(abs, added)))
    if gap:
        finest = min(Fraction(10_000) / gap, finest)
    return np.array([float(value * finest) for value in added])


def _limit_rows(
    program: Program, base: Sequence[int], columns: Sequence[tuple[int, int]]
) -> list[LinearConstraint]:
    """What every variable adds to each limited use, at most the room that the base leaves.

    In multiples of the common divisor, and no larger than 1e6: where the last bits of a row's sum
    in float64 come near the tolerance of 1e-6, HiGHS drops plans that fit and says nothing.
    """
    rows = []
    for k, room in enumerate(program.rooms(base)):
        added = [
            program.uses[number][index][k] - program.uses[number][base[number]][k]
            for number, index in columns
        ]
        # Dividing by a common divisor loses nothing; what is coarser than that is rounded.
        divisor = math.gcd(*added) or 1
        coarsest = max(Fraction(1), Fraction(max(map(abs, added)), divisor * 10**6))
        row = np.array([float(value // divisor / coarsest) for value in added])
        rows.append(LinearConstraint(row[None, :], -np.inf, float(room // divisor / coarsest)))
    return rows


def _one_each(columns: Sequence[tuple[int, int]]) -> LinearConstraint:
    # Groups in which nothing is left to choose have no row.
    groups = dict.fromkeys(number for number, _ in columns)
    row_of = {number: row for row, number in enumerate(groups)}
    rows = [row_of[number] for number, _ in columns]
    matrix = coo_array(
        (np.ones(len(columns)), (rows, np.arange(len(columns)))), shape=(len(groups), len(columns))
    )
    return LinearConstraint(matrix.tocsr(), -np.inf, 1.0)


def _forbid(proposal: Sequence[int], columns: Sequence[tuple[int, int]]) -> LinearConstraint:
    """Exactly this plan is not allowed."""
    chosen = [place for place, (number, index) in enumerate(columns) if proposal[number] == index]
    signs = np.full(len(columns), -1.0)
    signs[chosen] = 1.0
    return LinearConstraint(signs[None, :], -np.inf, len(chosen) - 1.0)


def _read(
    x: np.ndarray | None, base: Sequence[int], columns: Sequence[tuple[int, int]]
) -> list[int]:
    """The plan that the variables stand for."""
    picks = list(base)
    if x is not None:
        for place, (number, index) in enumerate(columns):
            # Whole numbers but for a tolerance.
            if x[place] > 0.5:
                picks[number] = index
    return picks


def _ask(objective: np.ndarray, constraints: Sequence[LinearConstraint], nodes: int) -> Any:
    # With nothing between a limit and the least use, presolving can end in an error.
    for presolve in (True, False):
        answer = milp(
            objective,
            integrality=np.ones(len(objective)),
            bounds=(np.zeros(len(objective)), np.ones(len(objective))),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "node_limit": nodes, "presolve": presolve},
        )
        if answer.status != _OTHER_ERROR or answer.x is not None:
            break
    return answer


def warn_unproven(failure: str, remedy: str) -> None:
    """Called three functions below `cheapest`, whose caller the warning shows."""
    warnings.warn(
        f"the plan satisfies its limit but is not proven to be the best one ({failure}); {remedy}",
        RuntimeWarning,
        stacklevel=5,
    )
