"""The losses of usual tasks: which outputs are predictions, and what each is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvprune.model.forward import Batch, outputs, padding_mask
from curvprune.model.losses.families import (
    IGNORED,
    Bernoulli,
    Family,
    Gaussian,
    Softmax,
    class_indices,
)
from curvprune.model.losses.positions import (
    Objective,
    PositionLoss,
    Positions,
    picked,
    sample_weights,
    unlabelled,
)


class CausalLM(Objective):
    """Next-token cross-entropy; padding (attention mask) and labels of ``-100`` do not count.
    Without ``labels`` the input tokens themselves are predicted.

    Args:
        never: tokens that are not predicted then, such as those that stand for a piece of an image.
    """

    name = "causal-lm"
    measure = "nats/token"

    def __init__(self, *, never: Sequence[int] = ()) -> None:
        self.never = tuple(never)

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        if outputs.ndim != 3 or not (isinstance(batch, Mapping) or len(batch) == 1):
            raise ValueError(
                "causal-lm needs tokens alone or dict batches, and logits (items, tokens, "
                f"vocabulary), got logits {tuple(outputs.shape)}"
            )
        if not isinstance(batch, Mapping):
            batch = {"input_ids": batch[0]}
        labels = batch.get("labels")
        if labels is None:
            labels = self._own_tokens(batch)
        if labels is None:
            raise ValueError(
                f"causal-lm: the batch has neither labels nor input_ids, only {sorted(batch)}"
            )
        if labels.shape != outputs.shape[:2]:
            raise ValueError(
                f"causal-lm: labels {tuple(labels.shape)} do not match logits "
                f"{tuple(outputs.shape)}; expected a label or a token for each place of the "
                "logits, -100 where none counts"
            )
        labels = class_indices(labels[:, 1:])
        keep = labels != IGNORED
        mask = padding_mask(batch)
        if mask is not None:
            if mask.shape != outputs.shape[:2]:
                raise ValueError(
                    f"causal-lm: attention_mask {tuple(mask.shape)} does not match logits "
                    f"{tuple(outputs.shape)}; expected (items, tokens)"
                )
            # A prediction counts where both its token and the one before are no padding.
            keep = keep & mask[:, 1:] & mask[:, :-1]
        return picked(outputs[:, :-1], labels, keep, sample_weights(batch))

    def _own_tokens(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        tokens = batch.get("input_ids")
        if tokens is None or not self.never:
            return tokens
        hidden = torch.isin(tokens, torch.tensor(self.never, device=tokens.device))
        return tokens.masked_fill(hidden, IGNORED)

    def places(self, outputs: Tensor, batch: Batch) -> Positions:
        # Every token that is no padding says what comes next, also the last.
        return Classification().positions(outputs, unlabelled(batch))


class Classification(Objective):
    """Cross-entropy of a label for every place of the logits: one for each item (sequences,
    images), for each token (no shift), or for each pixel.

    Labels are class indices, with one dimension less than the logits, or probabilities of the
    classes, shaped as the logits (soft labels; such places always count).

    Args:
        class_axis: the dimension of the logits that holds the classes: ``-1`` (tokens), ``1``
            (images ``(items, classes, height, width)``).
        weight: what each class counts, ``(classes,)``; the mean is over the sum of weights, as
            torch has it.
        label_smoothing, ignore_index: as torch has them.
        probabilities: True: the model ends in a softmax, and its outputs are probabilities, whose
            logarithms are the logits. False: they are logits, also where they all lie between 0 and
            1, which is refused otherwise.
    """

    name = "classification"
    measure = "nats/example"

    def __init__(
        self,
        *,
        class_axis: int = -1,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = IGNORED,
        probabilities: bool | None = None,
    ) -> None:
        self.family = Softmax(weight, label_smoothing)
        self.class_axis, self.ignore_index = class_axis, ignore_index
        self.probabilities = probabilities

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found = super().logits(model, batch)
        return found.log() if self.probabilities is True else found

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        if outputs.ndim < 2 or not -outputs.ndim <= self.class_axis < outputs.ndim:
            raise ValueError(
                f"{self.name} needs logits (items, classes), or more dimensions with "
                f"class_axis={self.class_axis} among them, got {tuple(outputs.shape)}"
            )
        logits = outputs.movedim(self.class_axis, -1)
        places = logits.shape[:-1]
        labels = labels_of(batch)
        weights = sample_weights(batch)
        if labels is None:
            return picked(logits, None, _unmasked(places, batch, logits.device), weights)
        if labels.is_floating_point() and labels.shape == outputs.shape:
            soft = labels.movedim(self.class_axis, -1)
            return picked(logits, soft, _everywhere(places, logits.device), weights)
        if labels.shape == (*places, 1):
            labels = labels.squeeze(-1)
        if labels.shape != places:
            raise ValueError(
                f"{self.name}: labels {tuple(labels.shape)} do not match logits "
                f"{tuple(outputs.shape)}; expected labels of shape {tuple(places)}, or, if the "
                "classes are not the last dimension, cp.Classification(class_axis=...)"
            )
        labels = class_indices(labels)
        return picked(logits, labels, labels != self.ignore_index, weights)


class Segmentation(Classification):
    """A class for every pixel: logits ``(items, classes, height, width)`` (or with another
    ``class_axis``), labels ``(items, height, width)``.

    Logits of another height and width than the labels' are stretched bilinearly, as transformers'
    segmentation models do.
    """

    name = "segmentation"
    measure = "nats/pixel"

    def __init__(self, *, class_axis: int = 1, **arguments: Any) -> None:
        super().__init__(class_axis=class_axis, **arguments)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found = super().logits(model, batch)
        labels = labels_of(batch)
        if labels is None or self.class_axis != 1 or found.ndim != 4 or labels.ndim != 3:
            return found
        if found.shape[-2:] == labels.shape[-2:]:
            return found
        return F.interpolate(found, labels.shape[-2:], mode="bilinear", align_corners=False)


class MaskedLM(Classification):
    """Cross-entropy of the masked tokens: labels are the tokens there and ``-100`` elsewhere."""

    name = "masked-lm"
    measure = "nats/token"


class Seq2Seq(Classification):
    """Cross-entropy of the target's tokens, of which the decoder sees those before (teacher
    forcing). Labels of ``-100`` do not count."""

    name = "seq2seq"
    measure = "nats/token"

    def places(self, outputs: Tensor, batch: Batch) -> Positions:
        # The attention mask is the encoder's; of the decoder, labels and a mask of its own tell.
        keep = _everywhere(outputs.shape[:-1], outputs.device)
        labels = labels_of(batch)
        mask = padding_mask(batch, "decoder_")
        if labels is not None and labels.shape == keep.shape:
            keep = labels != self.ignore_index
        elif mask is not None:
            keep = mask
        return picked(outputs, None, keep, sample_weights(batch))


class QuestionAnswering(Objective):
    """Cross-entropy of where an answer starts and ends: two positions an item, whose classes are
    the tokens. Labels are ``start_positions`` and ``end_positions``; those outside the sequence do
    not count."""

    name = "question-answering"
    measure = "nats/position"

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found = outputs(model, batch)
        starts, ends = getattr(found, "start_logits", None), getattr(found, "end_logits", None)
        if starts is None or ends is None:
            raise ValueError(
                f"question-answering: {type(model).__name__} returned {type(found).__name__}; "
                "expected an output with start_logits and end_logits"
            )
        return torch.stack([starts, ends], 1)

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        if not isinstance(batch, Mapping):
            raise ValueError(
                "question-answering needs dict batches with start_positions and end_positions"
            )
        tokens = outputs.shape[-1]
        starts, ends = batch.get("start_positions"), batch.get("end_positions")
        if starts is None or ends is None:
            return picked(outputs, None, _everywhere(outputs.shape[:-1], outputs.device))
        labels = torch.stack([class_indices(starts).view(-1), class_indices(ends).view(-1)], 1)
        inside = (labels >= 0) & (labels < tokens)
        return picked(outputs, labels, inside, sample_weights(batch))


class OutputLoss(PositionLoss):
    """A loss of every single output: targets are shaped as the outputs.

    A position is one output, as in the mean of torch's losses. Outputs of tokens that the attention
    mask excludes do not count.

    Args:
        family: what an output is the parameter of, such as `Poisson`.
    """

    name = "outputs"
    measure = "nats/output"

    def __init__(self, family: Family) -> None:
        self.family = family
        self.name = family.name

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        # A vector of single outputs, one for each item, may come without its last dimension.
        rows = outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs
        keep = _unmasked(rows.shape[:-1], batch, rows.device)
        labels = labels_of(batch)
        if labels is None:
            return picked(rows, None, keep, sample_weights(batch))
        if labels.numel() == rows.numel() and labels.shape != rows.shape:
            squeezed = [n for n in labels.shape if n != 1] == [n for n in rows.shape if n != 1]
            labels = labels.view(rows.shape) if squeezed else labels
        if labels.shape != rows.shape:
            raise ValueError(
                f"{self.name}: targets {tuple(labels.shape)} do not match outputs "
                f"{tuple(outputs.shape)}; expected one target for each output"
            )
        return picked(rows, labels, keep, sample_weights(batch))


class MultiLabel(OutputLoss):
    """Several labels an item, each yes (1) or no (0) by itself: binary cross-entropy with logits.

    Args:
        weight, pos_weight: as torch's ``BCEWithLogitsLoss`` has them.
        probabilities: True: the model ends in a sigmoid, and its outputs are probabilities. False:
            they are logits, also where they all lie between 0 and 1.
    """

    measure = "nats/label"

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        probabilities: bool | None = None,
    ) -> None:
        super().__init__(Bernoulli(weight, pos_weight))
        self.name = "multi-label"
        self.probabilities = probabilities

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        found = super().outputs(model, batch)
        return torch.logit(found) if self.probabilities else found


class Regression(OutputLoss):
    """Numbers: ``½ (y − f)² / σ²`` nats for each output; without ``sigma`` ``(y − f)²``, as torch's
    ``MSELoss`` and transformers have it.

    Args:
        sigma: the standard deviation of the error, in the unit of the targets. Only with it are
            two models' outputs comparable without labels.
    """

    def __init__(self, sigma: float | None = None) -> None:
        super().__init__(Gaussian(sigma))
        self.name = "regression"
        self.measure = "squares/output" if sigma is None else "nats/output"


def labels_of(batch: Batch) -> Tensor | None:
    """Labels of a batch, if it has some."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if len(batch) > 1 else None


def _everywhere(places: torch.Size, device: torch.device) -> Tensor:
    return torch.ones(places, dtype=torch.bool, device=device)


def _unmasked(places: torch.Size, batch: Batch, device: torch.device) -> Tensor:
    """All places but the padding. Of outputs per item the mask is about something else: the tokens
    that they come from."""
    mask = padding_mask(batch)
    if mask is not None and mask.shape == places:
        return mask.to(device)
    return _everywhere(places, device)
