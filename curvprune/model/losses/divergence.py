"""How far a model's outputs are from another's at the positions that count for a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from curvprune.model.forward import TARGETS, Batch, evaluating
from curvprune.model.losses.label_free import LabelFree
from curvprune.model.losses.loss import ItemResults, Loss
from curvprune.model.losses.positions import PositionLoss, Positions, divergences
from curvprune.model.losses.tasks import CausalLM


class Divergence(LabelFree):
    """KL divergence from the uncompressed model at the positions that count for ``of``.

    As `LabelFree`, but labels say where to look: tokens that a loss ignores, such as those of a
    prompt, do not count. Each position counts once, whatever its class or its item weighs; of
    several outputs at one position the divergence is of all together.

    Args:
        reference: the uncompressed model.
        of: a loss whose outputs are a distribution.
    """

    def __init__(self, reference: nn.Module, *, of: PositionLoss) -> None:
        super().__init__(reference, of=of)
        if self.measure.endswith(("/label", "/output")):
            self.measure = "nats/position"

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        return counted_positions(self.told(batch), outputs, batch)

    def _theirs(self, batch: Batch) -> Positions:
        # That outputs are what ``of`` takes them for was asked of it, on more than this batch.
        with torch.no_grad(), evaluating(self.reference):
            return self.positions(self.outputs(self.reference, batch), batch)

    def shares(self, positions: Positions) -> Tensor:
        return torch.ones_like(positions.item, dtype=torch.float64)

    @torch.no_grad()
    def item_results(self, model: nn.Module, batch: Batch) -> ItemResults:
        ours = self.positions(self.outputs(model, batch), batch)
        # The reference is as far from itself as nothing: it need not run twice.
        theirs = ours if model is self.reference else self._theirs(batch)
        losses = divergences_of(self, theirs, ours)
        same = agreement_of(self, theirs, ours)
        correct = torch.full((ours.items,), torch.nan, dtype=torch.float64, device=losses.device)
        if same is not None:
            correct = ours.summed(same.double())
        return ItemResults(
            loss=ours.summed(losses.double()), count=ours.summed(self.shares(ours)), correct=correct
        )


def labelled(batch: Batch) -> bool:
    """Whether a batch says what is right."""
    if not isinstance(batch, Mapping):
        return len(batch) > 1
    return any(batch.get(name) is not None for name in TARGETS[:-1])


def positions_that_count(loss: PositionLoss, outputs: Tensor, batch: Batch) -> Positions:
    """The positions that count for a loss, with their labels; of data without labels those that
    count where nothing is compared with any."""
    # A language model predicts its own input.
    if isinstance(loss, (LabelFree, CausalLM)) or labelled(batch):
        return loss.positions(outputs, batch)
    return loss.places(outputs, batch)


def counted_positions(loss: PositionLoss, outputs: Tensor, batch: Batch) -> Positions:
    """`positions_that_count` without labels and weights; a position of weight 0 does not count."""
    return unlabelled_positions(positions_that_count(loss, outputs, batch))


def unlabelled_positions(found: Positions) -> Positions:
    """The same positions, each counting once, and compared with nothing."""
    if found.weights is None:
        return replace(found, labels=None)
    kept = found.weights > 0
    return replace(
        found, logits=found.logits[kept], item=found.item[kept], labels=None, weights=None
    )


def divergences_of(loss: PositionLoss, before: Positions, after: Positions) -> Tensor:
    """KL divergence ``(n,)`` of every position."""
    loss.family.check(after.logits)
    return divergences(loss.family, before.logits, after.logits)


def agreement_of(loss: PositionLoss, before: Positions, after: Positions) -> Tensor | None:
    """Whether both best guesses are the same, ``(n,)``; ``None`` where there is no such notion."""
    guesses = loss.family.guesses(before.logits)
    return None if guesses is None else loss.family.right(after.logits, guesses)


def has_guesses(loss: Loss) -> bool:
    """Whether a loss's outputs have a best guess."""
    if not isinstance(loss, PositionLoss):
        return False
    return loss.family.guesses(torch.zeros(1, 2)) is not None
