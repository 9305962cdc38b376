"""Two models' results on the same items: where a budget becomes a verdict, and what happened to
every item."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
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

    Documents with several items are clusters. Items in which no position counts (all labels
    ignored) say nothing and are left out.

    Args:
        baseline, compressed: results of every item of ``split``.
        budget: its metric chooses the test; it must have a ``max_drop``.
        measure: what the loss is counted in, such as ``"nats/token"``.

    Raises:
        ValueError: metric 'accuracy' where an item has more than one prediction; or as the test
            does.
    """
    # 1. The items that count, and the documents that they come from.
    counted = (baseline.count > 0).numpy()
    documents = np.array(split.documents)[counted]
    independent = len(set(documents)) == len(documents)
    clusters = None if independent else documents

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
    if float(baseline.count.max()) > 1:
        raise ValueError(
            "metric 'accuracy' needs one prediction per item; for language models use metric 'loss'"
        )
    return certify_accuracy(
        baseline.correct.numpy()[counted] > 0.5,
        compressed.correct.numpy()[counted] > 0.5,
        clusters=clusters,
        max_drop=budget.max_drop,
        confidence=budget.confidence,
    )


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
