"""Which items of the certify split changed, from the record's "items" (columns of equal length). No
HTML here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .figures import MISSING, THIN, count, num, sig
from .sections import (
    Cell,
    Column,
    Fact,
    Missing,
    Record,
    Table,
    mapping,
    measure_of,
    number_cell,
    word,
)

ROWS = 20  # of each kind of item that a table shows
DOCUMENTS = 100
WORST = 0.05  # the share of the items whose part in the total rise is told


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One item under two models: loss per position, and whether its one prediction was right
    (``None`` if it has several)."""

    document: str
    index: float | None
    positions: float
    before: float
    after: float
    right: tuple[bool, bool] | None = None

    @property
    def rise(self) -> float:
        """Of the loss, per position."""
        return self.after - self.before

    @property
    def lost(self) -> bool:
        return self.right == (True, False)

    @property
    def won(self) -> bool:
        return self.right == (False, True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """What the two models and the two ways to flip are called in tables."""

    before: str = "before"
    after: str = "after"
    lost: str = "right \N{RIGHTWARDS ARROW} wrong"
    won: str = "wrong \N{RIGHTWARDS ARROW} right"


def _column(record: Record, name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list | tuple):
        raise Missing(f"'items' has no {name!r}")
    return list(value)


def read(record: Record) -> list[Item]:
    """The items on record, those without usable numbers left out; `Missing` if there is none."""
    found = mapping(record, "items")
    names = _column(found, "documents")
    columns = [_column(found, key) for key in ("document", "index", "count", "before", "after")]
    rights = [_column(found, key) for key in ("right_before", "right_after") if key in found]
    if len({len(column) for column in (*columns, *rights)}) > 1:
        raise Missing("the columns of 'items' differ in length")
    items = []
    for row, (place, *numbers) in enumerate(zip(*columns, strict=True)):
        index, positions, before, after = map(num, numbers)
        if not positions or positions < 0 or before is None or after is None:
            continue
        known = isinstance(place, int) and 0 <= place < len(names)
        flags = [num(column[row]) for column in rights]
        right = (flags[0] == 1, flags[1] == 1) if len(flags) == 2 and None not in flags else None
        name = word(names[place]) if known else MISSING
        items.append(
            Item(
                document=name,
                index=index,
                positions=positions,
                before=before,
                after=after,
                right=right,
            )
        )
    if not items:
        raise Missing("'items' has no item with numbers")
    return items


def flips(items: Sequence[Item], heads: Heads, *, name: str, measure: str) -> tuple[Table, int]:
    """The items that are right under one model only, `ROWS` of either kind at most, and how many
    were left out."""
    ranked = sorted(items, key=lambda i: -abs(i.rise))
    kinds = [i for i in ranked if i.lost], [i for i in ranked if i.won]
    shown = [item for kind in kinds for item in kind[:ROWS]]
    return _table(name, shown, heads, measure=measure), sum(map(len, kinds)) - len(shown)


def _table(name: str, items: Sequence[Item], heads: Heads, *, measure: str) -> Table:
    flipped = any(i.lost or i.won for i in items)
    several = any(i.positions != 1 for i in items)
    columns = [
        Column("item", "place in the certify split, from 0", "n"),
        Column("document"),
        *([Column("change")] if flipped else []),
        *([Column("positions", "how many of the item count", "n")] if several else []),
        Column(heads.before, f"loss per position, {measure}", "n"),
        Column(heads.after, f"loss per position, {measure}", "n"),
        Column("rise", f"of the loss per position, {measure}", "n"),
    ]
    rows = [
        [
            number_cell(item.index, count(item.index)),
            Cell(item.document, class_="mono"),
            *(
                [Cell(heads.lost if item.lost else heads.won if item.won else "")]
                if flipped
                else []
            ),
            *([number_cell(item.positions, count(item.positions))] if several else []),
            number_cell(item.before, sig(item.before, 4)),
            number_cell(item.after, sig(item.after, 4)),
            number_cell(item.rise, sig(item.rise)),
        ]
        for item in items
    ]
    return Table(name, columns, rows)


def _documents(items: Sequence[Item], *, measure: str) -> tuple[Table, int] | None:
    """Documents from the largest rise to the largest fall, and how many were left out; ``None``
    where every item is a document of its own."""
    by_document: dict[str, list[Item]] = {}
    for item in items:
        by_document.setdefault(item.document, []).append(item)
    if len(by_document) == len(items):
        return None
    predictions, heads = all(item.right is not None for item in items), Heads()
    rows = []
    for name, inside in by_document.items():
        positions = math.fsum(i.positions for i in inside)
        before = math.fsum(i.before * i.positions for i in inside) / positions
        after = math.fsum(i.after * i.positions for i in inside) / positions
        whole = [len(inside), positions]
        flipped = [sum(i.lost for i in inside), sum(i.won for i in inside)] if predictions else []
        rows.append(
            [
                Cell(name, class_="mono"),
                *(number_cell(n, count(n)) for n in whole),
                number_cell(before, sig(before, 4)),
                number_cell(after, sig(after, 4)),
                number_cell(after - before, sig(after - before)),
                *(number_cell(n, count(n)) for n in flipped),
            ]
        )
    rows.sort(key=lambda row: -(row[5].sort or 0.0))
    columns = [
        Column("document"),
        Column("items", "of the certify split", "n"),
        Column("positions", "that count", "n"),
        Column(heads.before, f"loss per position, {measure}", "n"),
        Column(heads.after, f"loss per position, {measure}", "n"),
        Column("rise", f"of the loss per position, {measure}", "n"),
        *(Column(head, "items", "n") for head in (heads.lost, heads.won) if predictions),
    ]
    return Table("documents", columns, rows[:DOCUMENTS]), max(0, len(rows) - DOCUMENTS)


def worst_share(items: Sequence[Item]) -> tuple[int, float | None]:
    """How many items are the worst `WORST` of all, and their share of the total rise: the rises in
    nats of all items that got worse, added up. ``None`` if none did."""
    rises = sorted((max(0.0, i.rise * i.positions) for i in items), reverse=True)
    worst, total = math.ceil(WORST * len(rises)), math.fsum(rises)
    return worst, math.fsum(rises[:worst]) / total if total > 0 else None


def changed(record: Record) -> dict[str, Any]:
    """What the section shows: figures, flipped items, the largest rises and falls, and
    documents."""
    items, measure, heads = read(record), measure_of(record), Heads()
    worse, better = ([i for i in items if sign * i.rise > 0] for sign in (1, -1))
    number, share = worst_share(items)
    facts = [
        Fact(
            "got worse",
            count(len(worse)),
            float(len(worse)),
            f"of {count(len(items))}",
            "items whose loss rose",
        ),
        Fact(
            "got better", count(len(better)), float(len(better)), "items", "items whose loss fell"
        ),
        Fact(
            f"worst {100 * WORST:.0f}{THIN}%",
            MISSING if share is None else f"{100 * share:.0f}{THIN}%",
            share,
            "of the total rise",
            f"the part of the {count(number)} items that add most to it; the total rise is that "
            "of all items that got worse, in nats, and leaves out what others gained",
        ),
    ]
    predictions = all(item.right is not None for item in items)
    if predictions:
        lost, won = sum(i.lost for i in items), sum(i.won for i in items)
        facts = [
            Fact(heads.lost, count(lost), float(lost), "items", "right before compression only"),
            Fact(heads.won, count(won), float(won), "items", "right after compression only"),
            *facts,
        ]
    ranked = sorted(items, key=lambda i: -i.rise)
    return {
        "facts": facts,
        "flips": flips(items, heads, name="flips", measure=measure) if predictions else None,
        "agreement": record.get("objective") == "label-free",
        "rises": _table("rises", [i for i in ranked if i.rise > 0][:ROWS], heads, measure=measure),
        "falls": _table(
            "falls", [i for i in ranked[::-1] if i.rise < 0][:ROWS], heads, measure=measure
        ),
        "documents": _documents(items, measure=measure),
        "measure": measure,
    }
