"""How far a model's outputs are from those of the uncompressed one: a loss without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model.forward import Batch, evaluating, outputs
from curvprune.model.losses.families import Family, Softmax
from curvprune.model.losses.loss import Loss
from curvprune.model.losses.positions import Objective, PositionLoss, Positions, divergences
from curvprune.model.losses.tasks import Classification
from curvprune.model.losses.telling import (
    Ending,
    check_are_logits,
    tell_by_class,
    tell_without_labels,
)


class LabelFree(Objective):
    """KL divergence from the uncompressed model's own output distribution: needs no labels.

    Positions that the attention mask excludes do not count. The Fisher of this loss at the
    uncompressed model is the same as that of the log-likelihood. "Accuracy" means agreement with
    the uncompressed model's best guess.

    Which distribution the outputs stand for is told by ``of``, or read off the model's class and
    config (transformers) or the data's labels. It is never guessed: where it is not known,
    evaluating raises ``ValueError`` with what to pass.

    Args:
        reference: the uncompressed model; it is run (one more forward pass) wherever the loss is
            evaluated.
        of: a loss whose outputs these are, such as ``cp.Classification()``, ``cp.MultiLabel()`` or
            ``cp.Regression(sigma=0.1)``. Or a function of (what the model returned, batch) to the
            logits of classes in the last dimension, for models that return none: of sentence
            embeddings, say, their similarities to those of other sentences over a temperature.
        per_token: say "nats/token" where ``of`` does not tell.
    """

    name = "label-free"
    labelled = False
    distribution = True

    def __init__(
        self,
        reference: nn.Module,
        *,
        per_token: bool = False,
        of: PositionLoss | Callable[[Any, Batch], Tensor] | None = None,
    ) -> None:
        self.reference = reference
        self.measure = "nats/token" if per_token else "nats/example"
        if of is not None and not isinstance(of, Loss) and not callable(of):
            raise ValueError(
                f"label-free: of={of!r}: expected a loss whose outputs these are, such as "
                "cp.Classification(), or a function of (what the model returned, batch) to logits"
            )
        self.declared = of
        self._told: PositionLoss | None = None
        if isinstance(of, Loss):
            self._take(of)
        elif of is not None:
            self._told = Classification()

    def _take(self, told: Loss) -> PositionLoss:
        if not isinstance(told, PositionLoss) or not told.distribution:
            raise ValueError(
                f"label-free: outputs of {told.name} determine no distribution, so two models have "
                "no divergence. Pass labels, a metric of your own to certify, or a scale on which "
                "outputs count as near: of=cp.Regression(sigma=...)"
            )
        self._told = told
        if told.measure != "nats/example":
            self.measure = told.measure
        return told

    @property
    def family(self) -> Family:  # type: ignore[override]
        """What the outputs stand for; of a model not yet seen, a softmax."""
        return Softmax() if self._told is None else self._told.family

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.declared is not None and not isinstance(self.declared, Loss):
            return self.declared(outputs(model, batch), batch)
        # By the class alone, without a forward pass: this one may be watched by hooks. A rounding
        # that is never measured needs no more than outputs.
        told = self._told or tell_by_class(self.reference, batch)
        return super().logits(model, batch) if told is None else told.outputs(model, batch)

    def told(self, batch: Batch) -> PositionLoss:
        """The loss whose outputs these are. Raises ``ValueError`` where that is not known."""
        if self._told is not None:
            return self._told
        return self._take(tell_without_labels(self.reference, batch))

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        return self.told(batch).places(outputs, batch)

    def compare(self, positions: Positions, batch: Batch) -> Tensor:
        theirs = self._theirs(batch)
        losses = divergences(self.family, theirs.logits, positions.logits)
        return losses if positions.weights is None else losses * positions.weights

    def _right(self, positions: Positions, batch: Batch) -> Tensor | None:
        guesses = self.family.guesses(self._theirs(batch).logits)
        return None if guesses is None else self.family.right(positions.logits, guesses)

    def _theirs(self, batch: Batch) -> Positions:
        with torch.no_grad(), evaluating(self.reference):
            with Ending() as ending:
                outputs = self.outputs(self.reference, batch)
            theirs = self.positions(outputs, batch)
        check_are_logits(
            self.told(batch),
            theirs.logits,
            probabilities=ending.made(outputs),
            embeddings=self.declared is None,
        )
        return theirs
