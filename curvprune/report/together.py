"""Pruning and rounding in one plan against each alone."""

from __future__ import annotations

from curvprune.record import Alternative, RunRecord
from curvprune.report.figures import PLUS_MINUS, finite, plus_minus, size
from curvprune.report.tables import Cell, Column, Table, bytes_cell, error_cell

CLEAR = 1.645  # standard errors: one-sided 95 %


def together_table(record: RunRecord) -> Table | None:
    """What each kind of options could do at the plan's size; ``None`` where none was compared."""
    if not record.together:
        return None
    columns = [
        Column("options"),
        Column("plan", "in the table above"),
        Column("bytes", "weights on disk", "n"),
        Column(f"predicted {PLUS_MINUS} se", "loss increase from the ledger", "n"),
        Column(f"measured {PLUS_MINUS} se", "loss increase on the select split", "n"),
        Column(
            f"beyond the plan {PLUS_MINUS} se",
            "measured minus the plan's, paired by item; positive is worse",
            "n",
        ),
    ]
    plan, *others = record.together
    rows = [[*_cells(plan), Cell("")]]
    for other in others:
        missed = other.trial is None
        more = Cell("") if missed else error_cell(other.more, other.more_stderr)
        rows.append([*_cells(other), more])
    return Table("together", columns, rows)


def _cells(found: Alternative) -> list[Cell]:
    """Name, plan, bytes, predicted and measured loss."""
    if found.trial is None:
        told = f"no plan within {', '.join(found.missed)}; the smallest model of all:"
        return [Cell(found.name), Cell(told), bytes_cell(found.smallest_bytes), Cell(""), Cell("")]
    return [
        Cell(found.name),
        Cell(found.trial),
        bytes_cell(found.bytes),
        error_cell(found.predicted, found.predicted_stderr),
        error_cell(found.loss, found.loss_stderr),
    ]


def together_reading(record: RunRecord) -> str:
    """Which won, in a sentence; empty where there was nothing to compare."""
    if not record.together:
        return ""
    plan, *others = record.together
    told = "; ".join(_told(other, record.measure) for other in others)
    return f"At {size(plan.bytes)}, beside {plan.name} in one plan: {told}."


def _told(other: Alternative, measure: str) -> str:
    # 1. The limits leave no plan of this kind.
    if other.trial is None:
        if other.missed == ("max_bytes",):
            return f"{other.name} does not get below {size(other.smallest_bytes)}"
        return f"{other.name} cannot keep within {', '.join(other.missed)}"
    more, error = finite(other.more), finite(other.more_stderr)
    if more is None or error is None:
        return f"{other.name} was not measured with an error"
    # 2. A difference counts beyond what chance may do, in either direction.
    name = f"{other.name} ({size(other.bytes)})"
    distance = f"{plus_minus(abs(more), error)} {measure}"
    if more > CLEAR * error:
        return f"{name} loses {distance} more"
    if more < -CLEAR * error:
        return f"{name} loses {distance} less: it won"
    return f"{name} differs by {plus_minus(more, error)} {measure}, no more than chance may"
