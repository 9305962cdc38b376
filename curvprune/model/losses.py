"""What "loss" means for a model: which positions count, what each is compared with, and how much it
costs in nats.

Every loss is a pair ``(sum, count)`` and is divided in one place by whoever needs a mean, so ragged
batches, padding and ignored labels cannot bias it. A batch is a dict of tensors as transformers
models take them (labels optional) or a pair ``(inputs, targets)``; the first dimension of every
tensor counts items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor]
IGNORED = -100  # the label that torch and transformers skip
_CHUNK = 512  # positions per log-softmax: bounds memory at vocabularies of 10^5


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """The positions of a batch that count: their logits, labels (``None`` where there are none) and
    item numbers."""

    logits: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"] | None
    item: Int[Tensor, " n"]
    items: int


# nats a position where a changed model returns no finite numbers: out of any budget's reach
BROKEN = 1000.0


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
        loss, correct = (
            torch.where(good, self.loss, BROKEN * self.count),
            self.correct.where(good, 0.0),
        )
        return ItemResults(loss=loss, count=self.count, correct=correct)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A score of every item that `curvprune.certify` compares, where neither loss nor accuracy is
    meant.

    Attributes:
        of: a function of (what the model returned, batch) to one number per item of the batch,
            shape ``(items,)``.
        bounds: the lowest and the highest value an item can have, where there are any: the test
            then holds for every distribution; ``None`` if there are none.
    """

    of: Callable[[Any, Batch], Tensor]
    name: str = "metric"
    measure: str = ""
    bounds: tuple[float, float] | None = None
    higher_is_better: bool = True


def outputs(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch, called without its labels and without a cache. One
    forward pass."""
    if not isinstance(batch, Mapping):
        return model(batch[0])
    arguments: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
    if getattr(getattr(model, "config", None), "use_cache", False):
        arguments["use_cache"] = False
    return model(**arguments)


class Objective:
    """Base of the objectives: subclasses say which positions count and what they are compared with.

    Attributes:
        name: the word that recipes and ``objective=`` use.
        measure: what one loss is counted in loss, e.g. ``"nats/token"``.
    """

    name: str
    measure: str

    def positions(self, logits: Tensor, batch: Batch) -> Positions:
        """Pick the positions that count. Raises ``ValueError`` on logits of a shape the objective
        cannot read."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model (one forward pass) and return its logits."""
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
        return losses.new_zeros(positions.items).index_add(0, positions.item, losses), len(
            positions.item
        )

    def _compare(self, positions: Positions, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of every position and the class that counts as right there."""
        if positions.labels is None:
            raise ValueError(
                f"objective {self.name}: the batch has no labels; pass them or use "
                "objective='label-free'"
            )
        parts = zip(positions.logits.split(_CHUNK), positions.labels.split(_CHUNK), strict=True)
        losses = [F.cross_entropy(_wide(z), y, reduction="none") for z, y in parts]
        return torch.cat(losses), positions.labels

    @torch.no_grad()
    def item_results(self, model: nn.Module, batch: Batch) -> ItemResults:
        """Loss, positions and hits of every item of the batch. One forward pass."""
        positions = self.positions(self.logits(model, batch), batch)
        losses, truth = self._compare(positions, batch)
        losses, hits = losses.double(), (positions.logits.argmax(-1) == truth).double()
        zeros = torch.zeros(positions.items, dtype=torch.float64, device=losses.device)
        loss, count, correct = (
            zeros.index_add(0, positions.item, values)
            for values in (losses, torch.ones_like(losses), hits)
        )
        return ItemResults(loss=loss, count=count, correct=correct)


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
        if (mask := batch.get("attention_mask")) is not None:
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
    item = torch.arange(len(logits), device=logits.device)
    item = item.view(-1, *[1] * (keep.ndim - 1)).expand_as(keep)[keep]
    picked = (
        logits.flatten(0, -2) if bool(keep.all()) else logits[keep]
    )  # no copy of the largest tensor there is
    return Positions(
        logits=picked, labels=None if labels is None else labels[keep], item=item, items=len(logits)
    )


def sampled_losses(positions: Positions, generator: torch.Generator) -> Float[Tensor, " n"]:
    """``−log p(ŷ)`` of each position with a label ŷ sampled from the model itself (the true
    Fisher's labels, not the data's). The draw uses inverse-CDF sampling on the CPU generator, so it
    does not depend on the device."""
    losses = []
    for logits in positions.logits.split(_CHUNK):
        with torch.no_grad():
            cumulative = _wide(logits).softmax(-1).cumsum(-1)
            uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(
                logits.device
            )
            # Scaling by the last entry keeps the draw inside the vocabulary when the sum rounds to
            # less than one.
            target = uniform.to(cumulative.dtype) * cumulative[:, -1:]
            drawn = (
                torch.searchsorted(cumulative, target, right=True)
                .clamp_(max=logits.shape[-1] - 1)
                .squeeze(1)
            )
        losses.append(F.cross_entropy(_wide(logits), drawn, reduction="none"))
    return torch.cat(losses)


def signed_loss(positions: Positions, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient with respect to the logits is ``v = z∘√p − p (z·√p)`` at each
    position, with random signs ``z``: like the gradient of `sampled_losses` it has mean zero and
    covariance ``diag(p) − p pᵀ``, the Hessian of the softmax, so squares of what it back-propagates
    estimate the true Fisher without bias. Every class takes part in every draw, where a label shows
    a rare class rarely and then with a large gradient: per image of a classifier the squares vary
    four times less. The signs come from the CPU generator, whatever the device."""
    total = positions.logits.new_zeros((), dtype=_wide(positions.logits[:0]).dtype)
    for part in positions.logits.split(_CHUNK):
        logits = _wide(part)
        with torch.no_grad():
            p = logits.softmax(-1)
            signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).to(p.device)
            v = p.sqrt()
            v = torch.where(signs.bool(), v, -v)
            v -= p * v.sum(-1, keepdim=True)
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
    labelled = not isinstance(batch, Mapping) or "labels" in batch
    if name == "auto":
        kind = type(model).__name__
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            name = "causal-lm"
        elif kind.endswith(("ForSequenceClassification", "ForImageClassification")) and labelled:
            name = "classification"
        else:
            with torch.no_grad(), evaluating(model):
                shape = CausalLM().logits(model, batch).shape
            if len(shape) == 2:
                name = "classification" if labelled else "label-free"
            elif not labelled:
                name = "label-free"
            else:
                raise ValueError(
                    f"{kind} with logits {tuple(shape)}: cannot tell what its loss is; pass "
                    "objective='causal-lm', 'classification' (one label per token) or "
                    "'label-free'"
                )
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective={name!r}: expected auto, {', '.join(OBJECTIVES)} or an Objective"
        )
    if name == "label-free":
        with torch.no_grad(), evaluating(model):
            per_token = CausalLM().logits(model, batch).ndim == 3
        return LabelFree(model, per_token=per_token)
    return OBJECTIVES[name]()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode (dropout off, BatchNorm frozen), restored module by module afterwards, also
    after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on ``device``."""
    if isinstance(batch, Mapping):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch[0].to(device), batch[1].to(device)


@torch.no_grad()
def check_items(
    model: nn.Module, objective: Objective, items: Sequence[Batch], purpose: str
) -> None:
    """Whether the model can read the items of a split. One forward pass, over the longest.

    Raises ``ValueError`` naming split and item for a token beyond the embedding table, a label that
    is no class, or an item on which the model itself fails, such as one longer than its table of
    positions.
    """
    rows, table_of = None, getattr(model, "get_input_embeddings", None)
    if isinstance(items[0], Mapping) and "input_ids" in items[0] and callable(table_of):
        rows = getattr(table_of(), "num_embeddings", None)
    for i, item in enumerate(items):
        ids = item.get("input_ids") if isinstance(item, Mapping) else None
        if rows is not None and ids is not None and int(ids.max()) >= rows:
            raise ValueError(
                f"{purpose} item {i}: token {int(ids.max())}, and the model's embedding has "
                f"{rows} rows; use the tokenizer that belongs to the model"
            )
    longest = max(
        items,
        key=lambda x: max(t.numel() for t in (x.values() if isinstance(x, Mapping) else x[:1])),
    )
    batch = to_device(longest, next(model.parameters()).device)
    try:
        with evaluating(model):
            classes = objective.positions(objective.logits(model, batch), batch).logits.shape[-1]
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        shapes = (
            {k: tuple(v.shape) for k, v in batch.items()}
            if isinstance(batch, Mapping)
            else tuple(batch[0].shape)
        )
        raise ValueError(
            f"{purpose}: the model fails on an item of shape {shapes}: {error}; are its sequences "
            "too long for it?"
        ) from error
    if isinstance(objective, LabelFree):
        return
    for i, item in enumerate(items):
        labels = item.get("labels") if isinstance(item, Mapping) else item[1]
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            continue
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"{purpose} item {i}: label {int(wrong[0])}, and the model has {classes} "
                f"classes; expected labels from 0 to {classes - 1}, or {IGNORED} for positions "
                "that do not count"
            )


def evaluate(model: nn.Module, batches: Iterable[Batch], objective: Objective) -> ItemResults:
    """Results of every item, on the CPU in float64. One forward pass over the data (two for
    label-free)."""
    device = next(model.parameters()).device
    with evaluating(model):
        results = [objective.item_results(model, to_device(batch, device)) for batch in batches]
    if not results:
        raise ValueError(
            "evaluate: the data is empty; it must be re-iterable and hold at least one batch"
        )
    return ItemResults(
        loss=torch.cat([r.loss for r in results]).cpu(),
        count=torch.cat([r.count for r in results]).cpu(),
        correct=torch.cat([r.correct for r in results]).cpu(),
    )


def score_items(
    model: nn.Module, batches: Iterable[Batch], metric: Metric
) -> Float[Tensor, " items"]:
    """The metric of every item, on the CPU in float64. One forward pass over the data.

    Raises ``ValueError`` naming the metric if it does not return one number per item.
    """
    device = next(model.parameters()).device
    values = []
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            moved = to_device(batch, device)
            items = len(next(iter(moved.values())) if isinstance(moved, Mapping) else moved[0])
            found = torch.as_tensor(metric.of(outputs(model, moved), moved))
            if found.shape != (items,):
                raise ValueError(
                    f"metric {metric.name!r} returned shape {tuple(found.shape)} for a batch of "
                    f"{items} items; expected one number per item, ({items},)"
                )
            values.append(found.detach().double().cpu())
    if not values:
        raise ValueError(
            "score_items: the data is empty; it must be re-iterable and hold at least one batch"
        )
    return torch.cat(values)
