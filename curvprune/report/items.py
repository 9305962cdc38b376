"""Which items of the certify split changed, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvprune.record import ItemColumns, RunRecord
from curvprune.report.figures import THIN, count, sig, whole_percent
from curvprune.report.tables import Cell, Column, Fact, Table, count_cell, number_cell

ROWS = 20  # of each kind of item that a table shows
DOCUMENTS = 100
WORST = 0.05  # the share of the items whose part in the total rise is told


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One item under two models: loss per position, and whether its one prediction was right
    (``None`` if it has several)."""

    document: str
    index: int
    positions: int
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


@dataclass(frozen=True, slots=True)
class Shortened:
    """A table, and how many of its rows were left out."""

    table: Table
    left_out: int


def read(columns: ItemColumns) -> list[Item]:
    """The items on record."""
    items = []
    for row, document in enumerate(columns.document):
        right = None
        if columns.right_before is not None and columns.right_after is not None:
            right = columns.right_before[row] == 1, columns.right_after[row] == 1
        items.append(
            Item(
                document=columns.documents[document],
                index=columns.index[row],
                positions=columns.count[row],
                before=columns.before[row],
                after=columns.after[row],
                right=right,
            )
        )
    return items


def flips(items: Sequence[Item], heads: Heads, *, name: str, measure: str) -> Shortened:
    """The items that are right under one model only, `ROWS` of either kind at most."""
    # Both kinds get their places, else many of one would hide the few of the other.
    ranked = sorted(items, key=lambda item: -abs(item.rise))
    lost, won = [item for item in ranked if item.lost], [item for item in ranked if item.won]
    shown = [*lost[:ROWS], *won[:ROWS]]
    left_out = len(lost) + len(won) - len(shown)
    return Shortened(_table(name, shown, heads, measure=measure), left_out)


def _table(name: str, items: Sequence[Item], heads: Heads, *, measure: str) -> Table:
    """Columns that would say the same of every item are left out."""
    flipped = any(item.lost or item.won for item in items)
    several = any(item.positions != 1 for item in items)
    columns = [Column("item", "place in the certify split, from 0", "n"), Column("document")]
    if flipped:
        columns.append(Column("change"))
    if several:
        columns.append(Column("positions", "how many of the item count", "n"))
    columns += _loss_columns(heads, measure)
    rows = []
    for item in items:
        row = [count_cell(item.index), Cell(item.document, class_="mono")]
        if flipped:
            row.append(Cell(_change(item, heads)))
        if several:
            row.append(count_cell(item.positions))
        rows.append([*row, *_loss_cells(item.before, item.after)])
    return Table(name, columns, rows)


def _change(item: Item, heads: Heads) -> str:
    if item.lost:
        return heads.lost
    return heads.won if item.won else ""


def _loss_columns(heads: Heads, measure: str) -> list[Column]:
    return [
        Column(heads.before, f"loss per position, {measure}", "n"),
        Column(heads.after, f"loss per position, {measure}", "n"),
        Column("rise", f"of the loss per position, {measure}", "n"),
    ]


def _loss_cells(before: float, after: float) -> list[Cell]:
    rise = after - before
    return [
        number_cell(before, sig(before, 4)),
        number_cell(after, sig(after, 4)),
        number_cell(rise, sig(rise)),
    ]


def _documents(items: Sequence[Item], *, measure: str) -> Shortened | None:
    """Documents from the largest rise to the largest fall; ``None`` where every item is a document
    of its own."""
    by_document: dict[str, list[Item]] = {}
    for item in items:
        by_document.setdefault(item.document, []).append(item)
    if len(by_document) == len(items):
        return None
    # 1. Columns; rights and wrongs only where every item is one prediction.
    predictions, heads = all(item.right is not None for item in items), Heads()
    columns = [
        Column("document"),
        Column("items", "of the certify split", "n"),
        Column("positions", "that count", "n"),
        *_loss_columns(heads, measure),
    ]
    if predictions:
        columns += [Column(heads.lost, "items", "n"), Column(heads.won, "items", "n")]
    ranked = []
    for name, inside in by_document.items():
        # 2. Means over positions, so that a long item weighs as much as in the verdict.
        positions = math.fsum(item.positions for item in inside)
        before = math.fsum(item.before * item.positions for item in inside) / positions
        after = math.fsum(item.after * item.positions for item in inside) / positions
        row = [Cell(name, class_="mono"), count_cell(len(inside)), count_cell(positions)]
        row += _loss_cells(before, after)
        if predictions:
            row += [count_cell(sum(item.lost for item in inside))]
            row += [count_cell(sum(item.won for item in inside))]
        ranked.append((after - before, row))
    # 3. The largest rises first; a long tail is left out.
    ranked.sort(key=lambda found: -found[0])
    rows = [row for _, row in ranked]
    left_out = max(0, len(rows) - DOCUMENTS)
    return Shortened(Table("documents", columns, rows[:DOCUMENTS]), left_out)


def worst_share(items: Sequence[Item]) -> tuple[int, float | None]:
    """How many items are the worst `WORST` of all, and their share of the total rise: the rises in
    nats of all items that got worse, added up. ``None`` if none did."""
    rises = sorted((max(0.0, item.rise * item.positions) for item in items), reverse=True)
    worst, total = math.ceil(WORST * len(rises)), math.fsum(rises)
    return worst, math.fsum(rises[:worst]) / total if total > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """Figures, flipped items, the largest rises and falls, documents. ``agreement``: right means
    the uncompressed model's own answer."""

    facts: list[Fact]
    flips: Shortened | None
    agreement: bool
    rises: Table
    falls: Table
    documents: Shortened | None


def changed(record: RunRecord) -> Changed | None:
    """What the section shows; ``None`` where no model was measured on the certify split."""
    if record.items is None or not record.items.count:
        return None
    items, measure, heads = read(record.items), record.measure, Heads()
    # 1. Items that are one prediction each: which of them flipped.
    flipped, flip_facts = None, []
    if all(item.right is not None for item in items):
        flipped = flips(items, heads, name="flips", measure=measure)
        flip_facts = _flip_facts(items, heads)
    # 2. All items, by the rise of their loss.
    ranked = sorted(items, key=lambda item: -item.rise)
    rises = [item for item in ranked if item.rise > 0]
    falls = [item for item in reversed(ranked) if item.rise < 0]
    return Changed(
        facts=[*flip_facts, *_loss_facts(items)],
        flips=flipped,
        agreement=record.objective == "label-free",
        rises=_table("rises", rises[:ROWS], heads, measure=measure),
        falls=_table("falls", falls[:ROWS], heads, measure=measure),
        documents=_documents(items, measure=measure),
    )


def _flip_facts(items: Sequence[Item], heads: Heads) -> list[Fact]:
    lost, won = sum(item.lost for item in items), sum(item.won for item in items)
    return [
        Fact(heads.lost, count(lost), float(lost), "items", "right before compression only"),
        Fact(heads.won, count(won), float(won), "items", "right after compression only"),
    ]


def _loss_facts(items: Sequence[Item]) -> list[Fact]:
    worse, better = sum(item.rise > 0 for item in items), sum(item.rise < 0 for item in items)
    number, share = worst_share(items)
    hint = (
        f"the part of the {count(number)} items that add most to it; the total rise is that "
        "of all items that got worse, in nats, and leaves out what others gained"
    )
    return [
        Fact(
            "got worse",
            count(worse),
            float(worse),
            f"of {count(len(items))}",
            "items whose loss rose",
        ),
        Fact("got better", count(better), float(better), "items", "items whose loss fell"),
        Fact(
            f"worst {100 * WORST:.0f}{THIN}%",
            whole_percent(share),
            share,
            "of the total rise",
            hint,
        ),
    ]
