"""What certify splits were used for by the runs whose folders lie beside each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from curvprune.certificate import Entry, Use, known_entry
from curvprune.files import State
from curvprune.model import DIGEST_BYTES, Split
from curvprune.schema import decode, encode

FOLDER = ".curvprune-certified"  # beside the run folders
_ITEMS = "items"
_SEAL = "uses"


@dataclass(frozen=True, kw_only=True, slots=True)
class UseRecord:
    """A use of a certify split, in a file of its own: no two runs write the same one.

    ``number`` counts them in the order in which they came.
    """

    number: int
    keys: tuple[str, ...]
    text: str
    earlier: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UsesInFolder:
    """A folder for each split, named by what it holds, with a file for each use."""

    folder: Path

    def enter(self, split: Split, use: Use) -> tuple[str, ...]:
        """As `curvprune.certificate.Uses`. A run that is repeated finds its own entry."""
        items = split.digests()
        # 1. What the runs beside this one have used these items for.
        records = self._records(items)
        entries = []
        for record in sorted(records, key=lambda record: record.number):
            known = Use(keys=record.keys, text=record.text)
            entries.append(Entry(use=known, earlier=record.earlier))
        if (found := known_entry(entries, use)) is not None:
            return found.earlier
        # 2. Another use.
        earlier = tuple(entry.use.text for entry in entries)
        number = max((record.number for record in records), default=0) + 1
        record = UseRecord(number=number, keys=use.keys, text=use.text, earlier=earlier)
        joined = b"".join(sorted(items))
        book = State(self.folder / _name_of(joined), seal=_SEAL)
        book.write_text(_ITEMS, joined.hex() + "\n")
        name = hashlib.sha256(use.keys[0].encode()).hexdigest()[:16]
        book.write_json(f"{name}.json", encode(record))
        return earlier

    def check(self, split: Split) -> None:
        """Raises ``ValueError`` naming a file that is not what was written, before a run needs
        it."""
        self._records(split.digests())

    def _records(self, items: frozenset[bytes]) -> list[UseRecord]:
        """The uses of splits that share an item with this one."""
        found = []
        for book in sorted(self.folder.glob("*")):
            state = State(book, seal=_SEAL)
            if not state.has(_ITEMS):
                continue
            content = _content(state)
            theirs = {content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES)}
            if items.isdisjoint(theirs):
                continue
            for path in sorted(book.glob("*.json")):
                try:
                    record = state.read_json(path.name)
                except ValueError as error:
                    raise _damaged(path) from error
                found.append(decode(UseRecord, record, source=str(path)))
        return found


def _name_of(joined: bytes) -> str:
    return hashlib.sha256(joined).hexdigest()[:16]


def _content(state: State) -> bytes:
    """The hashes of a split's items, one after the other, which the folder is named by."""
    try:
        content = bytes.fromhex(state.read_text(_ITEMS).strip())
    except ValueError as error:
        raise _damaged(state.path(_ITEMS)) from error
    if _name_of(content) != state.folder.name:
        raise _damaged(state.path(_ITEMS))
    return content


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} is damaged: it says what certify items were used for, and no verdict on them is "
        f"right without; restore it, or delete {path.parent}, and say yourself what the items were "
        "used for"
    )
