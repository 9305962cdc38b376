"""The best predicted plan of every size, and the plans measured beside it."""

from __future__ import annotations

from markupsafe import Markup

from curvprune.record import RunRecord
from curvprune.report import charts
from curvprune.report.figures import PLUS_MINUS, finite
from curvprune.report.tables import Column, Table, bytes_cell, error_cell
from curvprune.report.trials import trial_points


def _max_bytes(record: RunRecord) -> int | None:
    return None if record.budget is None else record.budget.max_bytes


def _max_loss(record: RunRecord) -> float | None:
    """The budget when it is one in the measure of the predicted loss."""
    if record.budget is not None and record.budget.quantile is not None:
        return None
    # The verdict's budget comes first; one of accuracy has no place on an axis of losses.
    for asked in (record.verdict, record.budget):
        if asked is not None and asked.metric in ("loss", "kl") and asked.max_drop is not None:
            return finite(asked.max_drop)
    return None


def frontier_chart(record: RunRecord) -> Markup | None:
    """Bytes against loss: the frontier, the plans measured, the budget."""
    curve = []
    for point in record.frontier:
        predicted = finite(point.predicted)
        if predicted is not None:
            stderr = finite(point.predicted_stderr) or 0.0
            curve.append(charts.FrontierMark(point.bytes, predicted, stderr))
    return charts.frontier(
        sorted(curve),
        trial_points(record),
        measure=record.measure,
        max_drop=_max_loss(record),
        max_bytes=_max_bytes(record),
    )


def frontier_budget(record: RunRecord) -> str:
    """Which line of the chart is the budget, or why there is none."""
    if _max_loss(record) is not None or _max_bytes(record) is not None:
        return "Dashed red: the budget."
    if record.verdict is not None and record.verdict.metric not in ("loss", "kl"):
        return f"No budget line: the budget is one of {record.verdict.metric}, this axis is loss."
    return ""


def frontier_table(record: RunRecord) -> Table | None:
    """The chart's numbers; ``None`` where nothing was priced."""
    if not record.frontier:
        return None
    columns = [
        Column("bytes", "weights on disk", "n"),
        Column(
            f"predicted {PLUS_MINUS} se ({record.measure})", "loss increase from the ledger", "n"
        ),
    ]
    rows = []
    for point in record.frontier:
        predicted = error_cell(point.predicted, point.predicted_stderr)
        rows.append([bytes_cell(point.bytes), predicted])
    return Table("frontier", columns, rows)
