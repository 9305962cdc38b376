"""Two models' results on the same items: where a budget becomes a verdict, and what happened to
every item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvprune.certificate.accuracy import certify_accuracy
from curvprune.certificate.loss import certify_loss
from curvprune.certificate.verdict import Verdict
from curvprune.model import ItemResults, Split
from curvprune.planning import Budget


def compare(
    baseline: ItemResults, compressed: ItemResults, split: Split, budget: Budget, *, measure: str
) -> Verdict:
    """Where a budget becomes a verdict: two models' results on a split, judged by ``max_drop``.

    Documents with several items are clusters, and so are items that hold the same, with their
    documents (`Split.clusters`). Items in which no position counts (all labels ignored) say nothing
    and are left out.

    Args:
        baseline, compressed: results of every item of ``split``.
        budget: its metric chooses the test; it must have a ``max_drop``.
        measure: what the loss is counted in, such as ``"nats/token"``.

    Raises:
        ValueError: metric 'accuracy' where an item has more than one prediction; or as the test
            does.
    """
    # 1. The items that count, and which of them belong together.
    counted = (baseline.count > 0).numpy()
    clusters, copies = clusters_of(split, counted)

    # 2. The test that the budget's metric asks for.
    assert budget.max_drop is not None
    if budget.metric == "loss":
        return certify_loss(
            baseline.loss.numpy()[counted],
            compressed.loss.numpy()[counted],
            baseline.count.numpy()[counted],
            clusters=clusters,
            max_drop=budget.max_drop,
            confidence=budget.confidence,
            measure=measure,
        )
    if bool(baseline.correct.isnan().any()):
        raise ValueError(
            "metric 'accuracy': this loss has no predictions that are right or wrong; use metric "
            "'loss'"
        )
    if float(baseline.count.max()) > 1:
        raise ValueError(
            "metric 'accuracy' needs one prediction per item; for language models use metric 'loss'"
        )
    return certify_accuracy(
        baseline.correct.numpy()[counted] > 0.5,
        compressed.correct.numpy()[counted] > 0.5,
        clusters=clusters,
        copies=copies,
        max_drop=budget.max_drop,
        confidence=budget.confidence,
    )


def clusters_of(
    split: Split, counted: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int_] | None, NDArray[np.int_] | None]:
    """The cluster of every item, and a number that items share which are the same; each ``None``
    where all are different.

    Args:
        counted: the items that count, by default all.

    Raises:
        ValueError: several items that are all one cluster.
    """
    chosen = np.ones(len(split.documents), dtype=bool) if counted is None else counted
    clusters, copies = split.clusters()[chosen], split.copies()[chosen]
    items = clusters.size
    if items > 1 and len(set(clusters.tolist())) < 2:
        documents = len(set(np.array(split.documents)[chosen].tolist()))
        raise ValueError(
            f"{items} items of {documents} documents are one cluster ({len(set(copies.tolist()))} "
            "different items): a bound needs at least 2 independent items (20 or more to be of "
            "use); add documents that share no item, or pass finer documents"
        )
    same = None if len(set(copies.tolist())) == items else copies
    return (None if len(set(clusters.tolist())) == items else clusters), same


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemColumns:
    """What two models did on every item of a split in which a position counts, by column.

    Attributes:
        documents: the names that ``document`` numbers.
        document, index: of each item, its document and its place in the split.
        count: positions of each item.
        before, after: loss per position of the uncompressed and the compressed model, to nine
            digits.
        right_before, right_after: 1 where the prediction was right, where no item has more than
            one position; else ``None``.
    """

    documents: tuple[str, ...]
    document: tuple[int, ...]
    index: tuple[int, ...]
    count: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    right_before: tuple[int, ...] | None = None
    right_after: tuple[int, ...] | None = None


def item_columns(baseline: ItemResults, compressed: ItemResults, split: Split) -> ItemColumns:
    """What two models did on every item of a split, beside each other."""
    counted = torch.nonzero(baseline.count > 0).flatten()
    names = [split.documents[i] for i in counted.tolist()]
    # Documents are numbered as they first appear.
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    count = baseline.count[counted]
    right_before = right_after = None
    known = not bool(baseline.correct[counted].isnan().any())
    if known and not float(count.max()) > 1:
        right_before = _right(baseline.correct[counted])
        right_after = _right(compressed.correct[counted])
    return ItemColumns(
        documents=tuple(numbers),
        document=tuple(numbers[name] for name in names),
        index=tuple(counted.tolist()),
        count=tuple(count.int().tolist()),
        before=_nine_digits(baseline.loss[counted] / count),
        after=_nine_digits(compressed.loss[counted] / count),
        right_before=right_before,
        right_after=right_after,
    )


def _nine_digits(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.9g}") for value in values.tolist())


def _right(correct: Tensor) -> tuple[int, ...]:
    return tuple((correct > 0.5).int().tolist())
