"""Choose one option per layer: the exact integer program under one or several limits, and the
nested frontier.

Everything here works on rows with four attributes, `layer`, `option`, `bytes` and `price`: the
ledger's own rows fit, and so does `Choice`. Options are opaque strings. Layers that must share an
option (`same_option`: groups of layer names, each group offered the same options) are planned as
one, bytes and prices added; plans name each of them.

Arithmetic is exact where it decides anything: bytes are integers and prices are scaled to integers
by a power of two, so a plan either satisfies a limit or does not. Where HiGHS is asked, it only
proposes plans; this file checks them.
"""

from __future__ import annotations

import math
import operator
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import coo_array

_MAX_STATES = 50_000
_MAX_CUTS = 50
_FIRST_CORE = 300  # options beside the best of each layer
_MAX_NODES = 200_000
_FEW_NODES = 2_000  # with several limits each costs more, and the bound is within some 1e-5 by then


@runtime_checkable
class Row(Protocol):
    """What the planner reads of a ledger row: bytes stored, and price in nats, of one option of one
    layer."""

    @property
    def layer(self) -> str: ...
    @property
    def option(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def price(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The smallest `Row`: `option` for `layer` stores `bytes` bytes and is predicted to cost
    `price` nats."""

    layer: str
    option: str
    bytes: int
    price: float


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """Anything else that adds up over the layers and must stay within `most`: bit operations, a
    measured latency.

    The sum of `use` (a finite number for every layer and option of the rows) is divided by `per`
    before it is compared: bits per weight are bits, per the number of weights. Raises ValueError.
    """

    name: str
    most: float
    use: Mapping[tuple[str, str], float]
    per: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.most):
            raise ValueError(f"Limit({self.name!r}): most={self.most!r}, expected a finite number")
        if not (math.isfinite(self.per) and self.per > 0):
            raise ValueError(
                f"Limit({self.name!r}): per={self.per!r}, expected a finite number > 0"
            )
        if strange := next((k for k, v in self.use.items() if not math.isfinite(v)), None):
            raise ValueError(
                f"Limit({self.name!r}): {strange} uses {self.use[strange]!r}, expected a finite "
                "number"
            )

    def used(self, choices: Mapping[str, str]) -> float:
        """How much a plan uses, in the unit of `most`: the correctly rounded quotient."""
        total = sum((Fraction(self.use[pair]) for pair in choices.items()), Fraction(0))
        return float(total / Fraction(self.per))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record: the uses as layer -> option -> number."""
        use: dict[str, dict[str, float]] = {}
        for (layer, option), value in self.use.items():
            use.setdefault(layer, {})[option] = value
        return {"name": self.name, "most": self.most, "use": use, "per": self.per}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Limit:
        """The inverse of `to_dict`."""
        use = {
            (layer, option): v
            for layer, values in record["use"].items()
            for option, v in values.items()
        }
        return cls(name=record["name"], most=record["most"], use=use, per=record.get("per", 1.0))


def cheapest(
    rows: Iterable[Row],
    *,
    max_bytes: int | None = None,
    max_loss: float | None = None,
    fixed_bytes: int = 0,
    limits: Sequence[Limit] = (),
    same_option: Iterable[Collection[str]] = (),
) -> dict[str, str]:
    """The best plan under limits: with `max_loss`, minimise sum(bytes) s.t. sum(price) <= max_loss,
    else minimise sum(price); in both cases s.t. fixed_bytes + sum(bytes) <= max_bytes and sum(use)
    / per <= most for each of `limits`. One option per layer, the same for all layers of a group in
    `same_option`; at least one limit of any kind.

    The price of a plan is the correctly rounded sum (`math.fsum`), and so is its use of a limit, so
    that a number read off `frontier` or `Limit.used` can be met again. Without `limits`, the plan
    among those with an equal objective that uses less of the limited quantity wins; what still ties
    is decided the same way every time, whatever the order of the rows.

    Method: multiple-choice knapsack. Dominated options go first, then every option whose Lagrangian
    reduced cost exceeds the gap between the linear relaxation and a greedy plan (Sinha and Zoltners
    1979, Operations Research 27(3)); what is left is enumerated by dynamic programming in integers
    or, where that grows too large, given to HiGHS (`scipy.optimize.milp`) with zero gap and its
    answer checked in integers. With `limits`, the multipliers are those of HiGHS's linear program,
    and HiGHS solves growing cores (Balas and Zemel 1980, Operations Research 28(5)) until no option
    outside can improve the plan, or up to a number of nodes: then the warning says how much a
    better plan could gain at most. Cost: milliseconds to seconds at 1,000 layers x 20 options.

    Returns layer -> option, in the order the layers first appear. Raises Infeasible when nothing
    fits: it names every limit that is out of reach by itself or, where there is none, for each the
    least that it alone would have to be raised to; and ValueError on malformed rows or groups.
    Warns (RuntimeWarning) when optimality could not be proven.
    """
    if max_bytes is None and max_loss is None and not limits:
        raise ValueError("cheapest() takes at least one limit: max_bytes, max_loss or limits")
    if max_loss is not None and math.isnan(max_loss):
        raise ValueError("cheapest(max_loss=nan): expected a number of nats")
    table, units = _table(rows, same_option)
    if limits:
        chosen = _within_all(table, units, max_bytes, max_loss, fixed_bytes, limits)
    else:
        chosen = _within_one(table, units, max_bytes, max_loss, fixed_bytes)
    return {layer: chosen[unit] for layer, unit in units.items()}


def _within_one(
    table: Mapping[str, Sequence[_Rung]],
    units: Mapping[str, str],
    max_bytes: int | None,
    max_loss: float | None,
    fixed_bytes: int,
) -> dict[str, str]:
    """Unit -> option under a limit on the bytes, on the price or on both: the smallest plan within
    a price either meets the limit on the bytes or none does."""
    names = sorted(table)
    scale = _scale(table)
    ladders = [_undominated(table[name], scale) for name in names]

    def infeasible() -> Infeasible:
        return _Problem(table, units, max_bytes, max_loss, fixed_bytes, ()).infeasible()

    if max_loss is None:
        assert max_bytes is not None
        smallest = fixed_bytes + sum(ladder[0].bytes for ladder in ladders)
        if smallest > max_bytes:
            raise infeasible()
        by_bytes = [[(rung.bytes, rung.price) for rung in ladder] for ladder in ladders]
        picks = _knapsack(by_bytes, math.floor(max_bytes) - fixed_bytes)
        picks = _least_weight(by_bytes, picks)
    else:
        limit = float(max_loss)
        if float(Fraction(sum(ladder[-1].price for ladder in ladders), scale)) > limit:
            raise infeasible()
        by_price = [[(rung.price, rung.bytes) for rung in reversed(ladder)] for ladder in ladders]
        highest = sum(ladder[0].price for ladder in ladders)
        picks = _knapsack(by_price, min(highest, _rounding_limit(limit, scale, highest)))
        picks = _least_weight(by_price, picks)
        picks = [len(ladder) - 1 - pick for ladder, pick in zip(ladders, picks, strict=True)]
        size = fixed_bytes + sum(
            ladder[pick].bytes for ladder, pick in zip(ladders, picks, strict=True)
        )
        if max_bytes is not None and size > max_bytes:
            raise infeasible()
    return {
        name: ladder[pick].option for name, ladder, pick in zip(names, ladders, picks, strict=True)
    }


class _Resource(NamedTuple):
    """What a limit counts, in whole numbers `scale` times as large: of every option of every unit,
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


class _Problem:
    """The options of every unit, and everything that is limited, in whole numbers."""

    def __init__(
        self,
        table: Mapping[str, Sequence[_Rung]],
        units: Mapping[str, str],
        max_bytes: int | None,
        max_loss: float | None,
        fixed_bytes: int,
        limits: Sequence[Limit],
    ) -> None:
        members: dict[str, list[str]] = {}
        for layer, unit in units.items():
            members.setdefault(unit, []).append(layer)
        self.names = sorted(table)
        self.rungs = [sorted(table[name]) for name in self.names]
        scale = _scale(table)
        self.sizes = [[rung.bytes for rung in options] for options in self.rungs]
        self.prices = [[int(rung.price * scale) for rung in options] for options in self.rungs]
        self.resources = [
            _resource(limit, self.rungs, [members[name] for name in self.names]) for limit in limits
        ]
        if max_loss is not None:
            highest = sum(map(max, self.prices))
            most = _rounding_limit(float(max_loss), scale, highest)
            self.resources.append(
                _Resource("max_loss", float(max_loss), most, self.prices, Fraction(scale))
            )
        if max_bytes is not None:
            most = math.floor(max_bytes) - fixed_bytes
            self.resources.append(
                _Resource("max_bytes", max_bytes, most, self.sizes, Fraction(1), fixed_bytes)
            )

    def infeasible(self) -> Infeasible:
        """Which limits to raise, and by how much: all that are out of reach by themselves, or else,
        for each that can be the only one in the way of the others, the least that the others leave
        possible."""
        alone = []
        for resource in self.resources:
            least = sum(map(min, resource.use))
            if least > resource.most:
                alone.append(Shortfall(resource.name, resource.limit, resource.shown(least)))
        if alone:
            parts = [
                f"{s.name}: at least {_needed(s.best)} is needed, {_number(s.limit)} allowed"
                for s in alone
            ]
            return Infeasible(f"{'; '.join(parts)}; raise the limit or add other options", *alone)
        found = []
        for resource in self.resources:
            others = [other for other in self.resources if other is not resource]
            if (picks := _several(resource.use, others)) is not None:
                least = _sum(resource.use, picks)
                found.append(Shortfall(resource.name, resource.limit, resource.shown(least)))
        names = ", ".join(resource.name for resource in self.resources)
        if not found:
            unknown = [Shortfall(r.name, r.limit, math.nan) for r in self.resources]
            return Infeasible(
                f"no plan meets {names} together, nor all of them but one; raise at least two",
                *unknown,
            )
        parts = [
            f"{s.name} from {_number(s.limit)} to {_needed(s.best)} (by {_needed(s.best - s.limit)})"
            for s in found
        ]
        return Infeasible(
            f"each of {names} can be met, but not all together: raise {' or '.join(parts)}, or "
            "add other options",
            *found,
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.10g}"


def _needed(value: float) -> str:
    """Whole numbers in full, others rounded up to six digits, so that a limit can be raised to what
    is printed."""
    if value == int(value):
        return _number(value)
    exact = Decimal(value)
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 5), rounding=ROUND_CEILING).normalize():,f}"


def _within_all(
    table: Mapping[str, Sequence[_Rung]],
    units: Mapping[str, str],
    max_bytes: int | None,
    max_loss: float | None,
    fixed_bytes: int,
    limits: Sequence[Limit],
) -> dict[str, str]:
    """Unit -> option under several limits."""
    problem = _Problem(table, units, max_bytes, max_loss, fixed_bytes, limits)
    # The smallest plan within the other limits keeps within the bytes, or none does.
    resources = [
        r
        for r in problem.resources
        if max_loss is None or r.name != "max_bytes" or r.use is not problem.sizes
    ]
    picks = _several(problem.sizes if max_loss is not None else problem.prices, resources)
    if picks is None or any(
        _sum(resource.use, picks) > resource.most for resource in problem.resources
    ):
        raise problem.infeasible()
    return {
        name: options[pick].option
        for name, options, pick in zip(problem.names, problem.rungs, picks, strict=True)
    }


def _resource(
    limit: Limit, rungs: Sequence[Sequence[_Rung]], layers: Sequence[Sequence[str]]
) -> _Resource:
    try:
        use = [
            [
                sum((Fraction(limit.use[layer, rung.option]) for layer in names), Fraction(0))
                for rung in options
            ]
            for options, names in zip(rungs, layers, strict=True)
        ]
    except KeyError as error:
        layer, option = error.args[0]
        raise ValueError(
            f"Limit({limit.name!r}): no number for layer {layer!r}, option {option!r}"
        ) from None
    scale = Fraction(math.lcm(*(value.denominator for values in use for value in values)))
    whole = [[int(value * scale) for value in values] for values in use]
    scale *= Fraction(limit.per)
    return _Resource(limit.name, limit.most, _rounding_limit(limit.most, scale, 0), whole, scale)


class Point(NamedTuple):
    """A plan on the frontier; unpacks as (bytes, price, choices)."""

    bytes: int
    price: float
    choices: dict[str, str]


def frontier(
    rows: Iterable[Row], *, points: int = 33, same_option: Iterable[Collection[str]] = ()
) -> list[Point]:
    """The nested plans of the Lagrangian relaxation, from the smallest model to the one with the
    lowest predicted loss.

    Each plan minimises sum(price) + lambda * sum(bytes) for some lambda: the lower convex hulls of
    the layers, merged by slope. From one plan to the next (before thinning) one layer, or one group
    of layers that share an option, moves to a larger and cheaper option, so bytes rise strictly,
    the price falls strictly, and no layer ever moves back. At most `points` >= 2 plans, both ends
    kept, evenly spaced in steps. Exact; no integer program. Cost: O(rows log rows). Raises
    ValueError on malformed rows or groups.
    """
    if points < 2:
        raise ValueError(
            f"frontier(points={points}): expected at least 2, the smallest and the largest model"
        )
    table, units = _table(rows, same_option)
    names = sorted(table)
    scale = _scale(table)
    ladders = [_undominated(table[name], scale) for name in names]
    steps = _steps([[(rung.bytes, rung.price) for rung in ladder] for ladder in ladders])
    kept = set(
        np.unique(
            np.linspace(0, len(steps), min(points, len(steps) + 1)).round().astype(int)
        ).tolist()
    )

    picks = [0] * len(ladders)
    size = sum(ladder[0].bytes for ladder in ladders)
    price = sum(ladder[0].price for ladder in ladders)
    path: list[Point] = []
    for number in range(len(steps) + 1):
        if number:
            step = steps[number - 1]
            before, after = ladders[step.layer][step.start], ladders[step.layer][step.stop]
            size, price = size + after.bytes - before.bytes, price + after.price - before.price
            picks[step.layer] = step.stop
        if number in kept:
            chosen = {
                name: ladder[pick].option
                for name, ladder, pick in zip(names, ladders, picks, strict=True)
            }
            path.append(
                Point(
                    size,
                    float(Fraction(price, scale)),
                    {layer: chosen[unit] for layer, unit in units.items()},
                )
            )
    return path


class _Rung(NamedTuple):
    bytes: int
    price: Any  # Fraction in a table, int (price times the scale) in a ladder
    option: str


def _table(
    rows: Iterable[Row], same_option: Iterable[Collection[str]]
) -> tuple[dict[str, list[_Rung]], dict[str, str]]:
    """The rungs of every unit (a layer, or a group of layers under the first of their names), and
    the unit of every layer in the order in which layers first appear."""
    table: dict[str, list[_Rung]] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        price = float(row.price)
        if not math.isfinite(price):
            raise ValueError(
                f"layer {row.layer!r}, option {row.option!r}: price is {price!r}, expected a "
                "finite number of nats; drop this option or price it again"
            )
        try:
            size = operator.index(row.bytes)
        except TypeError:
            size = -1
        if size < 0:
            raise ValueError(
                f"layer {row.layer!r}, option {row.option!r}: bytes is {row.bytes!r}, expected a "
                "whole number >= 0"
            )
        if (row.layer, row.option) in seen:
            raise ValueError(
                f"layer {row.layer!r} lists option {row.option!r} twice; keep one row per layer "
                "and option"
            )
        seen.add((row.layer, row.option))
        table.setdefault(row.layer, []).append(_Rung(size, Fraction(price), row.option))
    if not table:
        raise ValueError("no rows: a plan needs at least one layer with at least one option")
    units = {layer: layer for layer in table}
    groups = [sorted(group) for group in same_option if group]
    for layer, count in Counter(layer for group in groups for layer in group).items():
        if layer not in table:
            raise ValueError(
                f"same_option: layer {layer!r} has no rows; leave it out or price its options"
            )
        if count > 1:
            raise ValueError(
                f"same_option: layer {layer!r} is named {count} times; expected each layer in one "
                "group"
            )
    for group in groups:
        _merge(table, group)
        units.update(dict.fromkeys(group, group[0]))
    return table, units


def _merge(table: dict[str, list[_Rung]], group: Sequence[str]) -> None:
    """Make one unit of a group's layers: bytes and prices of each option added, without
    rounding."""
    unit = group[0]
    totals = {rung.option: rung for rung in table[unit]}
    for layer in group[1:]:
        rungs = {rung.option: rung for rung in table.pop(layer)}
        if strange := sorted(set(rungs) ^ set(totals)):
            raise ValueError(
                f"same_option: layers {unit!r} and {layer!r} are in one group, but only one of "
                f"them is offered {', '.join(strange)}; offer both the same options"
            )
        totals = {
            o: _Rung(t.bytes + rungs[o].bytes, t.price + rungs[o].price, o)
            for o, t in totals.items()
        }
    table[unit] = list(totals.values())


def _scale(table: Mapping[str, Sequence[_Rung]]) -> int:
    # Every float is an integer over a power of two, so the largest denominator is a common one.
    return max(rung.price.as_integer_ratio()[1] for ladder in table.values() for rung in ladder)


def _undominated(rungs: Sequence[_Rung], scale: int) -> list[_Rung]:
    """Rungs with bytes rising and price (as integer) falling; equal rungs keep the first option by
    name."""
    ladder: list[_Rung] = []
    for rung in sorted(rungs):
        numerator, denominator = rung.price.as_integer_ratio()
        price = numerator * (scale // denominator)
        if not ladder or price < ladder[-1].price:
            ladder.append(_Rung(rung.bytes, price, rung.option))
    return ladder


def _rounding_limit(limit: float, scale: Fraction | int, highest: int) -> int:
    """The largest integer price whose correctly rounded value is <= limit."""
    if limit == math.inf:
        return highest
    middle = (Fraction(limit) + Fraction(math.nextafter(limit, math.inf))) / 2
    whole = math.floor(middle * scale)
    return whole if float(whole / Fraction(scale)) <= limit else whole - 1


class _Step(NamedTuple):
    slope: Fraction
    layer: int
    start: int
    stop: int


_Ladder = Sequence[tuple[int, int]]  # (weight rising, cost falling), integers


def _steps(ladders: Sequence[_Ladder]) -> list[_Step]:
    """Steps along the lower convex hull of every ladder, steepest first: cost saved per unit of
    weight."""
    steps = []
    for number, ladder in enumerate(ladders):
        hull: list[int] = []
        for index, (weight, cost) in enumerate(ladder):
            while len(hull) > 1:
                (w0, c0), (w1, c1) = ladder[hull[-2]], ladder[hull[-1]]
                if (c0 - c1) * (weight - w1) > (c1 - cost) * (w1 - w0):
                    break
                hull.pop()
            hull.append(index)
        for start, stop in pairwise(hull):
            (w0, c0), (w1, c1) = ladder[start], ladder[stop]
            steps.append(_Step(Fraction(c0 - c1, w1 - w0), number, start, stop))
    return sorted(steps, key=lambda step: (-step.slope, step.layer, step.start))


def _weight(ladders: Sequence[_Ladder], picks: Sequence[int]) -> int:
    return sum(ladder[pick][0] for ladder, pick in zip(ladders, picks, strict=True))


def _cost(ladders: Sequence[_Ladder], picks: Sequence[int]) -> int:
    return sum(ladder[pick][1] for ladder, pick in zip(ladders, picks, strict=True))


def _least_weight(ladders: Sequence[_Ladder], picks: list[int]) -> list[int]:
    """Among plans of no higher cost, one of least weight: the same program with the two sides
    exchanged."""
    swapped = [[(cost, weight) for weight, cost in reversed(ladder)] for ladder in ladders]
    flipped = [len(ladder) - 1 - pick for ladder, pick in zip(ladders, picks, strict=True)]
    lighter = _knapsack(swapped, _cost(ladders, picks), incumbent=flipped)
    return [len(ladder) - 1 - pick for ladder, pick in zip(ladders, lighter, strict=True)]


def _knapsack(
    ladders: Sequence[_Ladder], limit: int, incumbent: list[int] | None = None
) -> list[int]:
    """Indices that minimise the total cost with total weight <= limit; the lightest rungs must
    fit."""
    steps = _steps(ladders)
    picks = [0] * len(ladders)
    room = limit - _weight(ladders, picks)
    slope: Fraction | None = None
    for step in steps:
        extra = ladders[step.layer][step.stop][0] - ladders[step.layer][step.start][0]
        if picks[step.layer] == step.start and extra <= room:
            picks[step.layer], room = step.stop, room - extra
        elif slope is None:
            slope = step.slope
    if slope is None:
        return picks
    for number, ladder in enumerate(ladders):
        reach = (
            bisect_right(ladder, ladder[picks[number]][0] + room, key=operator.itemgetter(0)) - 1
        )
        room -= ladder[reach][0] - ladder[picks[number]][0]
        picks[number] = reach
    if incumbent is not None and _cost(ladders, incumbent) <= _cost(ladders, picks):
        picks = incumbent

    # With weights priced at slope = rise / run, no plan can cost less than sum(min) - slope *
    # limit. Everything is multiplied by run to stay in integers.
    rise, run = slope.numerator, slope.denominator
    reduced = [[run * cost + rise * weight for weight, cost in ladder] for ladder in ladders]
    lowest = [min(values) for values in reduced]
    gap = run * _cost(ladders, picks) - (sum(lowest) - rise * limit)
    if gap == 0:
        return picks
    core = [
        [(index, value - low) for index, value in enumerate(values) if value - low <= gap]
        for values, low in zip(reduced, lowest, strict=True)
    ]
    enumerated = _enumerate_core(ladders, core, limit, rise, gap)
    if enumerated is not None:
        return enumerated
    costs = [[cost for _, cost in ladder] for ladder in ladders]
    weights = [[(weight,) for weight, _ in ladder] for ladder in ladders]
    found, failure = _solve_core(
        costs, weights, core, [limit], Fraction(gap, run), picks, _MAX_NODES
    )
    if failure:
        _warn_unproven(
            failure,
            "compare it with frontier(), whose plans next to it bound what a better one could gain",
        )
    return found or picks


def _enumerate_core(
    ladders: Sequence[_Ladder],
    core: Sequence[Sequence[tuple[int, int]]],
    limit: int,
    rise: int,
    gap: int,
) -> list[int] | None:
    """The same optimum in integers, by dynamic programming over undominated partial plans; None if
    they grow too many.

    Most cores are this small, and the hardest ones for a floating-point solver (prices all but
    proportional to bytes) are.
    """
    base = [options[0][0] for options in core]
    room = limit - _weight(ladders, base)
    free = [number for number, options in enumerate(core) if len(options) > 1]
    shifts = {
        number: [
            (ladders[number][index][0] - ladders[number][base[number]][0], excess, index)
            for index, excess in core[number]
        ]
        for number in free
    }
    still_to_come = sum(shifts[number][-1][0] for number in free)
    states: list[tuple[int, int, Any]] = [
        (0, 0, None)
    ]  # weight above base, reduced cost, linked list of picks
    for number in free:
        still_to_come -= shifts[number][-1][0]
        grown = sorted(
            (
                (weight + shift, spent + excess, (index, path))
                for weight, spent, path in states
                for shift, excess, index in shifts[number]
                # Slack that the layers still to come cannot fill is paid for at the slope.
                if weight + shift <= room
                and spent + excess + rise * max(0, room - weight - shift - still_to_come) <= gap
            ),
            key=lambda state: state[:2],
        )
        states = []
        for state in grown:
            # Reduced cost is run * cost + rise * weight, so this compares the true costs.
            if not states or state[1] - rise * state[0] < states[-1][1] - rise * states[-1][0]:
                states.append(state)
        if len(states) > _MAX_STATES:
            return None
    path = min(states, key=lambda state: state[1] - rise * state[0])[2]
    picks = base
    for number in reversed(free):
        picks[number], path = path
    return picks


def _several(costs: Sequence[Sequence[int]], resources: Sequence[_Resource]) -> list[int] | None:
    """Indices that minimise the total cost with the total use of every resource within its limit;
    None if there are none."""
    if any(sum(map(min, resource.use)) > resource.most for resource in resources):
        return None
    if not resources:
        return [min(range(len(values)), key=values.__getitem__) for values in costs]
    weights = [
        list(zip(*(resource.use[number] for resource in resources), strict=True))
        for number in range(len(costs))
    ]
    most = [resource.most for resource in resources]
    useful = [_useful(*unit) for unit in zip(costs, weights, strict=True)]
    multipliers = _multipliers(costs, weights, most, useful)
    if multipliers is None:
        return None
    # Whatever the multipliers, no plan costs less than the sum of the least reduced costs minus
    # what the limits are worth. Everything is multiplied by the common denominator to stay in
    # integers.
    common = math.lcm(*(value.denominator for value in multipliers))
    whole = [int(value * common) for value in multipliers]
    reduced = [
        {
            index: common * values[index] + sum(map(operator.mul, whole, uses[index]))
            for index in indices
        }
        for values, uses, indices in zip(costs, weights, useful, strict=True)
    ]
    lowest = [min(values.values()) for values in reduced]
    bound = sum(lowest) - sum(map(operator.mul, whole, most))
    excess = [
        {i: v - low for i, v in values.items()} for values, low in zip(reduced, lowest, strict=True)
    ]
    ranked = sorted(value for values in excess for value in values.values() if value)

    size = _FIRST_CORE
    picks: list[int] | None = None
    while True:
        whole_problem = size >= len(ranked)
        reach = ranked[-1] if whole_problem and ranked else ranked[size] if ranked else 0
        gap: Fraction | None = None
        if picks is not None:
            reach = min(reach, common * _sum(costs, picks) - bound)
            gap = Fraction(common * _sum(costs, picks) - bound, common)
        core = [[(i, v) for i, v in values.items() if v <= reach] for values in excess]
        picks, failure = _solve_core(costs, weights, core, most, gap, picks, _FEW_NODES)
        if failure:
            if picks is None:
                raise RuntimeError(
                    f"no plan within the limits was found, nor shown that there is none ({failure})"
                )
            most_gain = Fraction(
                common * _sum(costs, picks) - bound, common * max(1, abs(_sum(costs, picks)))
            )
            _warn_unproven(
                failure,
                f"a better one could gain at most {float(most_gain):.2g} of its bytes or loss",
            )
            return picks
        # An option outside the core costs more than `reach` above the bound, whatever the rest
        # does.
        if picks is not None and common * _sum(costs, picks) - bound <= reach:
            return picks
        if whole_problem:
            return picks
        size = len(ranked) if picks is not None else 4 * size


def _sum(values: Sequence[Sequence[int]], picks: Sequence[int]) -> int:
    return sum(options[pick] for options, pick in zip(values, picks, strict=True))


def _useful(costs: Sequence[int], weights: Sequence[tuple[int, ...]]) -> list[int]:
    """The options that no other one beats or equals in the cost and in every weight, the first of
    equal ones."""
    kept: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], weights[i], i)):
        if not any(all(map(operator.le, weights[other], weights[index])) for other in kept):
            kept.append(index)
    return kept


def _multipliers(
    costs: Sequence[Sequence[int]],
    weights: Sequence[Sequence[tuple[int, ...]]],
    most: Sequence[int],
    useful: Sequence[Sequence[int]],
) -> list[Fraction] | None:
    """What a unit of each limited quantity is worth, from the linear relaxation; None if even that
    has no solution."""
    entries = [(number, index) for number, indices in enumerate(useful) for index in indices]
    least = [
        min(costs[number][index] for index in indices) for number, indices in enumerate(useful)
    ]
    values = [[costs[number][index] - least[number] for number, index in entries]]
    room = []
    for k, limit in enumerate(most):
        least = [
            min(weights[number][index][k] for index in indices)
            for number, indices in enumerate(useful)
        ]
        values.append([weights[number][index][k] - least[number] for number, index in entries])
        room.append(limit - sum(least))
    units = [max(1, *row) for row in values]
    cost, *uses = [
        [float(Fraction(v, unit)) for v in row] for row, unit in zip(values, units, strict=True)
    ]
    rows = [number for number, _ in entries]
    one_each = coo_array(
        (np.ones(len(entries)), (rows, np.arange(len(entries)))), shape=(len(useful), len(entries))
    )
    answer = linprog(
        cost,
        A_ub=np.array(uses),
        b_ub=[float(Fraction(r, unit)) for r, unit in zip(room, units[1:], strict=True)],
        A_eq=one_each.tocsr(),
        b_eq=np.ones(len(useful)),
        method="highs",
    )
    if answer.status == 2:
        return None
    marginals = answer.ineqlin.marginals if answer.status == 0 else np.zeros(len(most))
    return [
        Fraction(max(0.0, -float(marginal))) * units[0] / unit
        for marginal, unit in zip(marginals, units[1:], strict=True)
    ]


def _solve_core(
    costs: Sequence[Sequence[int]],
    weights: Sequence[Sequence[tuple[int, ...]]],
    core: Sequence[Sequence[tuple[int, int]]],
    limits: Sequence[int],
    gap: Fraction | None,
    picks: list[int] | None,
    nodes: int,
) -> tuple[list[int] | None, str]:
    """Minimise the cost over the options in `core` (index, reduced cost) with HiGHS; `picks` is a
    feasible plan, `gap` above the bound. Returns the best plan found, None if there is none, and
    why it may not be the best one, if so.

    HiGHS's tolerances are absolute, 1e-6 on rows and on the objective. The gap, not the whole cost,
    is the unit of the objective; weights are multiples of their common divisor, and no larger than
    1e6: where the last bits of a row's sum in float64 come near the tolerance, HiGHS drops plans
    that fit and says nothing. A plan that does not fit, which it may let through, is found here, in
    whole numbers, and forbidden.
    """
    base = [min(options, key=lambda option: option[1])[0] for options in core]
    entries = [
        (number, index)
        for number, options in enumerate(core)
        for index, _ in options
        if index != base[number]
    ]
    rooms = [
        limit - sum(unit[pick][k] for unit, pick in zip(weights, base, strict=True))
        for k, limit in enumerate(limits)
    ]
    if not entries:
        return (base if picks is None and min(rooms) >= 0 else picks), ""
    savings = [costs[number][index] - costs[number][base[number]] for number, index in entries]
    finest = Fraction(10**9, max(1, *map(abs, savings)))
    if gap:
        finest = min(Fraction(10_000) / gap, finest)
    count = len(entries)
    layers = {
        number: row for row, number in enumerate(dict.fromkeys(number for number, _ in entries))
    }
    one_each = coo_array(
        (np.ones(count), ([layers[number] for number, _ in entries], np.arange(count))),
        shape=(len(layers), count),
    )
    constraints = []
    for k, room in enumerate(rooms):
        shifts = [
            weights[number][index][k] - weights[number][base[number]][k]
            for number, index in entries
        ]
        divisor = math.gcd(*shifts) or 1
        coarsest = max(Fraction(1), Fraction(max(map(abs, shifts)), divisor * 10**6))
        row = np.array([float(shift // divisor / coarsest) for shift in shifts])
        constraints.append(
            LinearConstraint(row[None, :], -np.inf, float(room // divisor / coarsest))
        )
    constraints.append(LinearConstraint(one_each.tocsr(), -np.inf, 1.0))
    column = {entry: place for place, entry in enumerate(entries)}
    failure = "HiGHS's tolerances let too many plans through that exceed the limit"
    for _ in range(_MAX_CUTS):
        for presolve in (
            True,
            False,
        ):  # with nothing between a limit and the least use, presolving can end in an error
            answer = milp(
                np.array([float(saving * finest) for saving in savings]),
                integrality=np.ones(count),
                bounds=(np.zeros(count), np.ones(count)),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "node_limit": nodes, "presolve": presolve},
            )
            if answer.status != 4 or answer.x is not None:
                break
        found = list(base)
        if answer.x is not None:
            for (number, index), place in column.items():
                if answer.x[place] > 0.5:
                    found[number] = index
            if all(
                sum(unit[pick][k] for unit, pick in zip(weights, found, strict=True)) <= limit
                for k, limit in enumerate(limits)
            ):
                if picks is None or _sum(costs, found) < _sum(costs, picks):
                    picks = found
                if answer.status == 0:
                    return picks, ""
        if answer.status == 2 and picks is None:
            return None, ""
        if answer.status != 0:
            failure = f"HiGHS stopped early: {answer.message}"
            break
        # The proposal exceeds a limit by less than HiGHS can see: forbid exactly this plan and ask
        # again.
        signs = np.full(count, -1.0)
        chosen = [
            column[number, index] for number, index in enumerate(found) if index != base[number]
        ]
        signs[chosen] = 1.0
        constraints.append(LinearConstraint(signs[None, :], -np.inf, len(chosen) - 1.0))
    return picks, failure


def _warn_unproven(failure: str, remedy: str) -> None:
    warnings.warn(
        f"the plan satisfies its limit but is not proven to be the best one ({failure}); {remedy}",
        RuntimeWarning,
        stacklevel=5,
    )
