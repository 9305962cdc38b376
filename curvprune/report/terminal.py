"""The record in a few lines for a terminal or a pull request."""

from __future__ import annotations

from curvprune.record import RunRecord
from curvprune.report.diagnosis import diagnosis_lines
from curvprune.report.figures import at_most, clean, count, duration, fixed, plus_minus, short, size
from curvprune.report.provenance import notes, state_text, total_seconds
from curvprune.report.removed import removed_line
from curvprune.report.sizes import layers_by_option, limit_text, times_smaller
from curvprune.report.together import together_reading
from curvprune.report.trials import chosen_point
from curvprune.report.verdict import (
    Quantity,
    advice,
    bound_text,
    drop_text,
    engine_text,
    statement,
    status_of,
)

NOTES_SHOWN = 5
WHERE_SHOWN = 60  # characters of where a note comes from


def _line(text: str) -> str:
    """On one line and free of control characters: a name cannot forge a line or drive the
    terminal."""
    return " ".join(clean(text).split())


def summary(record: RunRecord) -> str:
    """A short Markdown summary that also reads well as plain text: verdict, size, removed units,
    options, prediction, time, curvature, notes."""
    # 1. The verdict first: what a reader of a log sees.
    lines = [f"{status_of(record)}: {record.title}", "", statement(record), ""]
    # 2. Numbers, then what to do, then what was noted.
    points = _verdict_points(record)
    points += _size_points(record)
    points += _plan_points(record)
    points += _cost_points(record)
    points += [f"curvature, {text}" for text in diagnosis_lines(record)]
    points += [f"next: {text}" for text in advice(record)]
    points += _note_points(record)
    # 3. Every line is cleaned once, here.
    lines += [f"- {point}" for point in points]
    return "\n".join(_line(text) for text in lines) + "\n"


def _verdict_points(record: RunRecord) -> list[str]:
    verdict = record.verdict
    if verdict is None:
        return []
    quantity = Quantity.of(verdict)
    budget = short(quantity.scaled(verdict.max_drop))
    points = [
        f"drop {drop_text(verdict)} {quantity.measure}, bound {bound_text(verdict)}, budget "
        f"{budget}; {count(verdict.items)} items, {count(verdict.clusters)} clusters"
    ]
    if said := engine_text(record):
        points.append(said)
    # Here too, because of notes only the first few are shown.
    if verdict.unseen is not None:
        share = at_most(100 * verdict.unseen, None, 1)
        points.append(f"a loss that hits fewer than {share} % of documents may not have been seen")
    if verdict.earlier:
        points.append(
            f"uses of the certify split before this verdict: {count(len(verdict.earlier))} "
            f"({'; '.join(verdict.earlier[-3:])})"
        )
    return points


def _size_points(record: RunRecord) -> list[str]:
    sizes = record.size
    points = [
        f"weights {size(sizes.before_bytes)} to {size(sizes.after_bytes)}, "
        f"{fixed(times_smaller(sizes), 2)} times smaller; model folder {size(sizes.folder_bytes)}"
        + ("" if sizes.source_bytes is None else f"; read from {size(sizes.source_bytes)}")
    ]
    if units := removed_line(record):
        points.append(units)
    if record.limits:
        limits = [f"{limit.name} {limit_text(limit)}" for limit in record.limits]
        points.append(f"within: {'; '.join(limits)}")
    return points


def _plan_points(record: RunRecord) -> list[str]:
    points = []
    if record.layers:
        by_option = layers_by_option(record).items()
        numbers = [f"{len(layers)} {option}" for option, layers in by_option]
        points.append(f"layers: {', '.join(numbers)}")
    chosen = chosen_point(record)
    if chosen is not None:
        predicted = plus_minus(chosen.predicted, chosen.predicted_stderr)
        measured = plus_minus(chosen.measured, chosen.measured_stderr)
        points.append(
            f"{chosen.name}: predicted {predicted}, measured {measured} {record.measure} "
            "(select split)"
        )
    if reading := together_reading(record):
        points.append(reading)
    return points


def _cost_points(record: RunRecord) -> list[str]:
    points = []
    if record.stages:
        peak = size(record.peak_memory_bytes)
        points.append(f"time {duration(total_seconds(record))}, peak memory {peak}")
    if state := state_text(record):
        points.append(state)
    return points


def _note_points(record: RunRecord) -> list[str]:
    found = notes(record)
    points = []
    for where, text in found[:NOTES_SHOWN]:
        if len(where) > WHERE_SHOWN:
            where = f"{where[: WHERE_SHOWN - 3]}..."
        points.append(f"note ({where}): {text}")
    if len(found) > NOTES_SHOWN:
        points.append(f"{len(found) - NOTES_SHOWN} more notes in report.html")
    return points
