"""Which widths a model may have, and the choice among them for an asked share of its work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from torch import nn

from curvprune.model import Loss, Splits, to_device
from curvprune.structured.asked import Structured
from curvprune.structured.cuts import BLOCKS, Cut, Found
from curvprune.structured.finding import find_cuts
from curvprune.structured.knapsack import Cost, Offer, cheapest_widths
from curvprune.structured.latency import Latency, Timer
from curvprune.structured.work import CutWork

AIMS = 6  # choices whose latency is measured


# ----------------------------------------------------------------------------------------- on offer


def offered_widths(
    model: nn.Module,
    objective: Loss,
    splits: Splits,
    asked: Structured,
    *,
    timer: Timer | None = None,
) -> tuple[Found, CutWork, dict[str, list[int]], Cost]:
    """The cuts that ``asked`` is about, the model's work, cut → widths on offer, from all units
    downwards, and what of ``asked.of`` is left with given widths.

    Cost: some forward passes of one item, some dozens where latency is asked for.

    Args:
        timer: how models are timed, where latency is asked for; `seconds` by default.

    Raises:
        ValueError: as `prune_units` does.
    """
    device = next(model.parameters()).device
    items = splits.calibrate.items
    # 1. The cuts.
    first = to_device(items[0], device)
    found = find_cuts(model, objective, first, kinds=asked.asked_kinds)
    if asked.uniform:
        found = _alike(found)
    if isinstance(asked.share, Mapping):
        lacking = set(asked.share) - {cut.kind for cut in found.cuts.values()}
        if lacking:
            raise ValueError(
                f"structured: the model has no prunable {sorted(lacking)[0]}; "
                + "; ".join(found.notes)
            )
    # 2. Their widths.
    widths = {n: _widths(cut, asked) for n, cut in found.cuts.items()}
    # 3. What is left of the work with given widths.
    work = CutWork(model, objective, first, found.cuts)
    cost: Cost = partial(work, asked.of)
    if asked.of == "latency":
        if asked.batch > len(items):
            raise ValueError(
                f"structured: batch={asked.batch} of the {len(items)} calibration items; ask for "
                "fewer"
            )
        batch = to_device(splits.calibrate.together(items[: asked.batch]), device)
        cost = Latency(model, objective, batch, found.cuts, _smallest(widths), timer=timer)
    check_reach(cost, widths, asked)
    return found, work, widths, cost


def _smallest(widths: Mapping[str, list[int]]) -> dict[str, int]:
    return {n: offered[-1] for n, offered in widths.items()}


def _alike(found: Found) -> Found:
    """Of MLPs and heads only those of the most common size: a config has one number for them."""
    cuts, notes = dict(found.cuts), list(found.notes)
    for kind in ("mlp", "heads"):
        sizes = [c.units for c in found.cuts.values() if c.kind == kind]
        for name, cut in found.cuts.items():
            if cut.kind == kind and cut.units != max(set(sizes), key=sizes.count):
                del cuts[name]
                notes.append(
                    f"{name}: stays as it is, its {cut.units} units are not the width that its "
                    "kind has"
                )
    return Found(cuts=cuts, sinks=found.sinks, notes=notes)


def _widths(cut: Cut, asked: Structured) -> list[int]:
    """Widths on offer, from all units downwards."""
    if cut.kind == BLOCKS:
        return [1, 0]
    step = asked.round_to or (8 if cut.units >= 256 else 1)
    step = step if cut.units >= 2 * step else 1
    step = math.lcm(step, cut.multiple)

    def rounded(share: float) -> int:
        return max(min(step, cut.units), min(cut.units, round(share * cut.units / step) * step))

    if isinstance(asked.share, Mapping) and not asked.chooses:
        return [cut.units, rounded(1 - asked.share[cut.kind])]
    shares = np.linspace(1, 1 - asked.most, asked.widths + 1)
    offered = [cut.units, *(rounded(s) for s in shares[1:])]
    # Cuts that get one width go by its number, so that each has as many.
    return offered if asked.uniform else sorted(set(offered), reverse=True)


def check_reach(cost: Cost, widths: Mapping[str, list[int]], asked: Structured) -> None:
    """Raises ``ValueError`` where the smallest widths leave more than was asked for; says what
    can be removed."""
    if isinstance(asked.share, Mapping):
        return
    best = 1 - cost(_smallest(widths)) / cost({})
    if best < asked.share:
        raise ValueError(
            f"structured={asked.share:g}: at most {best:.3f} of the {asked.of} can be removed by "
            f"these kinds ({', '.join(sorted(asked.kinds))}) with at most {asked.most:g} of a "
            "cut; ask for less or raise most"
        )


# ------------------------------------------------------------------------------------------- choice


def choose_widths(
    cuts: Mapping[str, Cut],
    widths: Mapping[str, list[int]],
    prices: Mapping[str, Sequence[float]],
    cost: Cost,
    asked: Structured,
) -> dict[str, int]:
    """The widths with the least summed price within the asked share of the work: cut → units left.

    Where no layer lies between two cuts (MLPs and heads in a residual stream) this is exact, else
    as `cheapest_widths` says. A latency is measured: the choice is made again until what is
    measured is low enough, see `_reaching`.
    """
    offer = Offer(cuts=cuts, widths=widths, prices=prices, uniform=asked.uniform)
    if not isinstance(asked.share, Mapping):
        if isinstance(cost, Latency):
            return _reaching(offer, cost, asked.share)
        return cheapest_widths(offer, cost, cost({}) * (1 - asked.share))
    # Every kind has a share of its own, which is of its units.
    left = {n: c.units for n, c in cuts.items()}
    for kind, share in asked.share.items():
        members = {n: c for n, c in cuts.items() if c.kind == kind}
        total = sum(c.units for c in members.values())
        of_kind = Offer(cuts=members, widths=widths, prices=prices, uniform=asked.uniform)
        left.update(cheapest_widths(of_kind, _units, total * (1 - share)))
    return left


def _units(left: Mapping[str, int]) -> float:
    return sum(left.values())


def _reaching(offer: Offer, cost: Latency, share: float) -> dict[str, int]:
    """The cheapest widths whose measured latency is low enough; where none is, the fastest.

    Widths are chosen by the predicted latency. Its limit moves by how far the measured one is off,
    then halves what lies between one that was too high and one that was low enough.
    """
    most = 1 - cost(_smallest(offer.widths)) / cost({})
    tried: dict[tuple[int, ...], float] = {}  # widths → measured share that is gone
    aim, missed, met = share, 0.0, most
    for _ in range(AIMS):
        # 1. Choose by the prediction, and measure.
        left = cheapest_widths(offer, cost, cost({}) * (1 - aim))
        key = tuple(left[n] for n in offer.cuts)
        if key not in tried:
            tried[key] = _gone(cost, left)
            if tried[key] >= share:  # not by luck
                tried[key] = min(tried[key], _gone(cost, left))
        gone = tried[key]
        # 2. Between which aims the right one lies.
        if gone < share:
            missed = max(missed, aim)
        else:
            met = min(met, aim)
        if aim == most or share <= gone < 1.05 * share:
            break
        # 3. The next aim: by how far this one was off, or halfway between.
        off = share / gone if gone > 0 else 2.0
        aim = min(most, aim * min(off, 2.0))
        if not missed < aim < met:
            aim = most if missed >= met else (missed + met) / 2
    # 4. Of those that are fast enough the cheapest.
    enough = [key for key, gone in tried.items() if gone >= share]
    if enough:
        best = min(enough, key=lambda key: _price(offer, key))
    else:
        best = max(tried, key=lambda key: tried[key])
    return dict(zip(offer.cuts, best, strict=True))


def _gone(cost: Latency, left: Mapping[str, int]) -> float:
    before, after = cost.measured(left)
    return 1 - after / before


def _price(offer: Offer, key: Sequence[int]) -> float:
    parts = []
    for name, width in zip(offer.cuts, key, strict=True):
        parts.append(offer.prices[name][offer.widths[name].index(width)])
    return math.fsum(parts)
