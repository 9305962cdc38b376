"""Data as items: splits that share nothing, and batches made of items of any length."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvprune.model.batches import Collate, as_batch, as_item, collate, one_of
from curvprune.model.contents import Content, content_of, joined, known_among, same_items
from curvprune.model.forward import Batch, Gathered, axis_of, items_in, take


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Items of one purpose. Each is a batch of one; ``documents`` says which belong together.

    ``collate``: what puts several items into one batch, where it is the user's own.
    """

    items: tuple[Batch, ...]
    documents: tuple[str, ...]
    collate: Collate | None = field(default=None, compare=False)
    # What the items hold, filled when it is first asked for.
    _contents: list[Content] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        # An item may have been made by hand, with as many rows as it has patches.
        object.__setattr__(self, "items", tuple(map(_marked, self.items)))

    def some(self, places: Iterable[int]) -> Split:
        """The items at some places."""
        chosen = list(places)
        return Split(
            items=tuple(self.items[i] for i in chosen),
            documents=tuple(self.documents[i] for i in chosen),
            collate=self.collate,
        )

    def together(self, items: Sequence[Batch] | None = None) -> Batch:
        """Items, or all, as one batch. Raises ``ValueError`` where they do not go together."""
        chosen = self.items if items is None else items
        if self.collate is None:
            return collate(chosen)
        found = self.collate(list(chosen))
        try:
            batch = as_batch(found)
        except ValueError:
            # Its rows are no items, as in a packed sequence: it can be run, not taken apart.
            if not isinstance(found, Mapping):
                raise
            return Gathered(found, count=len(chosen), rows={})
        if isinstance(batch, Gathered):
            batch.count = len(chosen)
        return batch

    def calibration(self) -> tuple[Batch, int]:
        """The most items that go together as one batch, and how many are left out. Items of one
        form go together, where not all do."""
        try:
            return self.together(), 0
        except ValueError:
            if self.collate is not None:
                raise
        forms: dict[Hashable, list[Batch]] = {}
        for item in self.items:
            forms.setdefault(_form(item), []).append(item)
        most = max(forms.values(), key=len)
        try:
            batch = self.together(most)
        except ValueError:
            batch, most = self.items[0], [self.items[0]]
        return batch, len(self.items) - len(most)

    def left_out(self) -> tuple[str, ...]:
        """A note if layers are not solved for the inputs of all items."""
        out = self.calibration()[1]
        if not out:
            return ()
        count = len(self.items)
        note = (
            f"layers were solved for the inputs of {count - out} of the {count} calibration items: "
            "the others do not go together with them in one batch; pass items of one shape, or "
            "cp.Items(items, collate=...)"
        )
        return (note,)

    def first(self, size: int = 8) -> Batch:
        """The first items as one batch, to tell a loss by; one alone where they do not go
        together."""
        return next(self.batches(size))

    def batches(self, size: int) -> Iterator[Batch]:
        """Consecutive items, ``size`` at a time; the last batch may be smaller. Items that do not
        go together, and those whose rows are no items, come one by one."""
        for start in range(0, len(self.items), size):
            items = self.items[start : start + size]
            try:
                batch = self.together(items)
            except ValueError:
                yield from items
                continue
            # What a model says of one item must not depend on how rows were told apart.
            apart = not isinstance(batch, Gathered) and items_in(batch) == len(items)
            yield from ([batch] if apart or len(items) == 1 else map(self._alone, items))

    def _alone(self, item: Batch) -> Batch:
        return item if self.collate is None else self.together([item])

    def sha256(self) -> str:
        """Hash of the content, for provenance and for telling whether a resumed run sees the same
        data."""
        # In order, because order decides what a batch is.
        digest = hashlib.sha256()
        for item, document in zip(self.items, self.documents, strict=True):
            digest.update(document.encode())
            _digest(digest, item)
        return digest.hexdigest()

    def contents(self) -> list[Content]:
        """What every item holds, however it is written: see `curvprune.model.contents`."""
        if len(self._contents) != len(self.items):
            self._contents[:] = [content_of(item) for item in self.items]
        return self._contents

    def digests(self) -> frozenset[bytes]:
        """Hashes of the items' inputs: what tells whether one stands in another split too."""
        found: set[bytes] = set()
        for content in self.contents():
            found |= content.inputs
        return frozenset(found)

    def copies(self) -> NDArray[np.int_]:
        """For every item a number that it shares with those that hold the same."""
        return joined(self._same())

    def clusters(self) -> NDArray[np.int_]:
        """The number of every item's cluster: items of one document, and items that hold the same,
        are one; a document that shares an item with another joins it."""
        return joined(self.documents, self._same())

    def _same(self) -> list[Hashable]:
        # Of a split read from a record the documents are known, not the items.
        if len(self.items) != len(self.documents):
            return list(range(len(self.documents)))
        return same_items(self.contents())

    def leak(self, seen: frozenset[bytes]) -> str | None:
        """A warning if items of this split, which is to certify, are among those ``seen``; else
        ``None``."""
        repeated = known_among(self.contents(), seen)
        if not repeated:
            return None
        return (
            f"{repeated} of the {len(self.items)} items of the certify split have also made or "
            "chosen the model: the verdict is not independent of them; certify on items that "
            "nothing else has seen, without duplicates"
        )


def _digest(digest: Any, item: Batch) -> None:
    """Feed an item's tensors to a hash, as they are written."""
    if isinstance(item, Mapping):
        named = sorted(item.items())
    else:
        named = list(zip(("inputs", "targets"), item, strict=False))
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # As bytes, because NumPy has no bfloat16.
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())


PURPOSES = ("calibrate", "price", "select", "certify")
EXTRA = "recover"  # a purpose that is left out where nothing is asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The purposes, which must share no item.

    Attributes:
        calibrate: the inputs that layers are solved for.
        price: where solved changes are priced. A rounded or pruned weight fits the inputs it was
            solved for better than any others, so prices from the calibration items would be too low
            (by a third on SmolLM2-135M).
        select: where plans are measured and chosen.
        certify: opened once, at the end.
        recover: what a recovery trains on; ``None``: the calibration items.
    """

    calibrate: Split
    price: Split
    select: Split
    certify: Split
    recover: Split | None = None

    def __post_init__(self) -> None:
        for purpose in (*PURPOSES, EXTRA):
            given = getattr(self, purpose)
            if given is not None and not isinstance(given, Split):
                object.__setattr__(self, purpose, as_split(given))

    @property
    def training(self) -> Split:
        """The items that a recovery trains on."""
        return self.calibrate if self.recover is None else self.recover

    def sha256(self) -> dict[str, str]:
        """Hash of each split."""
        hashes = {purpose: getattr(self, purpose).sha256() for purpose in PURPOSES}
        if self.recover is not None:
            hashes[EXTRA] = self.recover.sha256()
        return hashes

    def seen(self) -> frozenset[bytes]:
        """Hashes of the items that a model is made from and chosen by."""
        found: set[bytes] = set()
        for split in (self.calibrate, self.price, self.select, self.training):
            found.update(split.digests())
        return frozenset(found)

    def too_few(self) -> str | None:
        """Why no bound can be had, if all items of select or of certify are one document, or one
        and the same: what it loses says nothing of others."""
        for purpose in ("select", "certify"):
            split: Split = getattr(self, purpose)
            documents = len(set(split.documents))
            if documents < 2:
                return (
                    f"the {purpose} split has items of {documents} document only; a budget "
                    "needs two at the very least, better a dozen; give more and shorter "
                    "documents, or more items"
                )
            if not split.clusters().any():
                return (
                    f"the {len(split.items)} items of the {purpose} split are one cluster: they, "
                    "or their documents, repeat each other; a bound needs at least 2 independent "
                    "items; give items that differ"
                )
        return None

    def leak(self) -> str | None:
        """A warning if items of the certify split also stand in another split, however written;
        else ``None``."""
        return self.certify.leak(self.seen())


def _marked(item: Batch) -> Batch:
    """An item that says which of its rows are no items."""
    if not isinstance(item, Mapping) or isinstance(item, Gathered):
        return item
    rows = {value.shape[axis_of(n, value)] for n, value in item.items() if value.ndim}
    return item if len(rows) < 2 else as_item(item)


def _form(item: Batch) -> Hashable:
    """What items must have in common to be put together."""
    if not isinstance(item, Mapping):
        return tuple(value.shape[1:] for value in item)
    shapes = []
    for name, value in sorted(item.items()):
        sequence = name.endswith(("input_ids", "_mask", "labels", "type_ids")) and value.ndim == 2
        shapes.append((name, None if sequence else value.shape[1:]))
    return tuple(shapes)


class Items:
    """Items as processors make them, for models that take images, sound or graphs with their text.

    A batch is then not cut into rows: `pixel_values` of Qwen-VL has a row for every patch, that of
    LLaVA-NeXT one for every tile. Items are evaluated one by one; a layer is solved for the inputs
    of all of them, in one batch.

    Args:
        items: each what a processor returns for one text with its images, ``return_tensors="pt"``:
            a dict of tensors, with labels where there are any. The iterable is read once.
        collate: a function of a list of items to one batch. Unless given, sequences are padded, and
            other tensors whose rows are no items lie one item's below the other's.
        documents: which items belong together, a name for each; unless given, each is its own.

    Raises ``ValueError`` naming an item that is none.

    Example:
        >>> import torch, curvprune as cp
        >>> def made(patches):
        ...     grid = torch.tensor([[1, 2, patches // 2]])
        ...     ids = torch.ones(1, 5, dtype=torch.long)
        ...     pixels = torch.zeros(patches, 12)
        ...     return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
        >>> items = cp.Items([made(4), made(6)])
        >>> len(items), [len(item["pixel_values"]) for item in items]
        (2, [4, 6])
    """

    def __init__(
        self,
        items: Iterable[Any],
        *,
        collate: Collate | None = None,
        documents: Sequence[str] | None = None,
    ) -> None:
        self.items = tuple(one_of(item, i) for i, item in enumerate(items))
        if not self.items:
            raise ValueError("Items: there is no item; pass at least one")
        if collate is not None and not callable(collate):
            raise ValueError(
                f"Items: collate={collate!r}: expected a function of a list of items to one batch"
            )
        names = [f"item {i}" for i in range(len(self.items))] if documents is None else documents
        if len(names) != len(self.items):
            raise ValueError(
                f"Items: {len(names)} documents for {len(self.items)} items; expected one for each"
            )
        self.collate, self.documents = collate, tuple(map(str, names))

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)

    @property
    def split(self) -> Split:
        """The same as a `Split`."""
        return Split(items=self.items, documents=self.documents, collate=self.collate)


def batches_of(data: Any) -> Iterator[Batch]:
    """The batches of data, each in a known form. Data that is one batch is refused or taken as it
    is meant."""
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ValueError(
            f"data is a {type(data).__name__}; expected batches to iterate over, such as a "
            "DataLoader or a list"
        )
    # Iterating over one batch would give its rows, or its keys.
    if isinstance(data, (Tensor, np.ndarray, Mapping)):
        return iter([as_batch(data)])
    if isinstance(data, (tuple, list)) and len(data) > 1 and _is_a_pair(data):
        raise ValueError(
            f"data is a {type(data).__name__} of tensors of shapes "
            f"{[tuple(part.shape) for part in data]}, which looks like one batch; pass "
            "[(inputs, targets)], a list of batches"
        )
    return map(as_batch, data)


def _is_a_pair(data: Sequence[Any]) -> bool:
    """Tensors that differ in kind are no batches of inputs alone, and a tuple of tensors is one
    batch."""
    if not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        return False
    kinds = {(part.ndim, part.dtype) for part in data}
    return isinstance(data, tuple) or len(kinds) > 1


def itemize(batches: Iterable[Any]) -> list[Batch]:
    """Take batches apart into items of one, in order. Entries of a dict that are None are as good
    as absent."""
    items: list[Batch] = []
    for batch in batches_of(batches):
        if isinstance(batch, tuple):
            _check_rows(batch)
        items += [take(batch, slice(i, i + 1)) for i in range(items_in(batch))]
    if not items:
        raise ValueError("data is empty; it must be re-iterable and hold at least one batch")
    return items


def _check_rows(batch: tuple[Tensor, ...]) -> None:
    inputs, targets = batch[0], batch[-1]
    if targets.ndim == 0 or len(targets) != len(inputs):
        raise ValueError(
            f"data: a batch of {len(inputs)} inputs with targets of shape {tuple(targets.shape)}"
        )


def as_split(data: Split | Iterable[Any], name: str = "item") -> Split:
    """Any iterable of batches, read once, as a `Split`; if nothing else is said, every item is its
    own document."""
    if isinstance(data, Split):
        return data
    if isinstance(data, Items):
        return data.split
    items = itemize(data)
    return Split(items=tuple(items), documents=tuple(f"{name} {i}" for i in range(len(items))))


def split_items(data: Iterable[Batch] | Split, *, seed: int) -> Splits:
    """Shuffle the items of ``data`` and deal them out: a quarter to calibrate, an eighth to price,
    an eighth to select, half to certify.

    A `Split` says which items belong together: of its documents, whole ones are dealt.

    Raises ``ValueError`` below 16 items, with which no budget can be decided, or if documents are
    too few to deal.
    """
    split = as_split(data)
    if len(set(split.documents)) < len(split.documents):
        return _split_documents(split, seed=seed)
    items = split.items
    if len(items) < 16:
        raise ValueError(
            f"data has {len(items)} items; a budget needs at least 16 (they are split four "
            "ways), or pass Splits(calibrate=..., price=..., select=..., certify=...)"
        )
    # Bounds at two, three and four eighths: the rest certifies.
    order = np.random.default_rng(seed).permutation(len(items))
    bounds = [len(items) * eighths // 8 for eighths in (2, 3, 4)]
    splits = {}
    for purpose, part in zip(PURPOSES, np.split(order, bounds), strict=True):
        splits[purpose] = split.some(part.tolist())
    return Splits(**splits)


def _split_documents(data: Split, *, seed: int) -> Splits:
    # 1. Whole documents to each purpose, by how many items they have.
    where: dict[str, list[int]] = {}
    for i, name in enumerate(data.documents):
        where.setdefault(name, []).append(i)
    sizes = {name: len(found) for name, found in where.items()}
    dealt = deal_documents(sizes, dict(zip(PURPOSES, (2, 1, 1, 4), strict=True)), seed=seed)
    if len(data.items) < 16 or any(not names for names in dealt.values()):
        raise ValueError(
            f"data has {len(data.items)} items in {len(where)} documents; a budget needs at "
            "least 16 items, in enough documents for four splits that share none, or pass "
            "Splits(calibrate=..., price=..., select=..., certify=...)"
        )
    # 2. Their items, document by document.
    splits = {}
    for purpose, names in dealt.items():
        places = list(chain.from_iterable(where[name] for name in names))
        splits[purpose] = data.some(places)
    return Splits(**splits)


def deal_documents(
    sizes: Mapping[str, int], counts: Mapping[str, int], *, seed: int
) -> dict[str, list[str]]:
    """Whole documents in a seeded random order, each to the purpose that is furthest from its
    count."""
    dealt: dict[str, list[str]] = {purpose: [] for purpose in counts}
    filled = dict.fromkeys(counts, 0)
    # Sorted first: the same documents are dealt the same way in whatever order they come.
    names = sorted(sizes)
    for i in np.random.default_rng(seed).permutation(len(names)):
        name = names[i]
        # To whom most is missing of what it is to have.
        target = min(counts, key=lambda purpose: filled[purpose] / counts[purpose])
        dealt[target].append(name)
        filled[target] += sizes[name]
    return dealt
