"""Units that were removed before the layers were compressed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from curvprune.record import CutRecord, RemovedUnits, RunRecord
from curvprune.report import charts
from curvprune.report.figures import (
    MINUS,
    THIN,
    count,
    duration,
    finite,
    plus_minus,
    whole_percent,
)
from curvprune.report.tables import Cell, Column, Fact, Table, count_cell, number_cell


@dataclass(frozen=True, slots=True)
class _Kind:
    """All cuts of one kind: how many there are, units left and units before."""

    name: str
    cuts: int
    left: float
    of: float


def _kinds(found: RemovedUnits) -> list[_Kind]:
    by_kind: dict[str, list[CutRecord]] = {}
    for cut in found.cuts.values():
        by_kind.setdefault(cut.kind, []).append(cut)
    # Sums over cuts of one kind; units of different kinds are of different size.
    kinds = []
    for name, cuts in by_kind.items():
        left, of = math.fsum(cut.left for cut in cuts), math.fsum(cut.of for cut in cuts)
        kinds.append(_Kind(name, len(cuts), left, of))
    return kinds


def _work(found: RemovedUnits) -> tuple[tuple[str, tuple[int, int]], ...]:
    """What was counted before and after."""
    return ("multiply-adds", found.multiply_adds), ("parameters", found.parameters)


def _gone(before: float, after: float) -> str:
    """The share that is gone, in per cent with one decimal."""
    return f"{MINUS if after <= before else '+'}{100 * abs(1 - after / before):.1f}{THIN}%"


_UNITS = (
    Column("units before", "", "n"),
    Column("left", "", "n"),
    Column("removed", "", "n"),
    Column("share left", "", "n"),
    Column("", "share left"),
)


def _unit_cells(left: float, of: float) -> list[Cell]:
    """The cells below `_UNITS`."""
    share = left / of
    return [
        count_cell(of),
        count_cell(left),
        count_cell(of - left),
        number_cell(share, whole_percent(share)),
        Cell(charts.progress(share)),
    ]


@dataclass(frozen=True, slots=True)
class Removed:
    """Work before and after, predicted cost; totals of each kind of cut, and every cut."""

    facts: list[Fact]
    kinds: Table
    cuts: Table


def removed(record: RunRecord) -> Removed | None:
    """What the section shows; ``None`` where no units were removed first."""
    found = record.structured
    if found is None:
        return None
    kinds = [
        [Cell(kind.name), count_cell(kind.cuts), *_unit_cells(kind.left, kind.of)]
        for kind in _kinds(found)
    ]
    cuts = [
        [Cell(name, class_="mono"), Cell(cut.kind), *_unit_cells(cut.left, cut.of)]
        for name, cut in found.cuts.items()
    ]
    number = Column("cuts", "dimensions inside the model", "n")
    return Removed(
        facts=[*_work_facts(found), _cost_fact(found, record.measure)],
        kinds=Table("kinds", [Column("kind"), number, *_UNITS], kinds),
        cuts=Table("cuts", [Column("cut"), Column("kind"), *_UNITS], cuts),
    )


def _work_facts(found: RemovedUnits) -> list[Fact]:
    """Multiply-adds, parameters and, where it was measured, latency."""
    # 1. Counted work, and its share that is gone.
    facts = []
    for name, (before, after) in _work(found):
        hint = "of the original model; multiply-adds of one item"
        facts.append(Fact(f"{name} before", count(before), float(before), "", hint))
        gone, hint = _gone(before, after), "without the removed units"
        facts.append(Fact(f"{name} after", count(after), float(after), gone, hint))
    # 2. Measured time.
    if found.latency_seconds is not None:
        slow, fast = found.latency_seconds
        hint = (
            "of a forward pass, measured on the machine of the run; asked and predicted are in "
            "the notes"
        )
        facts.append(Fact("latency before", duration(slow), slow, "", hint))
        facts.append(Fact("latency after", duration(fast), fast, _gone(slow, fast), hint))
    return facts


def _cost_fact(found: RemovedUnits, measure: str) -> Fact:
    predicted = finite(found.predicted)
    hint = "rise of the loss by the prices of the widths"
    if predicted is None:
        return Fact("predicted cost", "not priced", None, "", hint)
    cost = plus_minus(predicted, found.predicted_stderr)
    return Fact("predicted cost", cost, predicted, measure, hint)


def removed_line(record: RunRecord) -> str:
    """The same in one line; empty where no units were removed."""
    found = record.structured
    if found is None:
        return ""
    # Units of each kind, then work, then cost.
    parts = [f"{count(k.of - k.left)} of {count(k.of)} of {k.name}" for k in _kinds(found)]
    parts += [f"{name} {_gone(before, after)}" for name, (before, after) in _work(found)]
    if finite(found.predicted) is not None:
        cost = plus_minus(found.predicted, found.predicted_stderr)
        parts.append(f"predicted cost {cost} {record.measure}")
    return f"units removed first: {', '.join(parts)}"
