"""The cheapest widths within a limit on the work, where the work may be a product of widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from curvprune.planning import Choice, Within, cheapest
from curvprune.structured.cuts import BLOCKS, Cut

Cost = Callable[[Mapping[str, int]], float]  # units left of each cut → what is left of the work

_RESOLUTION = 1_000_000  # steps that the whole work is divided into for the knapsack
_ROUNDS = 60  # solutions that are looked at

# Mover → the number of the width that it has.
_Picks = dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What there is to choose from.

    Attributes:
        cuts: the cuts.
        widths: cut → widths on offer, from all units downwards.
        prices: cut → predicted rise of the loss at each of these widths.
        uniform: one width for all cuts of a kind.
    """

    cuts: Mapping[str, Cut]
    widths: Mapping[str, list[int]]
    prices: Mapping[str, Sequence[float]]
    uniform: bool


class _Problem:
    """An offer and a limit in terms of *movers*: the cuts that have one width go together."""

    def __init__(self, offer: Offer, cost: Cost, limit: float) -> None:
        self.widths, self.cost, self.limit = offer.widths, cost, limit
        self.movers: dict[str, list[str]] = {}
        for name, cut in offer.cuts.items():
            together = offer.uniform and cut.kind != BLOCKS
            self.movers.setdefault(cut.kind if together else name, []).append(name)
        self.prices: dict[str, list[float]] = {}
        for mover, names in self.movers.items():
            self.prices[mover] = []
            for k in range(len(offer.widths[names[0]])):
                self.prices[mover].append(math.fsum(offer.prices[n][k] for n in names))

    def all_at(self, largest: bool) -> _Picks:
        if largest:
            return dict.fromkeys(self.movers, 0)
        return {mover: len(self.prices[mover]) - 1 for mover in self.movers}

    def left(self, picks: Mapping[str, int]) -> dict[str, int]:
        """Cut → units left."""
        found = {}
        for mover, names in self.movers.items():
            for name in names:
                found[name] = self.widths[name][picks[mover]]
        return found

    def work(self, picks: Mapping[str, int]) -> float:
        return self.cost(self.left(picks))

    def fits(self, picks: Mapping[str, int]) -> bool:
        return self.work(picks) <= self.limit

    def price(self, picks: Mapping[str, int]) -> float:
        return math.fsum(self.prices[mover][k] for mover, k in picks.items())


def cheapest_widths(offer: Offer, cost: Cost, limit: float) -> dict[str, int]:
    """The widths with the least summed price whose work is at most ``limit``: cut → units left.

    The work of a layer between two cuts is a product of their widths. So `planning.cheapest` is
    solved on the work as it changes with one cut at a time around the last solution, until that
    repeats itself. Of the solutions that are within the true limit the cheapest is taken, and cuts
    are widened again where there is room.
    """
    problem = _Problem(offer, cost, limit)
    # 1. Begin with the whole model.
    picks = problem.all_at(largest=True)
    whole = problem.work(picks)
    best: _Picks | None = None
    aim, seen = limit, set()
    for _ in range(_ROUNDS):
        # 2. The cheapest by the work as it is around the last solution.
        picks = _solve_around(problem, picks, aim, _RESOLUTION / whole)
        # 3. Keep the cheapest one that is truly within the limit.
        if problem.fits(picks) and (best is None or problem.price(picks) < problem.price(best)):
            best = picks
        # 4. Once it repeats itself: done, or aim lower if none was within the limit.
        key = tuple(picks.values())
        if key in seen:
            if best is not None:
                break
            aim -= 0.02 * whole
        seen.add(key)
    # 5. Widen where there is room.
    return problem.left(_widened(problem, best or problem.all_at(largest=False)))


def _solve_around(problem: _Problem, picks: _Picks, aim: float, scale: float) -> _Picks:
    """The cheapest picks, where the work changes with one mover at a time as it does at ``picks``.

    Args:
        scale: from work to the whole numbers that the integer program takes.
    """
    here = problem.work(picks)
    rows: list[Choice] = []
    least = []
    for mover, prices in problem.prices.items():
        changes = [problem.work({**picks, mover: k}) - here for k in range(len(prices))]
        least.append(min(changes))
        for k, change in enumerate(changes):
            size = math.ceil((change - least[-1]) * scale)
            rows.append(Choice(layer=mover, option=str(k), bytes=size, price=prices[k]))
    room = math.floor((aim - here - sum(least)) * scale)
    if room <= 0:
        return problem.all_at(largest=False)
    return {mover: int(k) for mover, k in cheapest(rows, Within(max_bytes=room)).items()}


def _widened(problem: _Problem, picks: _Picks) -> _Picks:
    """One width more at a time, the most valuable first, as long as that fits."""
    while True:
        gains = {}
        for mover, k in picks.items():
            if not k or not problem.fits({**picks, mover: k - 1}):
                continue
            gain = problem.prices[mover][k] - problem.prices[mover][k - 1]
            if gain >= 0:
                gains[mover] = gain
        if not gains:
            return picks
        best = max(gains, key=lambda mover: gains[mover])
        picks = {**picks, best: picks[best] - 1}
