"""Plans under one limit: the multiple-choice knapsack, exact.

Every group of layers has a ladder of options, weights rising and costs falling, in whole numbers.
One option per group; the total cost is minimised with the total weight within a limit.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from curvprune.planning.highs import Effort, Program, best_in_core, warn_unproven
from curvprune.planning.hulls import Ladder, hull_steps


def knapsack(
    ladders: Sequence[Ladder], limit: int, effort: Effort, incumbent: list[int] | None = None
) -> list[int]:
    """Indices that minimise the total cost with total weight <= limit; the lightest rungs must
    fit.

    Method: the gap between a greedy plan and the linear relaxation rules out most options (Sinha
    and Zoltners 1979, Operations Research 27(3)); what is left, the core, is solved by dynamic
    programming or, where that grows too large, by HiGHS.
    """
    # 1. A greedy plan along the hulls, and the slope of the first step that does not fit.
    picks, slope = _greedy(ladders, limit)
    if slope is None:
        return picks
    if incumbent is not None and cost_of(ladders, incumbent) <= cost_of(ladders, picks):
        picks = incumbent

    # 2. With weights priced at slope = rise / run, no plan can cost less than
    #    sum(min) - slope * limit. Everything is multiplied by run to stay in integers.
    rise, run = slope.numerator, slope.denominator
    reduced: list[list[int]] = []
    for ladder in ladders:
        reduced.append([run * cost + rise * weight for weight, cost in ladder])
    lowest = [min(values) for values in reduced]
    gap = run * cost_of(ladders, picks) - (sum(lowest) - rise * limit)
    if gap == 0:
        return picks

    # 3. The core: an option that costs more than the gap above the least is in no better plan.
    core = []
    for values, low in zip(reduced, lowest, strict=True):
        excess = [value - low for value in values]
        core.append([(index, above) for index, above in enumerate(excess) if above <= gap])

    # 4. The best plan in the core.
    found = _enumerate(ladders, core, _Scope(limit, rise, gap), effort.states)
    if found is not None:
        return found
    answer = best_in_core(
        _program(ladders, limit), core, gap=Fraction(gap, run), incumbent=picks, nodes=effort.nodes
    )
    if answer.failure:
        warn_unproven(
            answer.failure,
            "compare it with frontier(), whose plans next to it bound what a better one could gain",
        )
    return answer.picks or picks


def least_weight(ladders: Sequence[Ladder], picks: list[int], effort: Effort) -> list[int]:
    """Among plans of no higher cost, one of least weight: the same program with the two sides
    exchanged."""
    swapped = [_swapped(ladder) for ladder in ladders]
    most = cost_of(ladders, picks)
    lighter = knapsack(swapped, most, effort, incumbent=reversed_picks(ladders, picks))
    return reversed_picks(ladders, lighter)


def _swapped(ladder: Ladder) -> Ladder:
    return [(cost, weight) for weight, cost in reversed(ladder)]


def _program(ladders: Sequence[Ladder], limit: int) -> Program:
    costs, uses = [], []
    for ladder in ladders:
        costs.append([cost for _, cost in ladder])
        uses.append([(weight,) for weight, _ in ladder])
    return Program(costs=costs, uses=uses, limits=[limit])


def reversed_picks(ladders: Sequence[Sequence[Any]], picks: Sequence[int]) -> list[int]:
    """The same rungs, counted from the other end."""
    return [len(ladder) - 1 - pick for ladder, pick in zip(ladders, picks, strict=True)]


def cost_of(ladders: Sequence[Ladder], picks: Sequence[int]) -> int:
    return sum(ladder[pick][1] for ladder, pick in zip(ladders, picks, strict=True))


def _weight(ladders: Sequence[Ladder], picks: Sequence[int]) -> int:
    return sum(ladder[pick][0] for ladder, pick in zip(ladders, picks, strict=True))


def _greedy(ladders: Sequence[Ladder], limit: int) -> tuple[list[int], Fraction | None]:
    """A plan that fits, and the slope where its linear relaxation stops; None where it is the best
    there is."""
    picks = [0] * len(ladders)
    room = limit - _weight(ladders, picks)
    slope: Fraction | None = None
    for step in hull_steps(ladders):
        ladder = ladders[step.group]
        extra = ladder[step.stop][0] - ladder[step.start][0]
        if picks[step.group] == step.start and extra <= room:
            picks[step.group] = step.stop
            room -= extra
        elif slope is None:
            slope = step.slope
    if slope is None:
        return picks, None

    # What room is left goes to rungs off the hull, group by group.
    for number, ladder in enumerate(ladders):
        weight = ladder[picks[number]][0]
        reach = bisect_right(ladder, weight + room, key=operator.itemgetter(0)) - 1
        room -= ladder[reach][0] - weight
        picks[number] = reach
    return picks, slope


class _Scope(NamedTuple):
    """What a partial plan is judged by: the limit on the weight, its price per unit (`rise`), and
    the most that reduced costs may add up to."""

    limit: int
    rise: int
    gap: int


# A plan of some groups: weight above the lightest, reduced cost, and a linked list of its picks,
# the last first. Plain tuples: there are many.
_Partial = tuple[int, int, Any]


def _enumerate(
    ladders: Sequence[Ladder],
    core: Sequence[Sequence[tuple[int, int]]],
    scope: _Scope,
    most_states: int,
) -> list[int] | None:
    """The best plan in the core, by dynamic programming over undominated partial plans; None if
    they grow too many.

    Exact in integers. Most cores are this small, and the hardest ones for a floating-point solver
    (prices all but proportional to bytes) are.
    """
    # 1. The lightest option of every group. Only groups with several options are free.
    base = [options[0][0] for options in core]
    room = scope.limit - _weight(ladders, base)
    free = [number for number, options in enumerate(core) if len(options) > 1]
    shifts: dict[int, list[tuple[int, int, int]]] = {}
    for number in free:
        lightest = ladders[number][base[number]][0]
        shifts[number] = [
            (ladders[number][index][0] - lightest, excess, index) for index, excess in core[number]
        ]
    still_to_come = sum(shifts[number][-1][0] for number in free)

    # 2. Add one group after the other to the partial plans.
    partial: list[_Partial] = [(0, 0, None)]
    for number in free:
        still_to_come -= shifts[number][-1][0]
        partial = _cheaper_when_heavier(
            _extended(partial, shifts[number], room, still_to_come, scope), scope.rise
        )
        if len(partial) > most_states:
            return None

    # 3. Read the picks of the cheapest one from its last group back to the first.
    path = min(partial, key=lambda plan: plan[1] - scope.rise * plan[0])[2]
    picks = base
    for number in reversed(free):
        picks[number], path = path
    return picks


def _extended(
    partial: Sequence[_Partial],
    shifts: Sequence[tuple[int, int, int]],
    room: int,
    still_to_come: int,
    scope: _Scope,
) -> list[_Partial]:
    """Every partial plan with every option of one more group, where it fits and can still be within
    the gap."""
    grown = []
    for before, spent_before, path in partial:
        for shift, excess, index in shifts:
            weight, spent = before + shift, spent_before + excess
            if weight > room:
                continue
            # Slack that the groups still to come cannot fill is paid for at the slope.
            slack = max(0, room - weight - still_to_come)
            if spent + scope.rise * slack <= scope.gap:
                grown.append((weight, spent, (index, path)))
    return grown


def _cheaper_when_heavier(grown: list[_Partial], rise: int) -> list[_Partial]:
    """The partial plans that no lighter one equals or beats in true cost."""
    kept: list[_Partial] = []
    for plan in sorted(grown, key=lambda plan: plan[:2]):
        # Reduced cost is run * cost + rise * weight, so this compares the true costs.
        if not kept or plan[1] - rise * plan[0] < kept[-1][1] - rise * kept[-1][0]:
            kept.append(plan)
    return kept
