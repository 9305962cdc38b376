"""Units that were removed before the layers were compressed, from the record's "structured". No
HTML here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import charts
from .figures import MINUS, THIN, clean, count, duration, num, plus_minus
from .sections import (
    Cell,
    Column,
    Fact,
    Missing,
    Record,
    Table,
    mapping,
    mapping_or_empty,
    measure_of,
    number_cell,
    word,
)

WORK = ("multiply-adds", "parameters")


def _cuts(found: Record) -> dict[str, tuple[str, float, float]]:
    """Cut → kind, units left, units before; those without usable numbers are left out."""
    cuts = {}
    for name, cut in mapping_or_empty(found, "cuts").items():
        if not isinstance(cut, Mapping):
            continue
        left, of = num(cut.get("left")), num(cut.get("of"))
        if left is not None and of is not None and 0 <= left <= of and of > 0:
            cuts[clean(name)] = (word(cut.get("kind")), left, of)
    return cuts


def _work(found: Record, of: str) -> tuple[float, float] | None:
    """Multiply-adds or parameters (before, after)."""
    both = found.get(of)
    values = [num(v) for v in both] if isinstance(both, list | tuple) else []
    if len(values) != 2 or values[0] is None or values[1] is None or values[0] <= 0:
        return None
    return values[0], values[1]


def _gone(before: float, after: float) -> str:
    """The share that is gone, in per cent with one decimal."""
    return f"{MINUS if after <= before else '+'}{100 * abs(1 - after / before):.1f}{THIN}%"


def _kinds(cuts: dict[str, tuple[str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    kinds: dict[str, list[tuple[float, float]]] = {}
    for kind, left, of in cuts.values():
        kinds.setdefault(kind, []).append((left, of))
    return kinds


def _table(
    name: str, head: Column, rows: list[tuple[list[Cell], float, float]], extra: list[Column]
) -> Table:
    columns = [
        head,
        *extra,
        Column("units before", "", "n"),
        Column("left", "", "n"),
        Column("removed", "", "n"),
        Column("share left", "", "n"),
        Column("", "share left"),
    ]
    body = [
        [
            *first,
            *(number_cell(n, count(n)) for n in (of, left, of - left)),
            number_cell(left / of, f"{100 * left / of:.0f}{THIN}%"),
            Cell(charts.progress(left / of)),
        ]
        for first, left, of in rows
    ]
    return Table(name, columns, body)


def removed(record: Record) -> dict[str, Any]:
    """What the section shows: work before and after, predicted cost, totals of each kind of unit,
    every cut."""
    found = mapping(record, "structured")
    cuts = _cuts(found)
    if not cuts:
        raise Missing("'structured' has no cut with units")
    facts = []
    for of in WORK:
        work = _work(found, of)
        if work is not None:
            facts.append(
                Fact(
                    f"{of} before",
                    count(work[0]),
                    work[0],
                    "",
                    "of the original model; multiply-adds of one item",
                )
            )
            facts.append(
                Fact(
                    f"{of} after",
                    count(work[1]),
                    work[1],
                    _gone(*work),
                    "without the removed units",
                )
            )
    seconds = found.get("latency_seconds")
    times = [num(v) for v in seconds] if isinstance(seconds, list | tuple) else []
    if len(times) == 2 and times[0] and times[1] is not None:
        hint = "of a forward pass, measured on the machine of the run; asked and predicted are in the notes"
        facts.append(Fact("latency before", duration(times[0]), times[0], "", hint))
        facts.append(
            Fact("latency after", duration(times[1]), times[1], _gone(times[0], times[1]), hint)
        )
    predicted = num(found.get("predicted"))
    cost = (
        plus_minus(predicted, found.get("predicted_stderr"))
        if predicted is not None
        else "not priced"
    )
    measure = measure_of(record) if predicted is not None else ""
    facts.append(
        Fact(
            "predicted cost",
            cost,
            predicted,
            measure,
            "rise of the loss by the prices of the widths",
        )
    )
    kinds = [
        (
            [Cell(kind), number_cell(len(units), count(len(units)))],
            math.fsum(left for left, _ in units),
            math.fsum(of for _, of in units),
        )
        for kind, units in _kinds(cuts).items()
    ]
    single = [
        ([Cell(name, class_="mono"), Cell(kind)], left, of)
        for name, (kind, left, of) in cuts.items()
    ]
    return {
        "facts": facts,
        "kinds": _table(
            "kinds", Column("kind"), kinds, [Column("cuts", "dimensions inside the model", "n")]
        ),
        "cuts": _table("cuts", Column("cut"), single, [Column("kind")]),
    }


def line(record: Record) -> str:
    """The same in one line; empty where no units were removed."""
    found = mapping_or_empty(record, "structured")
    kinds = _kinds(_cuts(found))
    if not kinds:
        return ""
    parts = []
    for kind, units in kinds.items():
        left, of = math.fsum(u[0] for u in units), math.fsum(u[1] for u in units)
        parts.append(f"{count(of - left)} of {count(of)} of {kind}")
    works = [(of, _work(found, of)) for of in WORK]
    parts += [f"{of} {_gone(*work)}" for of, work in works if work is not None]
    if num(found.get("predicted")) is not None:
        cost = plus_minus(found["predicted"], found.get("predicted_stderr"))
        parts.append(f"predicted cost {cost} {measure_of(record)}")
    return f"units removed first: {', '.join(parts)}"
