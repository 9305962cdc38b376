"""Two models' results on the same items: where a budget becomes a verdict, and what happened to
every item."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from curvprune.certificate.accuracy import certify_accuracy
from curvprune.certificate.loss import certify_loss
from curvprune.certificate.quantile import Foreseen, certify_quantile, foreseen_quantile
from curvprune.certificate.verdict import Verdict
from curvprune.model import (
    Divergence,
    ItemResults,
    LabelFree,
    Loss,
    PositionLoss,
    Split,
    has_guesses,
)
from curvprune.planning import OF_OUTPUTS, Budget


def loss_for(budget: Budget | None, loss: Loss, reference: nn.Module) -> Loss:
    """The loss whose results `judge` takes for a budget: of metrics ``"kl"`` and ``"top1"`` the
    divergence from ``reference``, the uncompressed model, at the positions that count for ``loss``.

    Raises:
        ValueError: outputs of ``loss`` determine no distribution, or have no best guess.
    """
    if budget is None or budget.metric not in OF_OUTPUTS:
        return loss
    if not isinstance(loss, PositionLoss) or not (isinstance(loss, LabelFree) or loss.distribution):
        raise ValueError(
            f"metric {budget.metric!r} compares distributions, and outputs of the loss "
            f"{loss.name} determine none; use metric 'loss', or loss=cp.Regression(sigma=...), "
            "cp.Classification() and the like, if that is what the outputs are"
        )
    if budget.metric == "top1" and not has_guesses(loss):
        raise ValueError(
            f"metric 'top1' asks for the same best guess, and outputs of the loss {loss.name} have "
            "none; use metric 'kl' or 'loss'"
        )
    return loss if isinstance(loss, LabelFree) else Divergence(reference, of=loss)


def judge(
    baseline: ItemResults, compressed: ItemResults, split: Split, budget: Budget, *, measure: str
) -> Verdict:
    """Where a budget becomes a verdict: two models' results on a split, judged by ``max_drop``.

    Documents with several items are clusters, and so are items that hold the same, with their
    documents (`Split.clusters`). Items in which no position counts (all labels ignored) say nothing
    and are left out.

    Args:
        baseline, compressed: results of every item of ``split``, of the loss that `loss_for` names.
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
    if budget.quantile is not None:
        return _judge_quantile(compressed, split, budget, measure)
    if budget.metric in ("loss", "kl"):
        verdict = certify_loss(
            baseline.loss.numpy()[counted],
            compressed.loss.numpy()[counted],
            baseline.count.numpy()[counted],
            clusters=clusters,
            max_drop=budget.max_drop,
            confidence=budget.confidence,
            measure=measure,
        )
        return verdict if budget.metric == "loss" else replace(verdict, metric="kl")
    if budget.metric == "top1":
        return _judge_agreement(compressed, split, budget)
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


def _judge_agreement(results: ItemResults, split: Split, budget: Budget) -> Verdict:
    """Whether both models have the same best guess at all but ``max_drop`` of the positions, which
    are one or many an item; those of one cluster belong together."""
    assert budget.max_drop is not None
    # 1. One 0 or 1 for every position; in which order within an item does not matter.
    counted = (results.count > 0).numpy()
    positions, same = results.count.numpy()[counted], results.correct.numpy()[counted]
    if np.any(np.isnan(same)):
        raise ValueError(
            "metric 'top1' asks for the same best guess, and the model's outputs have none; use "
            "metric 'kl' or 'loss'"
        )
    if np.any(positions != np.round(positions)) or np.any(same > positions):
        raise ValueError(
            "metric 'top1' counts positions, which are not whole where items are weighed; leave "
            "sample_weight out, or use metric 'kl'"
        )
    runs = np.stack([same, positions - same], 1).astype(int).ravel()
    agree = np.repeat(np.tile([True, False], len(same)), runs)

    # 2. Independent only where each item has one and is a cluster.
    clusters, copies = clusters_of(split, counted)
    if len(agree) > len(same):
        clusters, copies = split.clusters()[counted], None
        clusters = np.repeat(clusters, positions.astype(int))
    verdict = certify_accuracy(
        np.ones(len(agree)),
        agree,
        clusters=clusters,
        copies=copies,
        max_drop=budget.max_drop,
        confidence=budget.confidence,
    )
    needed = verdict.needed
    if needed is not None:
        needed = max(len(same) + 1, -(-needed * len(same) // len(agree)))
    return replace(verdict, metric="top1", items=len(same), needed=needed)


def _judge_quantile(results: ItemResults, split: Split, budget: Budget, measure: str) -> Verdict:
    """Whether a quantile over documents is within the budget; with the items that hold them."""
    assert budget.max_drop is not None and budget.quantile is not None
    values = document_means(results, split)
    verdict = certify_quantile(
        values,
        quantile=budget.quantile,
        max_drop=budget.max_drop,
        confidence=budget.confidence,
        metric=f"{budget.quantile:g} quantile of kl",
        measure=measure,
    )
    items, documents = int((results.count > 0).sum()), len(values)
    if items == documents:
        return verdict
    needed = verdict.needed
    if needed is not None:
        needed = -(-needed * items // documents)
    return replace(verdict, items=items, clusters=documents, needed=needed)


def document_means(results: ItemResults, split: Split) -> NDArray[np.float64]:
    """The mean loss of every cluster of a split in which a position counts: documents, those that
    share an item as one."""
    counted = (results.count > 0).numpy()
    _, owner = np.unique(split.clusters()[counted], return_inverse=True)
    totals = np.bincount(owner, weights=results.loss.numpy()[counted])
    return np.asarray(totals / np.bincount(owner, weights=results.count.numpy()[counted]))


def foreseen(results: ItemResults, split: Split, budget: Budget, documents: int) -> Foreseen:
    """What results on one split say of a quantile's verdict on another with so many documents."""
    assert budget.quantile is not None
    return foreseen_quantile(
        document_means(results, split),
        quantile=budget.quantile,
        confidence=budget.confidence,
        documents=documents,
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
