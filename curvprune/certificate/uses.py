"""What a certify split was used for: each look at its items spends confidence, so looks are
counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from curvprune.certificate.unseen import confidence_text
from curvprune.certificate.verdict import Verdict
from curvprune.model import Split

# Splits that a process remembers; the oldest are forgotten.
_REMEMBERED = 1000
_TOLD = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """One use of a split: what tells it from others, and what to call it.

    A model judged again by the same budget, on whatever path, is no other use: ``keys`` are of
    budgets and results.
    """

    keys: tuple[str, ...]
    text: str

    @staticmethod
    def of(verdicts: Sequence[Verdict], *, judged: bool = True) -> Use:
        """The use that ended with these verdicts, at least one, of one budget."""
        keys = tuple(map(_key, verdicts))
        first = verdicts[0]
        if not judged:
            return Use(keys=keys, text=f"{first.metric} measured, without a budget")
        return Use(
            keys=keys,
            text=(
                f"{first.metric} drop of at most {first.max_drop:g} at "
                f"{confidence_text(first.confidence)} confidence"
            ),
        )


def _key(verdict: Verdict) -> str:
    # Five digits: batches of another size leave the last ones different.
    result = f"{verdict.baseline:.5g} {verdict.compressed:.5g}"
    return f"{verdict.metric} {verdict.max_drop!r} {verdict.confidence!r} {result}"


class Uses(Protocol):
    """Where uses are kept."""

    def enter(self, split: Split, use: Use) -> tuple[str, ...]:
        """Keep a use of a split, if it is new; returns the earlier uses of its items, by their
        texts."""
        ...


@dataclass(kw_only=True, slots=True)
class Entry:
    """A use that is kept, and the earlier ones when it was."""

    use: Use
    earlier: tuple[str, ...]


@dataclass(slots=True)
class UsesInMemory:
    """The uses of splits in this process."""

    books: dict[frozenset[bytes], list[Entry]] = field(default_factory=dict)

    def enter(self, split: Split, use: Use) -> tuple[str, ...]:
        items = split.digests()
        # 1. What is known of splits that share an item with this one.
        entries: list[Entry] = []
        for others, found in self.books.items():
            if not items.isdisjoint(others):
                entries += found
        if (known := known_entry(entries, use)) is not None:
            return known.earlier
        # 2. Another use.
        earlier = tuple(entry.use.text for entry in entries)
        self.books.setdefault(items, []).append(Entry(use=use, earlier=earlier))
        while len(self.books) > _REMEMBERED:
            del self.books[next(iter(self.books))]
        return earlier


def known_entry(entries: Sequence[Entry], use: Use) -> Entry | None:
    """The entry of this very use, if there is one."""
    for entry in entries:
        if not set(use.keys).isdisjoint(entry.use.keys):
            return entry
    return None


#: The uses of this process.
IN_THIS_PROCESS = UsesInMemory()


def counted(
    verdicts: Sequence[Verdict], split: Split, uses: Uses, *, judged: bool = True
) -> list[Verdict]:
    """Verdicts of one budget on a split, with what its items were used for before; the use is
    kept."""
    earlier = uses.enter(split, Use.of(verdicts, judged=judged))
    note = earlier_text(earlier)
    return [replace(verdict.noting(note), earlier=earlier) for verdict in verdicts]


def earlier_text(earlier: Sequence[str]) -> str:
    """What to say of earlier uses; empty where there are none."""
    if not earlier:
        return ""
    number = len(earlier)
    told = "; ".join(earlier[-_TOLD:])
    more = f"; and {number - _TOLD} more" if number > _TOLD else ""
    times = "1 verdict" if number == 1 else f"{number} verdicts"
    return (
        f"items of this certify split have been used for {times} before ({told}{more}): each look "
        "spends confidence, and this verdict holds only if its budget and model were fixed before "
        "them"
    )
