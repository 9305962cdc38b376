"""The record in a few lines for a terminal or a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import curvature, removed, sections, together
from .figures import clean, count, duration, fixed, num, plus_minus, short, size

NOTES_SHOWN = 5


def _line(text: str) -> str:
    """On one line and free of control characters: a name cannot forge a line or drive the
    terminal."""
    return " ".join(clean(text).split())


def _options(record: sections.Record) -> str:
    counts: dict[str, int] = {}
    for layer in sections.items_or_none(record, "layers"):
        counts[sections.word(layer.get("option"))] = (
            counts.get(sections.word(layer.get("option")), 0) + 1
        )
    return ", ".join(f"{counts[o]} {o}" for o in sections.option_order(record) if o in counts)


def summary(record: Mapping[str, Any]) -> str:
    """A short Markdown summary that also reads well as plain text: verdict, size, removed units,
    options, prediction, time, curvature, notes.

    Args:
        record: contents of ``report.json``; missing keys leave their line out or say what is
            missing.
    """
    lines = [
        f"{_line(sections.status_of(record))}: {_line(str(record.get('title') or 'curvprune run'))}",
        "",
    ]
    lines += [_line(sections.statement(record)), ""]
    verdict = record.get("verdict")
    if isinstance(verdict, Mapping):
        quantity = sections.Quantity.of(verdict)
        lines.append(
            _line(
                f"- drop {sections.drop_text(verdict)} {quantity.measure}, bound "
                f"{sections.bound_text(verdict)}, budget "
                f"{short(quantity.scaled(verdict.get('max_drop')))}; "
                f"{count(verdict.get('items'))} items, {count(verdict.get('clusters'))} clusters"
            )
        )
    sizes = record.get("size")
    if isinstance(sizes, Mapping):
        lines.append(
            _line(
                f"- weights {size(sizes.get('before_bytes'))} to {size(sizes.get('after_bytes'))}, "
                f"{fixed(sections.smaller_by(sizes), 2)} times smaller; model folder "
                f"{size(sizes.get('folder_bytes'))}"
            )
        )
    if text := removed.line(record):
        lines.append(_line(f"- {text}"))
    if limits := sections.limits(record):
        lines.append(_line(f"- within: {'; '.join(f'{name} {text}' for name, _, text in limits)}"))
    if options := _options(record):
        lines.append(_line(f"- layers: {options}"))
    chosen = next((p for p in sections.trial_points(record) if p.chosen), None)
    if chosen is not None:
        lines.append(
            _line(
                f"- {chosen.name}: predicted {plus_minus(chosen.predicted, chosen.predicted_stderr)}, "
                f"measured {plus_minus(chosen.measured, chosen.measured_stderr)} "
                f"{sections.measure_of(record)} (select split)"
            )
        )
    if reading := together.reading(record):
        lines.append(_line(f"- {reading}"))
    stages = [num(s.get("seconds")) for s in sections.items_or_none(record, "stages")]
    seconds = [s for s in stages if s is not None]
    if seconds:
        peak = num(record.get("peak_memory_bytes"))
        memory = "" if peak is None else f", peak memory {size(peak)}"
        lines.append(_line(f"- time {duration(sum(seconds))}{memory}"))
    lines += [_line(f"- curvature, {text}") for text in curvature.diagnosis_lines(record)]
    lines += [_line(f"- next: {text}") for text in sections.advice(record)]
    notes = sections.notes(record)
    lines += [_line(f"- note ({_where(where)}): {text}") for where, text in notes[:NOTES_SHOWN]]
    if len(notes) > NOTES_SHOWN:
        lines.append(f"- {len(notes) - NOTES_SHOWN} more notes in report.html")
    return "\n".join(lines) + "\n"


def _where(where: str) -> str:
    return where if len(where) <= 60 else f"{where[:57]}..."
