"""What a section shows in tables and lists of figures. No HTML here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from curvprune.report.figures import count, finite, plus_minus, size


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell: ``sort`` is the number behind a rounded text, ``swatch`` a colour shown
    before it."""

    text: object
    sort: float | None = None
    class_: str = ""
    title: str = ""
    swatch: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A table head: ``hint`` explains the quantity, ``class_`` is ``n`` for numbers."""

    label: str
    hint: str = ""
    class_: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the template; ``foot`` is a last row that sorting leaves in place."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    foot: Sequence[Cell] = ()


@dataclass(frozen=True, slots=True)
class Fact:
    """A labelled number; ``value`` is the record's own number behind ``text``."""

    label: str
    text: str
    value: float | None
    measure: str = ""
    hint: str = ""


def number_cell(value: float | None, text: str, class_: str = "n", title: str = "") -> Cell:
    """A right-aligned cell that sorts by the number itself."""
    return Cell(text, finite(value), class_, title)


def count_cell(value: float | None) -> Cell:
    """A whole number."""
    return number_cell(value, count(value))


def bytes_cell(value: float | None) -> Cell:
    """A size, with the exact bytes in its tooltip."""
    return number_cell(value, size(value), title=f"{count(value)} B")


def error_cell(value: float | None, stderr: float | None) -> Cell:
    """A number with its standard error."""
    return number_cell(value, plus_minus(value, stderr))


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _common_prefix(names: Sequence[str]) -> str:
    """The longest dotted prefix that four in five names share: leaving it out makes labels
    short."""
    # Not of all names: a head or an embedding outside the blocks must not spoil it.
    prefixes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        prefixes.update(".".join(parts[:k]) + "." for k in range(1, len(parts)))
    common = [p for p, n in prefixes.items() if n >= 0.8 * len(names) and n > 1]
    return max(common, key=len, default="")


def labels_of(names: Sequence[str], *, longest: int) -> tuple[str, list[str]]:
    """The prefix left out, and a label for each name, shortened in the middle where it is still too
    long."""
    prefix = _common_prefix(names)
    labels = []
    for name in names:
        label = name.removeprefix(prefix) or name
        if len(label) > longest:
            label = f"{label[: longest // 2 - 1]}\N{HORIZONTAL ELLIPSIS}{label[-(longest // 2) :]}"
        labels.append(label)
    return prefix, labels
