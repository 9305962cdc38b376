"""Data as items: splits that share nothing, and batches made of items of any length."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from curvprune.model.contents import Content, content_of, joined, known_among, same_items
from curvprune.model.forward import Batch
from curvprune.model.losses.families import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Items of one purpose. Each is a batch of one; ``documents`` says which belong together."""

    items: tuple[Batch, ...]
    documents: tuple[str, ...]
    # What the items hold, filled when it is first asked for.
    _contents: list[Content] = field(init=False, repr=False, compare=False, default_factory=list)

    def first(self, size: int = 8) -> Batch:
        """The first items as one batch, to tell a loss by; one alone where they do not go
        together."""
        try:
            return collate(self.items[:size])
        except ValueError:
            return self.items[0]

    def batches(self, size: int) -> Iterator[Batch]:
        """Consecutive items, ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self.items), size):
            yield collate(self.items[start : start + size])

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
        named = [("inputs", item[0]), ("targets", item[1])]
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


def collate(items: Sequence[Batch]) -> Batch:
    """One batch from several items. Sequences of different length are padded on the right:
    ``input_ids`` and ``attention_mask`` with 0, ``labels`` with −100.

    Raises ``ValueError`` for items of different kinds or for ragged tensors that no mask can
    describe.
    """
    if not isinstance(items[0], Mapping):
        return _collate_pairs(items)
    names = items[0].keys()
    dicts = [dict(item) for item in items if isinstance(item, Mapping) and item.keys() == names]
    if len(dicts) != len(items):
        raise ValueError(f"collate: items must have the same keys as the first, {sorted(names)}")
    # 1. Sequences are padded to the longest, with a mask that says where they end.
    if "input_ids" in names:
        lengths = {item["input_ids"].shape[1] for item in dicts}
        if len(lengths) > 1:
            dicts = [_padded(item, max(lengths)) for item in dicts]
    # 2. One item below the other, where what is left fits as it is.
    batch = {}
    for name in dicts[0]:
        shapes = {tuple(item[name].shape[1:]) for item in dicts}
        if len(shapes) > 1:
            raise ValueError(
                f"collate: {name!r} has different shapes and cannot be padded: {sorted(shapes)}"
            )
        batch[name] = torch.cat([item[name] for item in dicts])
    return batch


def _collate_pairs(items: Sequence[Batch]) -> Batch:
    pairs = [item for item in items if not isinstance(item, Mapping)]
    shapes = {inputs.shape[1:] for inputs, _ in pairs}
    if len(pairs) != len(items) or len(shapes) > 1:
        raise ValueError(
            "collate: (inputs, targets) items must all have inputs of one shape; use dict "
            "batches with an attention_mask for sequences of different length"
        )
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _padded(item: Mapping[str, Tensor], longest: int) -> dict[str, Tensor]:
    """A sequence with everything that is as long as its tokens padded on the right."""
    tokens = item["input_ids"]
    length = tokens.shape[1]
    padded = {**item}
    padded.setdefault("attention_mask", torch.ones_like(tokens))
    for name, tensor in padded.items():
        if tensor.ndim == 2 and tensor.shape[1] == length:
            fill = IGNORED if name == "labels" else 0
            padded[name] = F.pad(tensor, (0, longest - length), value=fill)
    return padded


def as_batch(given: Any) -> Batch:
    """A batch as the user gave it: a dict of tensors, ``(inputs, targets)``, or a dict of inputs
    with its targets, which become its labels.

    Raises ``ValueError`` for anything else, saying what to pass instead.
    """
    if isinstance(given, Mapping):
        return given
    if isinstance(given, (tuple, list)) and len(given) == 2:
        inputs, targets = given
        if isinstance(inputs, Tensor) and targets is not None:
            return inputs, torch.as_tensor(targets)
        if isinstance(inputs, Mapping) and targets is not None:
            if inputs.get("labels") is not None:
                raise ValueError(
                    "data: a batch is (dict, targets), and the dict has labels too; leave one of "
                    "them out"
                )
            return {**inputs, "labels": torch.as_tensor(targets)}
    if isinstance(given, (tuple, list)):
        kinds = ", ".join(type(part).__name__ for part in given)
        what = f"a {type(given).__name__} of {len(given)} ({kinds})"
    else:
        what = f"a {type(given).__name__}"
    raise ValueError(
        f"data: a batch is {what}; expected (inputs, targets) or a dict of tensors, named as the "
        'model\'s arguments: {"x": x} without targets, {"x": x, "labels": y} with them, and '
        '"sample_weight" for weights of items'
    )


def itemize(batches: Iterable[Batch]) -> list[Batch]:
    """Take batches apart into items of one, in order. Entries of a dict that are None are as good
    as absent."""
    items: list[Batch] = []
    for batch in batches:
        known = as_batch(batch)
        if isinstance(known, Mapping):
            items += _items_of_dict(known)
        else:
            items += _items_of_pair(known[0], known[1])
    if not items:
        raise ValueError("data is empty; it must be re-iterable and hold at least one batch")
    return items


def _items_of_dict(batch: Mapping[str, object]) -> list[Batch]:
    # 1. Every entry must have a row for each item, or it would be lost or given to all.
    tensors: dict[str, Tensor] = {}
    for name, value in batch.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.ndim == 0:
            kind = "a number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"data: batch entry {name!r} is {kind}; expected a tensor with a row for "
                "each item. Leave it out, or give it to the model in a wrapper"
            )
        tensors[name] = value
    if not tensors:
        raise ValueError(f"data: a batch without tensors, with keys {sorted(batch)}")
    sizes = {name: len(value) for name, value in tensors.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"data: the entries of a batch have different numbers of items, {sizes}")
    # 2. Row by row; a slice keeps the dimension that counts items.
    items: list[Batch] = []
    for i in range(next(iter(sizes.values()))):
        items.append({name: tensor[i : i + 1] for name, tensor in tensors.items()})
    return items


def _items_of_pair(inputs: Tensor, given: Any) -> list[Batch]:
    # Labels may be a list, as data loaders of other libraries give them.
    targets = torch.as_tensor(given)
    if targets.ndim == 0 or len(targets) != len(inputs):
        raise ValueError(
            f"data: a batch of {len(inputs)} inputs with targets of shape {tuple(targets.shape)}"
        )
    return [(inputs[i : i + 1], targets[i : i + 1]) for i in range(len(inputs))]


def as_split(data: Split | Iterable[Batch], name: str = "item") -> Split:
    """Any re-iterable of batches as a `Split` in which every item is its own document."""
    if isinstance(data, Split):
        return data
    items = itemize(data)
    return Split(items=tuple(items), documents=tuple(f"{name} {i}" for i in range(len(items))))


def split_items(data: Iterable[Batch] | Split, *, seed: int) -> Splits:
    """Shuffle the items of ``data`` and deal them out: a quarter to calibrate, an eighth to price,
    an eighth to select, half to certify.

    A `Split` says which items belong together: of its documents, whole ones are dealt.

    Raises ``ValueError`` below 16 items, with which no budget can be decided, or if documents are
    too few to deal.
    """
    if isinstance(data, Split) and len(set(data.documents)) < len(data.documents):
        return _split_documents(data, seed=seed)
    items = list(data.items) if isinstance(data, Split) else itemize(data)
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
        splits[purpose] = as_split([items[i] for i in part])
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
        splits[purpose] = Split(
            items=tuple(data.items[i] for i in places),
            documents=tuple(data.documents[i] for i in places),
        )
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
