"""Pruning and rounding in one plan against each alone."""

from __future__ import annotations

from .figures import PLUS_MINUS, count, num, plus_minus, size
from .sections import (
    Cell,
    Column,
    Record,
    Table,
    error_cell,
    error_of,
    items,
    items_or_none,
    measure_of,
    number_cell,
    texts,
    word,
)

CLEAR = 1.645  # standard errors: one-sided 95 %


def table(record: Record) -> Table:
    """What each family of options could do at the plan's size."""
    rows = []
    for k, entry in enumerate(items(record, "together")):
        name = Cell(word(entry.get("name")))
        if entry.get("trial") is None:
            least = entry.get("smallest_bytes")
            told = f"no plan within {', '.join(texts(entry.get('missed')))}; the smallest model of all:"
            rows.append(
                [
                    name,
                    Cell(told),
                    number_cell(least, size(least), title=f"{count(least)} B"),
                    *[Cell("")] * 3,
                ]
            )
            continue
        stored = entry.get("bytes")
        more = error_cell(entry.get("more"), entry.get("more_stderr")) if k else Cell("")
        rows.append(
            [
                name,
                Cell(word(entry["trial"])),
                number_cell(stored, size(stored), title=f"{count(stored)} B"),
                error_cell(entry.get("predicted"), entry.get("predicted_stderr")),
                error_cell(entry.get("measured"), entry.get("measured_stderr")),
                more,
            ]
        )
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
    return Table("together", columns, rows)


def reading(record: Record) -> str:
    """Which won, in a sentence; empty where there was nothing to compare."""
    found = items_or_none(record, "together")
    if not found:
        return ""
    parts = []
    for entry in found[1:]:
        name, more, error = (
            word(entry.get("name")),
            num(entry.get("more")),
            error_of(entry.get("more_stderr")),
        )
        if entry.get("trial") is None:
            missed = texts(entry.get("missed"))
            least = f"does not get below {size(entry.get('smallest_bytes'))}"
            parts.append(
                f"{name} {least if missed == ['max_bytes'] else 'cannot keep within ' + ', '.join(missed)}"
            )
        elif more is None or error is None:
            parts.append(f"{name} was not measured with an error")
        else:
            told = f"{plus_minus(abs(more), error)} {measure_of(record)}"
            name = f"{name} ({size(entry.get('bytes'))})"
            if more > CLEAR * error:
                parts.append(f"{name} loses {told} more")
            elif more < -CLEAR * error:
                parts.append(f"{name} loses {told} less: it won")
            else:
                parts.append(
                    f"{name} differs by {plus_minus(more, error)} {measure_of(record)}, no more than "
                    "chance may"
                )
    return f"At {size(found[0].get('bytes'))}, beside {word(found[0].get('name'))} in one plan: {'; '.join(parts)}."
