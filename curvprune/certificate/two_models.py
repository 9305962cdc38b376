"""What is quoted beside a compressed model: how far two models' outputs are apart, and what they
lose and get right on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from torch import Tensor, nn

from curvprune.certificate.document_errors import (
    Estimate,
    Floats,
    function_of,
    quantiles_of,
    ratio_of,
)
from curvprune.certificate.uses import Use
from curvprune.model import (
    Batch,
    CausalLM,
    LabelFree,
    Loss,
    PositionLoss,
    Positions,
    Split,
    agreement_of,
    check_items,
    divergences_of,
    evaluating,
    positions_that_count,
    to_device,
    unlabelled_positions,
)
from curvprune.schema import Json, decode, encode

LEVELS = (0.5, 0.99, 0.999)
_FEW = 5  # positions beyond a quantile, below which it is close to the largest value


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelComparison:
    """Two models on the same items. Every figure has a standard error over documents; ``None``:
    there is none for this loss or these data, and ``notes`` say why.

    Attributes:
        before, after: names of the two models.
        loss: the loss's name; ``measure``: what it is counted in.
        items, documents, positions: how many there are. Positions are those that count for the
            loss; of data without labels all but the padding.
        kl, kl_median, kl_99, kl_999: mean and quantiles over positions of the KL divergence of
            ``after`` from ``before``, sum_y p_before(y) log(p_before(y) / p_after(y)), in nats.
        top1_agreement: share of positions at which both have the same best guess.
        loss_before, loss_after, loss_change: mean loss, and its rise.
        perplexity_before, perplexity_after, perplexity_ratio, perplexity_change: of causal language
            models, exp of the mean loss.
        right_before, right_after: share of positions that are predicted right.
        right_to_wrong, wrong_to_right: share of positions that are right before only, after only.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    before: str
    after: str
    loss: str
    measure: str
    items: int
    documents: int
    positions: int
    kl: Estimate | None = None
    kl_median: Estimate | None = None
    kl_99: Estimate | None = None
    kl_999: Estimate | None = None
    top1_agreement: Estimate | None = None
    loss_before: Estimate | None = None
    loss_after: Estimate | None = None
    loss_change: Estimate | None = None
    perplexity_before: Estimate | None = None
    perplexity_after: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    perplexity_change: Estimate | None = None
    right_before: Estimate | None = None
    right_after: Estimate | None = None
    right_to_wrong: Estimate | None = None
    wrong_to_right: Estimate | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.after} against {self.before}: {self.items:,} items of {self.documents:,} "
            f"documents, {self.positions:,} positions; ± is one standard error over documents"
        ]
        for name, value in self.figures().items():
            lines.append(f"  {name}: {value.value:.6g} ± {value.stderr:.2g}")
        return "\n".join([*lines, *(f"  note: {text}" for text in self.notes)])

    def figures(self) -> dict[str, Estimate]:
        """Every figure that there is, by the name of its field."""
        found = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Estimate):
                found[name] = value
        return found

    def use(self) -> Use:
        """The look at the items that this was: whoever chooses by it has spent a part of them."""
        figures = [self.kl, self.loss_before, self.loss_after]
        told = " ".join("none" if f is None else f"{f.value:.5g}" for f in figures)
        return Use(
            keys=(f"comparison by {self.loss} {told}",),
            text=f"{self.before} compared with {self.after}",
        )

    def to_dict(self) -> Any:
        """Plain JSON values; numbers that are not finite become None."""
        return encode(self)

    @staticmethod
    def from_dict(record: Json) -> ModelComparison:
        """The inverse of `to_dict`; None becomes NaN where a number must stand.

        Raises:
            ValueError: naming what does not fit.
        """
        return decode(ModelComparison, record, source="the record")


@torch.no_grad()
def compare_models(
    models: tuple[nn.Module, nn.Module],
    split: Split,
    loss: Loss,
    *,
    names: tuple[str, str] = ("before", "after"),
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[int], object] = lambda finished: None,
) -> ModelComparison:
    """Compare two models, batch by batch. See `curvprune.compare`.

    Cost: one forward pass of each model. Memory: both models' outputs of one batch, and four bytes
    a position.
    """
    # 1. Whether both models can read the items.
    for model in models:
        check_items(model, loss, split.items, "compare")
    if isinstance(loss, LabelFree):
        # Tells what its outputs are, or refuses them.
        first = to_device(split.first(), next(models[0].parameters()).device)
        loss.item_results(models[0], first)
    # 2. What happened, item by item.
    rows = _Rows()
    done = 0
    with evaluating(models[0]), evaluating(models[1]):
        for batch in split.batches(batch_size):
            rows.take(models, loss, batch)
            done += batch_size
            advance(min(done, len(split.items)))
    # 3. The figures, over documents.
    return _figures(rows, split, loss, names, seed)


# ---------------------------------------------------------------------------------- batch by batch


@dataclass(kw_only=True, slots=True)
class _Rows:
    """What is kept of every item, and of every position its divergence.

    Attributes:
        count: positions of every item; ``share``: what they count in the mean loss.
        kl: of every position, items one after another.
    """

    count: list[Tensor] = field(default_factory=list)
    share: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    kl: list[NDArray[np.float32]] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    rights: list[Tensor] = field(default_factory=list)

    def take(self, models: tuple[nn.Module, nn.Module], loss: Loss, batch: Batch) -> None:
        if isinstance(loss, PositionLoss):
            self._take_outputs(models, loss, batch)
            return
        # Of a loss that is a function of the user's nothing but its values is known.
        homes = [to_device(batch, next(model.parameters()).device) for model in models]
        ours, theirs = (
            loss.item_results(model, home) for model, home in zip(models, homes, strict=True)
        )
        self.count.append(ours.count.cpu())
        self.share.append(ours.count.cpu())
        self.before.append(ours.loss.cpu())
        self.after.append(theirs.loss.cpu())

    def _take_outputs(
        self, models: tuple[nn.Module, nn.Module], loss: PositionLoss, batch: Batch
    ) -> None:
        # 1. The outputs of both models at the positions that count.
        home = next(models[0].parameters()).device
        batch = to_device(batch, home)
        outputs = []
        for model in models:
            own = to_device(batch, next(model.parameters()).device)
            outputs.append(loss.outputs(model, own).to(home))
        _check_alike(outputs[0], outputs[1], models)
        first, second = (positions_that_count(loss, found, batch) for found in outputs)

        # 2. The losses, and which are right.
        if first.labels is not None:
            self.share.append(first.summed(loss.shares(first)).cpu())
            for kept, found in ((self.before, first), (self.after, second)):
                kept.append(found.summed(loss.compare(found, batch).double()).cpu())
        first_right, second_right = _right(loss, first), _right(loss, second)
        if first_right is not None and second_right is not None:
            self.rights.append(_flips(first_right, second_right, first))

        # 3. How far the outputs are apart.
        first, second = unlabelled_positions(first), unlabelled_positions(second)
        self.count.append(first.summed(torch.ones_like(first.item, dtype=torch.float64)).cpu())
        if loss.distribution:
            kl = divergences_of(loss, first, second)
            _check_numbers(kl, models)
            # Rounding may leave a divergence of −1e-8.
            self.kl.append(kl.clamp_min(0).float().cpu().numpy())
        same = agreement_of(loss, first, second)
        if same is not None:
            self.same.append(first.summed(same.double()).cpu())


def _check_alike(first: Tensor, second: Tensor, models: tuple[nn.Module, nn.Module]) -> None:
    if first.shape == second.shape:
        return
    names = [type(model).__name__ for model in models]
    raise ValueError(
        f"compare: {names[0]} returns outputs of shape {tuple(first.shape)} and {names[1]} of "
        f"shape {tuple(second.shape)} for the same items; expected models with the same outputs, "
        "such as one vocabulary or the same classes"
    )


def _check_numbers(kl: Tensor, models: tuple[nn.Module, nn.Module]) -> None:
    bad = int(kl.isnan().sum())
    if bad:
        raise ValueError(
            f"compare: {bad} of {len(kl)} positions of a batch have no divergence, because "
            f"{type(models[0]).__name__} or {type(models[1]).__name__} returns NaN there; look at "
            "its weights and at the data"
        )


def _right(loss: PositionLoss, found: Positions) -> Tensor | None:
    if found.labels is None:
        return None
    return loss.family.right(found.logits, found.labels)


def _flips(first: Tensor, second: Tensor, positions: Positions) -> Tensor:
    """Per item how many positions are right before, right after, right before only, right after
    only; positions of weight 0 do not count."""
    counts = torch.ones_like(first) if positions.weights is None else positions.weights > 0
    kinds = (first, second, first & ~second, second & ~first)
    sums = [positions.summed((kind & counts).double()) for kind in kinds]
    return torch.stack(sums, 1).cpu()


# ----------------------------------------------------------------------------------- the figures


def _figures(
    rows: _Rows, split: Split, loss: Loss, names: tuple[str, str], seed: int
) -> ModelComparison:
    # 1. Documents in which a position counts; those that share an item are one.
    count = torch.cat(rows.count).numpy()
    counted = count > 0
    if not counted.any():
        raise ValueError(
            f"compare: no position counts in any of {len(count)} items: all are padding or have "
            "labels that the loss ignores"
        )
    owner = np.zeros(len(count), dtype=np.int32)
    found_documents, numbers = np.unique(split.clusters()[counted], return_inverse=True)
    owner[counted] = numbers
    documents = len(found_documents)

    def summed(parts: list[Tensor]) -> Floats:
        values = torch.cat(parts).double().numpy()[counted]
        return _by_document(owner[counted], values, documents)

    # 2. Each kind of figure, where its rows were kept.
    places = summed(rows.count)
    found: dict[str, Estimate] = {}
    if rows.kl:
        of_position = np.repeat(owner, count.astype(int))
        found |= _divergence_figures(np.concatenate(rows.kl), of_position, places, seed)
    if rows.same:
        found["top1_agreement"] = ratio_of(summed(rows.same), places)
    if rows.before:
        sums = [summed(rows.before), summed(rows.after), summed(rows.share)]
        _check_losses(sums, names)
        found |= _loss_figures(sums, perplexity=isinstance(loss, CausalLM))
    if rows.rights:
        kinds = ("right_before", "right_after", "right_to_wrong", "wrong_to_right")
        parts = torch.cat(rows.rights).T
        for name, part in zip(kinds, parts, strict=True):
            found[name] = ratio_of(summed([part]), places)
    # 3. The record.
    return ModelComparison(
        before=names[0],
        after=names[1],
        loss=loss.name,
        measure=loss.measure,
        items=int(counted.sum()),
        documents=documents,
        positions=int(places.sum()),
        **found,
        notes=tuple(_notes(rows, loss, documents, int(places.sum()))),
    )


def _by_document(owner: NDArray[np.int32], values: Floats, documents: int) -> Floats:
    return np.bincount(owner, weights=values, minlength=documents).astype(float)


def _check_losses(sums: list[Floats], names: tuple[str, str]) -> None:
    for name, total in zip(names, sums[:2], strict=True):
        bad = int(np.isnan(total).sum())
        if bad:
            raise ValueError(
                f"compare: the loss of the model {name!r} is NaN in {bad} of {len(total)} "
                "documents; look at its weights and at the data"
            )


def _divergence_figures(
    kl: NDArray[np.float32], owner: NDArray[np.int32], places: Floats, seed: int
) -> dict[str, Estimate]:
    sums = _by_document(owner, kl.astype(float), len(places))
    median, high, highest = quantiles_of(kl, owner, LEVELS, seed=seed)
    return {
        "kl": ratio_of(sums, places),
        "kl_median": median,
        "kl_99": high,
        "kl_999": highest,
    }


def _loss_figures(sums: list[Floats], *, perplexity: bool) -> dict[str, Estimate]:
    """Of the summed losses of both models and what they are divided by, document by document."""
    before, after, share = sums
    found = {
        "loss_before": ratio_of(before, share),
        "loss_after": ratio_of(after, share),
        "loss_change": ratio_of(after - before, share),
    }
    if perplexity:
        found["perplexity_before"] = ratio_of(before, share, np.exp)
        found["perplexity_after"] = ratio_of(after, share, np.exp)
        found["perplexity_ratio"] = ratio_of(after - before, share, np.exp)
        found["perplexity_change"] = function_of(
            sums, lambda s: np.exp(s[1] / s[2]) - np.exp(s[0] / s[2])
        )
    return found


def _notes(rows: _Rows, loss: Loss, documents: int, positions: int) -> list[str]:
    """Why figures are missing or rough."""
    notes = []
    if not rows.kl:
        notes.append(
            f"no KL divergence: outputs of the loss {loss.name} determine no distribution; pass a "
            "loss that does, such as cp.Regression(sigma=...) or cp.Classification()"
        )
    if not rows.same:
        notes.append(f"no top-1 agreement: outputs of the loss {loss.name} have no best guess")
    if not rows.before:
        notes.append("no losses and no flips: the data have no labels")
    elif not rows.rights:
        notes.append(f"no flips: the loss {loss.name} has no notion of right and wrong")
    if documents < 2:
        notes.append("no standard errors: all items are of one document")
    beyond = [level for level in LEVELS if positions * (1 - level) < _FEW]
    if rows.kl and beyond:
        notes.append(
            f"{positions:,} positions are few for the {100 * beyond[0]:g} % quantile: it is close "
            "to the largest value, and its error is rough"
        )
    if rows.kl and math.isinf(float(max(part.max(initial=0) for part in rows.kl))):
        notes.append(
            "some divergences are infinite: a model says of something that it cannot be, and the "
            "other says that it can"
        )
    return notes
