"""Layers that are not on the way to the loss: their rows of every curvature matrix are zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvprune.curvature.determinism import first_items
from curvprune.curvature.differentiation import differentiable
from curvprune.model import Batch, Layer, Loss, PositionLoss, evaluating


def unused_layers(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
) -> list[str]:
    """Layers whose weight no counting output of any batch depends on.

    Raises ``ValueError`` for a model that fails on one item alone.

    Cost: two forward passes and a backward pass of one item; of all batches where a layer is not
    reached, as an expert may be that no router chose for the first item.
    """
    _check_one_item(model, objective, batches[0])
    left = dict(layers)
    for batch in (first_items(batches[0], 1), *batches):
        if not left:
            break
        weights = [layer.weight for layer in left.values()]
        with requiring(weights), evaluating(model), differentiable(model), torch.enable_grad():
            outputs = objective.outputs(model, batch)
            if isinstance(objective, PositionLoss) and objective.curvature == "closed form":
                outputs = objective.positions(outputs, batch).logits
            outputs = outputs.sum()
            if not outputs.requires_grad:
                continue
            gradients = torch.autograd.grad(outputs, weights, allow_unused=True)
        reached = [name for name, g in zip(left, gradients, strict=True) if g is not None]
        for name in reached:
            del left[name]
    return list(left)


def _check_one_item(model: nn.Module, objective: Loss, batch: Batch) -> None:
    """Raises ``ValueError`` for a model that fails on one item alone: then the rows of its tensors
    are no items."""
    try:
        with torch.no_grad(), evaluating(model):
            item = first_items(batch, 1)
            found = objective.outputs(model, item)
            counted = len(objective.counts(found, item)) if objective.curvature != "none" else 1
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"{type(model).__name__} fails on the first item of a batch alone: {error}; the first "
            "dimension of every tensor of a batch must count items"
        ) from error
    if counted != 1:
        raise ValueError(
            f"loss {objective.name} counts {counted} items in one item of {type(model).__name__}, "
            f"whose outputs are {tuple(found.shape)}; pass a loss that knows their layout, "
            "curvprune.Loss.of(...)"
        )


@contextmanager
def requiring(weights: Iterable[Tensor]) -> Iterator[None]:
    """These weights require a gradient; the flags come back."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in before:
            weight.requires_grad_(flag)
