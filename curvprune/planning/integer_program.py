"""Where the plan is chosen: one option per layer, by an exact integer program under one or several
limits.

Everything here works on rows with four attributes, `layer`, `option`, `bytes` and `price`
(`Priced`): the ledger's own rows fit, and so does `Choice`. Layers that must share an option
(`Within.same_option`) are planned as one group, bytes and prices added; plans name each of them.

Arithmetic is exact where it decides anything: bytes are integers and prices are scaled to integers
by a power of two, so a plan either satisfies a limit or does not. Where HiGHS is asked, it only
proposes plans, which are checked in whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from curvprune.planning.budget import UNLIMITED, Limit, Within
from curvprune.planning.highs import DEFAULT_EFFORT, Effort, sum_of
from curvprune.planning.infeasible import Infeasible, infeasible
from curvprune.planning.one_limit import knapsack, least_weight, reversed_picks
from curvprune.planning.priced import (
    Offer,
    Priced,
    Table,
    bytes_by_price,
    prices_by_bytes,
    table_of,
)
from curvprune.planning.several_limits import Resource, best_plan


def cheapest(
    rows: Iterable[Priced],
    within: Within = UNLIMITED,
    *,
    max_loss: float | None = None,
    effort: Effort = DEFAULT_EFFORT,
) -> dict[str, str]:
    """The best plan within limits: the smallest with a price of at most `max_loss`, or without
    that the one with the least price.

    With `max_loss`: minimise sum(bytes) s.t. sum(price) <= max_loss; else minimise sum(price). In
    both cases s.t. fixed_bytes + sum(bytes) <= max_bytes and sum(use) / per <= most for each of
    `within.limits`. One option per layer, the same for all layers of a group in
    `within.same_option`; at least one limit of any kind.

    The price of a plan is the correctly rounded sum (`math.fsum`), and so is its use of a limit, so
    that a number read off `frontier` or `Limit.used` can be met again. Without `within.limits`, the
    plan among those with an equal objective that uses less of the limited quantity wins; what still
    ties is decided the same way every time, whatever the order of the rows.

    Method: multiple-choice knapsack. Dominated options go first, then every option whose Lagrangian
    reduced cost exceeds the gap between the linear relaxation and a greedy plan (Sinha and Zoltners
    1979, Operations Research 27(3)). What is left is enumerated by dynamic programming in integers
    or, where that grows too large, given to HiGHS (`scipy.optimize.milp`) with zero gap and its
    answer checked in integers.

    With `within.limits`, the multipliers are those of HiGHS's linear program, and HiGHS solves
    growing cores (Balas and Zemel 1980, Operations Research 28(5)) until no option outside can
    improve the plan, or up to a number of nodes: then the warning says how much a better plan could
    gain at most. Cost: milliseconds to seconds at 1,000 layers x 20 options.

    Returns layer -> option, in the order the layers first appear.

    Raises:
        Infeasible: nothing fits. It names every limit that is out of reach by itself or, where
            there is none, for each the least that it alone would have to be raised to.
        ValueError: malformed rows or groups, or no limit.

    Warns (RuntimeWarning) when optimality could not be proven.
    """
    if within.max_bytes is None and max_loss is None and not within.limits:
        raise ValueError("cheapest() takes at least one limit: max_bytes, max_loss or limits")
    if max_loss is not None and math.isnan(max_loss):
        raise ValueError("cheapest(max_loss=nan): expected a number of nats")
    problem = _Problem(table_of(rows, within.same_option), within, max_loss, effort)
    options = _within_several(problem) if within.limits else _within_one(problem)
    return problem.table.plan(options)


@dataclass(frozen=True, slots=True)
class _Problem:
    """What every group is offered, and everything that is limited."""

    table: Table
    within: Within
    max_loss: float | None
    effort: Effort


def _within_one(problem: _Problem) -> list[str]:
    """An option for every group under a limit on the bytes, on the price or on both."""
    ladders, within, effort = problem.table.ladders(), problem.within, problem.effort
    if problem.max_loss is None:
        # The least price within the bytes, and of plans that cost the same the smallest.
        assert within.max_bytes is not None
        smallest = within.fixed_bytes + sum(ladder[0].bytes for ladder in ladders)
        if smallest > within.max_bytes:
            raise _infeasible(problem)
        by_bytes = [prices_by_bytes(ladder) for ladder in ladders]
        picks = knapsack(by_bytes, math.floor(within.max_bytes) - within.fixed_bytes, effort)
        picks = least_weight(by_bytes, picks, effort)
    else:
        # The fewest bytes within the price, and of plans of the same size the cheapest.
        limit, scale = float(problem.max_loss), problem.table.scale
        lowest = sum(ladder[-1].price for ladder in ladders)
        highest = sum(ladder[0].price for ladder in ladders)
        if float(Fraction(lowest, scale)) > limit:
            raise _infeasible(problem)
        by_price = [bytes_by_price(ladder) for ladder in ladders]
        most = min(highest, _rounding_limit(limit, scale, highest))
        picks = knapsack(by_price, most, effort)
        picks = reversed_picks(ladders, least_weight(by_price, picks, effort))
    # The smallest plan within a price meets the limit on the bytes, or none does.
    chosen = [ladder[pick] for ladder, pick in zip(ladders, picks, strict=True)]
    size = within.fixed_bytes + sum(rung.bytes for rung in chosen)
    if within.max_bytes is not None and size > within.max_bytes:
        raise _infeasible(problem)
    return [rung.option for rung in chosen]


def _within_several(problem: _Problem) -> list[str]:
    """An option for every group under several limits."""
    numbers = _whole_numbers(problem)
    if problem.max_loss is None:
        costs, resources = numbers.prices, numbers.resources
    else:
        # The smallest plan within the other limits keeps within the bytes, or none does.
        costs = numbers.sizes
        resources = [r for r in numbers.resources if r.use is not numbers.sizes]
    picks = best_plan(costs, resources, problem.effort)
    if picks is None or any(sum_of(r.use, picks) > r.most for r in numbers.resources):
        raise _infeasible(problem)
    return [offers[pick].option for offers, pick in zip(numbers.offers, picks, strict=True)]


def _infeasible(problem: _Problem) -> Infeasible:
    return infeasible(_whole_numbers(problem).resources, problem.effort)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Numbers:
    """The offers of every group, their bytes and prices in whole numbers, and all that is
    limited."""

    offers: list[list[Offer]]
    sizes: list[list[int]]
    prices: list[list[int]]
    resources: list[Resource]


def _whole_numbers(problem: _Problem) -> _Numbers:
    within, scale = problem.within, problem.table.scale
    offers = [sorted(of_group) for of_group in problem.table.offers.values()]
    sizes, prices = [], []
    for of_group in offers:
        sizes.append([offer.bytes for offer in of_group])
        prices.append([int(offer.price * scale) for offer in of_group])
    resources = [_resource(limit, offers, problem.table.members()) for limit in within.limits]
    if problem.max_loss is not None:
        limit, highest = float(problem.max_loss), sum(map(max, prices))
        most = _rounding_limit(limit, scale, highest)
        resources.append(Resource("max_loss", limit, most, prices, Fraction(scale)))
    if within.max_bytes is not None:
        most = math.floor(within.max_bytes) - within.fixed_bytes
        resources.append(
            Resource("max_bytes", within.max_bytes, most, sizes, Fraction(1), within.fixed_bytes)
        )
    return _Numbers(offers=offers, sizes=sizes, prices=prices, resources=resources)


def _resource(
    limit: Limit, offers: Sequence[Sequence[Offer]], members: Sequence[Sequence[str]]
) -> Resource:
    """A limit's uses, added over the layers of each group, as whole numbers."""
    use: list[list[Fraction]] = []
    for of_group, layers in zip(offers, members, strict=True):
        use.append([_used(limit, layers, offer.option) for offer in of_group])
    # Floats are fractions, so a common denominator makes whole numbers of them without rounding.
    common = 1
    for values in use:
        common = math.lcm(common, *(value.denominator for value in values))
    whole = []
    for values in use:
        whole.append([int(value * common) for value in values])
    scale = common * Fraction(limit.per)
    return Resource(limit.name, limit.most, _rounding_limit(limit.most, scale, 0), whole, scale)


def _used(limit: Limit, layers: Sequence[str], option: str) -> Fraction:
    total = Fraction(0)
    for layer in layers:
        if (layer, option) not in limit.use:
            raise ValueError(
                f"Limit({limit.name!r}): no number for layer {layer!r}, option {option!r}"
            )
        total += Fraction(limit.use[layer, option])
    return total


def _rounding_limit(limit: float, scale: Fraction | int, highest: int) -> int:
    """The largest integer price whose correctly rounded value is <= limit."""
    if limit == math.inf:
        return highest
    # Whatever is nearer to the limit than to the next float is rounded to it; the middle itself may
    # be rounded up.
    middle = (Fraction(limit) + Fraction(math.nextafter(limit, math.inf))) / 2
    whole = math.floor(middle * scale)
    return whole if float(whole / Fraction(scale)) <= limit else whole - 1
