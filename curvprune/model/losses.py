"""What "loss" means for a model: which positions count, what each is compared with, and how much it
costs in nats.

Every loss is a pair ``(sum, count)``. Whoever needs a mean divides in one place, so that ragged
batches, padding and ignored labels cannot bias it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from curvprune.model.forward import Batch, evaluating, outputs

IGNORED = -100  # the label that torch and transformers skip
# Nats a position where a changed model returns no finite numbers: out of any budget's reach.
BROKEN = 1000.0
_CHUNK = 512  # positions per log-softmax: bounds memory at vocabularies of 10^5


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """The positions of a batch that count: their logits, labels (``None`` where there are none) and
    item numbers."""

    logits: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"] | None
    item: Int[Tensor, " n"]
    items: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemResults:
    """Per item: summed loss in nats, number of positions, number of positions predicted right."""

    loss: Float[Tensor, " items"]
    count: Float[Tensor, " items"]
    correct: Float[Tensor, " items"]

    @property
    def mean_loss(self) -> float:
        """Nats per position."""
        return float(self.loss.sum() / self.count.sum())

    @property
    def accuracy(self) -> float:
        return float(self.correct.sum() / self.count.sum())

    def finite(self) -> ItemResults:
        """The same, with `BROKEN` and no position right where the loss is no finite number."""
        good = self.loss.isfinite()
        loss = torch.where(good, self.loss, BROKEN * self.count)
        return ItemResults(loss=loss, count=self.count, correct=self.correct.where(good, 0.0))


class Objective:
    """Base of the objectives: subclasses say which positions count and what they are compared with.

    Attributes:
        name: the word that recipes and ``objective=`` use.
        measure: what one loss is counted in, e.g. ``"nats/token"``.
    """

    name: str
    measure: str

    def positions(self, logits: Tensor, batch: Batch) -> Positions:
        """Pick the positions that count. Raises ``ValueError`` on logits of a shape the objective
        cannot read."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model (one forward pass) and return its logits."""
        # transformers' outputs have the field, other models return the tensor, some in a tuple.
        output = outputs(model, batch)
        logits = getattr(output, "logits", output)
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{type(model).__name__} returned {type(output).__name__}: expected a tensor or "
                "an output with .logits, or, of a model without any, objective=LabelFree(model, "
                "of=...) with a function to some"
            )
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """``(sum, count)`` of the loss over the positions that count; differentiable. One forward
        pass."""
        return self.loss_of(self.logits(model, batch), batch)

    def loss_of(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """`loss` from logits that are already there."""
        positions = self.positions(logits, batch)
        return self._compare(positions, batch)[0].sum(), len(positions.item)

    def item_losses(self, logits: Tensor, batch: Batch) -> tuple[Float[Tensor, " items"], int]:
        """Summed loss of every item, and the number of positions of all; differentiable."""
        positions = self.positions(logits, batch)
        losses = self._compare(positions, batch)[0]
        sums = losses.new_zeros(positions.items).index_add(0, positions.item, losses)
        return sums, len(positions.item)

    def _compare(self, positions: Positions, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of every position and the class that counts as right there."""
        if positions.labels is None:
            raise ValueError(
                f"objective {self.name}: the batch has no labels; pass them or use "
                "objective='label-free'"
            )
        # Part by part: each is widened to float32 and has a log-softmax of its own size.
        parts = zip(positions.logits.split(_CHUNK), positions.labels.split(_CHUNK), strict=True)
        losses = [F.cross_entropy(_wide(z), y, reduction="none") for z, y in parts]
        return torch.cat(losses), positions.labels

    @torch.no_grad()
    def item_results(self, model: nn.Module, batch: Batch) -> ItemResults:
        """Loss, positions and hits of every item of the batch. One forward pass."""
        positions = self.positions(self.logits(model, batch), batch)
        losses, truth = self._compare(positions, batch)
        # Sums over thousands of positions in float32 would depend on their order.
        losses = losses.double()
        hits = (positions.logits.argmax(-1) == truth).double()
        zeros = torch.zeros(positions.items, dtype=torch.float64, device=losses.device)
        return ItemResults(
            loss=zeros.index_add(0, positions.item, losses),
            count=zeros.index_add(0, positions.item, torch.ones_like(losses)),
            correct=zeros.index_add(0, positions.item, hits),
        )


class CausalLM(Objective):
    """Next-token cross-entropy; padding (attention mask) and labels of ``-100`` do not count.
    Without ``labels`` the input tokens themselves are predicted."""

    name = "causal-lm"
    measure = "nats/token"

    def positions(self, logits: Tensor, batch: Batch) -> Positions:
        if logits.ndim != 3 or not isinstance(batch, Mapping):
            raise ValueError(
                "causal-lm needs dict batches and logits (items, tokens, vocabulary), got logits "
                f"{tuple(logits.shape)}"
            )
        labels = batch.get("labels", batch.get("input_ids"))
        if labels is None:
            raise ValueError(
                f"causal-lm: the batch has neither labels nor input_ids, only {sorted(batch)}"
            )
        labels = _classes(labels[:, 1:])
        keep = labels != IGNORED
        mask = batch.get("attention_mask")
        if mask is not None:
            # A prediction counts where both its token and the one before are no padding.
            keep = keep & mask[:, 1:].bool() & mask[:, :-1].bool()
        return _pick(logits[:, :-1], labels, keep)


class Classification(Objective):
    """Cross-entropy of one label per item (sequences, images) or, for logits ``(items, tokens,
    classes)``, per token without a shift; labels of ``-100`` do not count."""

    name = "classification"
    measure = "nats/example"

    def positions(self, logits: Tensor, batch: Batch) -> Positions:
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
        if logits.ndim not in (2, 3):
            raise ValueError(
                f"classification needs logits (items, classes), got {tuple(logits.shape)}"
            )
        if labels is None:
            keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
            return _pick(logits, None, keep)
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"classification: labels {tuple(labels.shape)} do not match logits "
                f"{tuple(logits.shape)}; expected labels of shape {tuple(logits.shape[:-1])}"
            )
        labels = _classes(labels)
        return _pick(logits, labels, labels != IGNORED)


class LabelFree(Objective):
    """KL divergence from the uncompressed model's own output distribution: needs no labels, for any
    model with logits.

    Positions that the attention mask excludes do not count. The Fisher of this loss at the
    uncompressed model is the same as that of the log-likelihood; "accuracy" means agreement with
    the uncompressed model's top class.

    Args:
        reference: the uncompressed model; it is run (one more forward pass) wherever the loss is
            evaluated.
        of: a function of (what the model returned, batch) to logits, for models that return none:
            of sentence embeddings, say, their similarities to those of other sentences over a
            temperature.
    """

    name = "label-free"

    def __init__(
        self,
        reference: nn.Module,
        *,
        per_token: bool = False,
        of: Callable[[Any, Batch], Tensor] | None = None,
    ) -> None:
        self.reference, self.of = reference, of
        self.measure = "nats/token" if per_token else "nats/example"

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.of is None:
            return super().logits(model, batch)
        return self.of(outputs(model, batch), batch)

    def positions(self, logits: Tensor, batch: Batch) -> Positions:
        keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        # Of logits per item the mask is about something else: the tokens that they come from.
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.shape == keep.shape:
            keep = mask.bool()
        return _pick(logits, None, keep)

    def _compare(self, positions: Positions, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), evaluating(self.reference):
            reference = self.positions(self.logits(self.reference, batch), batch).logits
        return divergence(reference, positions.logits), reference.argmax(-1)


def divergence(
    before: Float[Tensor, "n classes"], after: Float[Tensor, "n classes"]
) -> Float[Tensor, " n"]:
    """KL divergence of what two models say, from the logits of each, in nats."""
    values = []
    for theirs, ours in zip(before.split(_CHUNK), after.split(_CHUNK), strict=True):
        log_p, log_q = F.log_softmax(_wide(theirs), -1), F.log_softmax(_wide(ours), -1)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(values)


def _wide(logits: Tensor) -> Tensor:
    """Half-precision logits lose nats in a log-softmax; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _classes(labels: Tensor) -> Tensor:
    """Labels as int64, in which −100 is itself: among uint8 it would be 156."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels of type {labels.dtype}: expected whole numbers, the index of a class; for "
            "targets of another kind use objective='label-free'"
        )
    return labels.long()


def _pick(logits: Tensor, labels: Tensor | None, keep: Tensor) -> Positions:
    """The positions where ``keep`` is set, items one after another."""
    item = torch.arange(len(logits), device=logits.device)
    item = item.view(-1, *[1] * (keep.ndim - 1)).expand_as(keep)[keep]
    # Where all are kept, no copy is made: logits are the largest tensor there is.
    picked = logits.flatten(0, -2) if bool(keep.all()) else logits[keep]
    kept_labels = None if labels is None else labels[keep]
    return Positions(logits=picked, labels=kept_labels, item=item, items=len(logits))


def sampled_losses(positions: Positions, generator: torch.Generator) -> Float[Tensor, " n"]:
    """``−log p(ŷ)`` of each position with a label ŷ sampled from the model itself: the true
    Fisher's labels, not the data's.

    The draw inverts the cumulative distribution, with numbers from the CPU generator, so it does
    not depend on the device.
    """
    losses = []
    for logits in positions.logits.split(_CHUNK):
        with torch.no_grad():
            # 1. F(y) = p(0) + … + p(y), and u uniform in [0, 1), for every position.
            cumulative = _wide(logits).softmax(-1).cumsum(-1)
            uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
            # 2. ŷ is the first class with F(ŷ) > u. Scaling by the last entry keeps it inside the
            # vocabulary where the sum rounds to less than one.
            target = uniform.to(logits.device).to(cumulative.dtype) * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, target, right=True)
            drawn = drawn.clamp_(max=logits.shape[-1] - 1).squeeze(1)
        losses.append(F.cross_entropy(_wide(logits), drawn, reduction="none"))
    return torch.cat(losses)


def signed_loss(positions: Positions, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient with respect to the logits is ``v = z∘√p − p (z·√p)`` at each
    position, with random signs ``z``.

    Like the gradient of `sampled_losses`, ``v`` has mean zero and covariance ``diag(p) − p pᵀ``,
    the Hessian of the softmax. Squares of what it back-propagates therefore estimate the true
    Fisher without bias. Every class takes part in every draw, where a sampled label shows a rare
    class rarely and then with a large gradient: per image of a classifier the squares vary four
    times less. The signs come from the CPU generator, whatever the device.
    """
    total = positions.logits.new_zeros((), dtype=_wide(positions.logits[:0]).dtype)
    for part in positions.logits.split(_CHUNK):
        logits = _wide(part)
        with torch.no_grad():
            # v = z∘√p − p (z·√p), where z·√p is the sum of the first term.
            p = logits.softmax(-1)
            signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.device)
            v = p.sqrt()
            v = torch.where(signs.bool(), v, -v)
            v -= p * v.sum(-1, keepdim=True)
        # Linear in the logits, so that v is its gradient.
        total = total + (logits * v).sum()
    return total


OBJECTIVES: dict[str, type[Objective]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "label-free": LabelFree,
}


def make_objective(name: str | Objective, model: nn.Module, batch: Batch) -> Objective:
    """Turn a name into an objective; ``"auto"`` reads it off the model's class, its labels and its
    logits.

    ``"label-free"`` keeps ``model`` as its reference: the caller must hand over a copy that stays
    uncompressed. Raises ``ValueError`` when the loss cannot be told.
    """
    if isinstance(name, Objective):
        return name
    if name == "auto":
        name = _objective_of(model, batch)
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective={name!r}: expected auto, {', '.join(OBJECTIVES)} or an Objective"
        )
    if name == "label-free":
        with torch.no_grad(), evaluating(model):
            per_token = CausalLM().logits(model, batch).ndim == 3
        return LabelFree(model, per_token=per_token)
    return OBJECTIVES[name]()


def _objective_of(model: nn.Module, batch: Batch) -> str:
    """The objective that a model's class, its labels and its logits speak for."""
    labelled = not isinstance(batch, Mapping) or "labels" in batch
    kind = type(model).__name__
    # 1. The names of transformers' classes.
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if labelled and kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        return "classification"
    # 2. What a forward pass returns: one vector of logits an item, or one a position.
    with torch.no_grad(), evaluating(model):
        shape = CausalLM().logits(model, batch).shape
    if not labelled:
        return "label-free"
    if len(shape) == 2:
        return "classification"
    raise ValueError(
        f"{kind} with logits {tuple(shape)}: cannot tell what its loss is; pass "
        "objective='causal-lm', 'classification' (one label per token) or 'label-free'"
    )
