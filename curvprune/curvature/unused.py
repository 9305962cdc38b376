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

    Cost: a forward and a backward pass of one item; of all batches where a layer is not reached,
    as an expert may be that no router chose for the first item.
    """
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
