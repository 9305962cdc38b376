"""What a model loses and scores on items of data, and whether it can read them at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.model.forward import Batch, evaluating, items_in, outputs, to_device
from curvprune.model.losses import ItemResults, Loss, PositionLoss
from curvprune.model.losses.families import IGNORED
from curvprune.model.losses.tasks import labels_of


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
    unit: str = ""
    bounds: tuple[float, float] | None = None
    higher_is_better: bool = True


def evaluate(model: nn.Module, batches: Iterable[Batch], objective: Loss) -> ItemResults:
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
            items = items_in(moved)
            # A user's function may return a list, or one number for the whole batch by mistake.
            found = _numbers(metric.of(outputs(model, moved), moved), metric.name)
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


def _numbers(given: Any, name: str) -> Tensor:
    """What a metric returned, as a tensor of real numbers."""
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.is_complex():
        kind = type(given).__name__
        if isinstance(given, (list, tuple)) and given:
            kind = f"{kind} of {type(given[0]).__name__}"
        raise ValueError(
            f"metric {name!r} returned a {kind}; expected a tensor or a list of one real number "
            "per item of the batch"
        )
    return found


def check_independent(model: nn.Module) -> None:
    """Raises ``ValueError`` for a BatchNorm without running statistics, by name: what the model
    says of an item would depend on the others of its batch."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and module.running_mean is None:
            raise ValueError(
                f"layer {name}: {type(module).__name__} has no running statistics, so what the "
                "model says of an item depends on the others of its batch; build it with "
                "track_running_stats=True and train it so, or use GroupNorm"
            )


@torch.no_grad()
def check_items(
    model: nn.Module,
    objective: Loss,
    items: Sequence[Batch],
    purpose: str,
    *,
    measured: bool = True,
) -> None:
    """Whether the model can read the items of a split. One forward pass, over the longest.

    ``measured``: the loss will be measured on them; without, a loss that needs no labels is not
    asked what the model's outputs are.

    Raises ``ValueError`` naming split and item for a token beyond the embedding table, a label that
    is no class, or an item on which the model itself fails, such as one longer than its table of
    positions.
    """
    check_independent(model)
    # 1. Tokens, first of all: one beyond the table ends a process that runs on a GPU.
    rows = _rows_of_embedding(model, items[0])
    if rows is not None:
        _check_tokens(items, rows, purpose)
    # 2. A forward pass over the longest item: what it can read, it can read of the others.
    longest = max(items, key=_largest_tensor)
    outputs = _outputs_of(model, objective, longest, purpose, counted=measured)
    # 3. Labels, of which the logits say how many classes there are.
    if isinstance(objective, PositionLoss) and objective.classes_by_label:
        batch = to_device(longest, outputs.device)
        classes = objective.places(outputs, batch).logits.shape[-1]
        _check_labels(items, classes, purpose)


def _rows_of_embedding(model: nn.Module, item: Batch) -> int | None:
    """How many tokens the model knows, if the items have tokens."""
    table_of = getattr(model, "get_input_embeddings", None)
    if not isinstance(item, Mapping) or "input_ids" not in item or not callable(table_of):
        return None
    try:
        return getattr(table_of(), "num_embeddings", None)
    except NotImplementedError:  # a class of transformers that looks tokens up in another way
        return None


def _check_tokens(items: Sequence[Batch], rows: int, purpose: str) -> None:
    for i, item in enumerate(items):
        tokens = item.get("input_ids") if isinstance(item, Mapping) else None
        if tokens is not None and int(tokens.max()) >= rows:
            raise ValueError(
                f"{purpose} item {i}: token {int(tokens.max())}, and the model's embedding has "
                f"{rows} rows; use the tokenizer that belongs to the model"
            )


def _largest_tensor(item: Batch) -> int:
    """Numbers in the largest input."""
    inputs = item.values() if isinstance(item, Mapping) else item[:1]
    return max(tensor.numel() for tensor in inputs)


def _outputs_of(
    model: nn.Module, objective: Loss, item: Batch, purpose: str, *, counted: bool
) -> Tensor:
    """The outputs of an item; what the loss says against them is said here."""
    batch = to_device(item, next(model.parameters()).device)
    try:
        with evaluating(model):
            outputs = objective.outputs(model, batch)
            _check_rows(outputs, batch, purpose)
            if objective.labelled or counted:
                objective.counts(outputs, batch)
            return outputs
    # It is a RuntimeError too, but says nothing about the item.
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        shapes: dict[str, tuple[int, ...]] | tuple[int, ...]
        if isinstance(batch, Mapping):
            shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        else:
            shapes = tuple(batch[0].shape)
        raise ValueError(
            f"{purpose}: the model fails on an item of shape {shapes}: {error}; are its sequences "
            "too long for it?"
        ) from error


def _check_rows(outputs: Tensor, batch: Batch, purpose: str) -> None:
    """Every item must have its own outputs, or those of one would be taken for several items."""
    if outputs.ndim and len(outputs) == items_in(batch):
        return
    raise ValueError(
        f"{purpose}: the model's outputs for one item have shape {tuple(outputs.shape)}, and their "
        "first dimension must count items; where they are those of nodes or patches, wrap the "
        "model so that it returns outputs[None]"
    )


def _check_labels(items: Sequence[Batch], classes: int, purpose: str) -> None:
    for i, item in enumerate(items):
        labels = labels_of(item)
        # Labels that are no classes are the objective's to refuse.
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            continue
        counts = labels != IGNORED
        wrong = labels[counts & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise ValueError(
                f"{purpose} item {i}: label {int(wrong[0])}, and the model has {classes} "
                f"classes; expected labels from 0 to {classes - 1}, or {IGNORED} for positions "
                "that do not count"
            )
