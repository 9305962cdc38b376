"""Two models' results on the same items: the paired verdict, and what happened to every item."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from curvprune.certificate.paired_tests import Verdict, certify_accuracy, certify_loss
from curvprune.model import ItemResults, Split
from curvprune.planning import Budget


def compare(
    baseline: ItemResults, compressed: ItemResults, split: Split, budget: Budget, *, measure: str
) -> Verdict:
    """Paired verdict on a split for a budget with ``max_drop``; documents with several items are
    clusters. Items in which no position counts (all labels ignored) say nothing and are left
    out."""
    counted = (baseline.count > 0).numpy()
    documents = np.array(split.documents)[counted]
    clusters = None if len(set(documents)) == len(documents) else documents
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


def item_columns(baseline: ItemResults, compressed: ItemResults, split: Split) -> dict[str, Any]:
    """What two models did on every item of a split in which a position counts, by column:
    ``document`` (a number in ``documents``), ``index`` in the split, ``count`` of positions, loss
    per position ``before`` and ``after`` (to nine digits) and, where no item has more than one,
    ``right_before`` and ``right_after`` (1 or 0)."""
    at = torch.nonzero(baseline.count > 0).flatten()
    names = [split.documents[i] for i in at.tolist()]
    number = {name: k for k, name in enumerate(dict.fromkeys(names))}
    count = baseline.count[at]
    columns = {
        "documents": list(number),
        "document": [number[name] for name in names],
        "index": at.tolist(),
        "count": count.int().tolist(),
        "before": [float(f"{v:.9g}") for v in (baseline.loss[at] / count).tolist()],
        "after": [float(f"{v:.9g}") for v in (compressed.loss[at] / count).tolist()],
    }
    if float(count.max()) > 1:
        return columns
    right = {"right_before": baseline.correct, "right_after": compressed.correct}
    return columns | {name: (correct[at] > 0.5).int().tolist() for name, correct in right.items()}
