"""Structured pruning: which units of which cut to remove for an asked share of the model's work,
with what stays compensated; prices in nats from the same Fisher matrix as everything else.

    asked     what to remove                                       asked.Structured
    cuts      which units can be removed                           finding.find_cuts
    order     in which order, from one pass for the moments of     solving.solve_widths,
              the inputs and one for what an error of each         compensation.removal_order,
              output costs                                         gradients.row_costs
    price     ½ δᵀFδ of each width, δ the compensated change       prices.price_widths
    choose    widths: a knapsack, or one width per kind; for       widths.choose_widths,
              latency again, until what is measured is low enough  knapsack, latency.Latency
    apply     one pass through the model beside the uncompressed   solving.apply_removal,
              one: later readers make up for earlier ones          compensation.compensate
    surgery   the units leave the model                            surgery.remove_
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvprune.curvature import Estimate
from curvprune.model import Loss, Split, Splits, evaluating, to_device
from curvprune.pricing import Ledger
from curvprune.structured.asked import Structured
from curvprune.structured.cuts import BLOCKS, Found
from curvprune.structured.gradients import row_costs
from curvprune.structured.latency import Latency, Timer
from curvprune.structured.prices import price_widths
from curvprune.structured.solving import apply_removal, reading_layers, solve_widths
from curvprune.structured.trying import differs, fitting, without_effect
from curvprune.structured.widths import check_reach, choose_widths, offered_widths


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What `prune_units` returns.

    Attributes:
        model: the smaller model; the input model is untouched.
        left: cut → units left.
        units: cut → units before.
        removed: cut → the units that are gone.
        macs, parameters: (before, after), multiply-adds of one item.
        latency: (before, after) in seconds, measured in turn at the end, where a share of it was
            asked for.
        predicted: rise of the loss in nats, from the prices; ``None`` where nothing had to be
            chosen.
        ledger: the prices of all widths, where there was a choice.
        notes: dimensions that are no cuts, and why.
        kinds: cut → kind.
        dropped: blocks that are gone.
    """

    model: nn.Module
    left: dict[str, int]
    units: dict[str, int]
    removed: dict[str, list[int]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    latency: tuple[float, float] | None
    predicted: Estimate | None
    ledger: Ledger | None
    notes: tuple[str, ...]
    kinds: dict[str, str]
    dropped: tuple[str, ...]

    def uniform_widths(self) -> dict[str, tuple[int, int]] | None:
        """Kind → (units before, after), if cuts of one kind have one width and had one."""
        if BLOCKS in self.kinds.values():
            return {}  # the config follows when blocks are dropped
        widths: dict[str, tuple[int, int]] = {}
        for name, kind in self.kinds.items():
            width = self.units[name], self.left[name]
            if widths.setdefault(kind, width) != width:
                return None
        return widths


def prune_units(
    model: nn.Module,
    objective: Loss,
    splits: Splits,
    asked: Structured,
    *,
    seed: int = 0,
    batch_size: int = 8,
    timer: Timer | None = None,
) -> Pruned:
    """Remove units until ``asked`` is met, and compensate.

    Cost: three forward passes over the calibration items and one backward; over the price items one
    forward and ``labels`` backward passes, where there are widths to choose among; ``in³`` per
    reader and width. For latency what `Latency` costs, and in addition up to `AIMS` models are made
    and timed. Results are then not reproducible: another run measures other times.

    Args:
        timer: how models are timed, where latency is asked for; `seconds` by default.

    Raises:
        ValueError: a share that cannot be reached (says what can), or a model without cuts.
    """
    # 1. What can be removed, and what each width leaves of the work.
    found, work, widths, cost = offered_widths(model, objective, splits, asked, timer=timer)
    cuts, calibrate = found.cuts, splits.calibrate

    # 2. The order of removal in every cut, and the change that each width means.
    batches = calibrate.batches(batch_size)
    rows = row_costs(model, objective, batches, reading_layers(model, cuts), seed=seed)
    _tell_idle_(model, objective, calibrate, found, rows, batch_size=batch_size)
    widths = {n: offered for n, offered in widths.items() if n in cuts}
    check_reach(cost, widths, asked)
    solved = solve_widths(model, objective, calibrate, found, widths, rows, asked)

    # 3. The widths: the ones asked for, or the cheapest that meet what was asked.
    ledger = predicted = None
    if not asked.chooses:
        left = {n: offered[-1] for n, offered in widths.items()}
    else:
        ledger = price_widths(
            model, objective, splits.price, solved, work, labels=asked.labels, seed=seed
        )
        prices = {}
        for name, offered in widths.items():
            priced = ledger.layer_rows(name)
            prices[name] = [priced[str(width)].price for width in offered]
        left = choose_widths(cuts, widths, prices, cost, asked)
    removed = {n: sorted(solved[n].order[: cuts[n].units - width]) for n, width in left.items()}

    # 4. The smaller model, which has run on data before anyone gets it.
    smaller, removed = _made(
        model, objective, splits, found, removed, asked, reached=work.positions
    )
    left = {n: cut.units - len(removed[n]) for n, cut in cuts.items()}
    if ledger is not None:
        # Of what ships: units that were in the way have been put back.
        predicted = ledger.predict({n: str(width) for n, width in left.items()})

    # 5. What was reached.
    notes, latency = list(found.notes), None
    if isinstance(cost, Latency):
        latency = cost.beside(smaller)
        notes.append(_measured(asked, 1 - cost(left) / cost({}), *latency))
    return Pruned(
        model=smaller,
        left=left,
        units=dict(work.units),
        removed=removed,
        macs=(work("macs", {}), work("macs", left)),
        parameters=(work("parameters", {}), work("parameters", left)),
        latency=latency,
        predicted=predicted,
        ledger=ledger,
        notes=tuple(notes),
        kinds={n: c.kind for n, c in cuts.items()},
        dropped=tuple(c.name for n, c in cuts.items() if c.kind == BLOCKS and removed[n]),
    )


def _tell_idle_(
    model: nn.Module,
    objective: Loss,
    items: Split,
    found: Found,
    rows: Mapping[str, Tensor],
    *,
    batch_size: int,
) -> None:
    """Cuts that no gradient comes to are free if the outputs of no item depend on them, as behind a
    scale of zero; else they stay, since a choice that has no gradient may depend on them."""
    idle = {}
    for name, cut in found.cuts.items():
        if not any(bool(rows[reader].any()) for reader in cut.readers):
            idle[name] = cut
    if not idle:
        return
    whole = {name: list(range(cut.units)) for name, cut in idle.items()}
    if without_effect(model, objective, items.batches(batch_size), idle, whole):
        found.notes.append(
            f"{len(idle)} cut(s) have no effect on the outputs, first {next(iter(idle))}: their "
            "units go for free"
        )
        return
    for name, cut in idle.items():
        del found.cuts[name]
        found.notes.append(
            f"{name}: stays as it is, since {sorted(cut.readers)[0]} received no gradient: it is "
            "not on the way to the loss"
        )
    if not found.cuts:
        raise ValueError(f"structured: no cut can be priced; {'; '.join(found.notes)}")


def _made(
    model: nn.Module,
    objective: Loss,
    splits: Splits,
    found: Found,
    removed: dict[str, list[int]],
    asked: Structured,
    *,
    reached: Collection[str],
) -> tuple[nn.Module, dict[str, list[int]]]:
    """The smaller model and what was removed of it in the end.

    Of cuts without which it does not compute what it computes when nothing reads their units, all
    units stay, with a note.
    """
    batch = to_device(splits.calibrate.items[-1], next(model.parameters()).device)
    for _ in range(2):
        # 1. Make it, and see that it computes what it should.
        smaller = apply_removal(
            model, objective, splits.calibrate, found, removed, asked, reached=reached
        )
        with torch.no_grad(), evaluating(smaller):
            expected = objective.outputs(smaller, batch).double()
        reason = differs(smaller, objective, batch, found.cuts, removed, expected=expected)
        if reason is None:
            return smaller, removed
        # 2. Put back what is in the way, and go on with the others.
        kept = fitting(model, objective, batch, found.cuts, removed)
        back = [n for n, units in removed.items() if units and not kept[n]]
        found.notes.extend(f"{n}: all units stay: {reason}" for n in back)
        removed = kept
        if not back or not any(removed.values()):
            break
    raise ValueError(
        f"structured: no units can be removed of {type(model).__name__}: {reason}; leave kinds "
        "out, such as kinds=['mlp']"
    )


def _measured(asked: Structured, predicted: float, before: float, after: float) -> str:
    assert not isinstance(asked.share, Mapping)
    missed = ""
    if after > (1 - asked.share) * before:
        missed = "; this measurement misses what was asked"
    return (
        f"latency of a batch of {asked.batch}: {asked.share:.1%} less was asked, {predicted:.1%} "
        f"less predicted, {1 - after / before:.1%} less measured ({1e3 * before:.4g} ms before, "
        f"{1e3 * after:.4g} ms after){missed}"
    )
