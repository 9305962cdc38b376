"""What a change of one layer alone costs, measured: for changes that are too large for a quadratic
model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.model import Batch, Layer, Loss, evaluating, to_device


@torch.no_grad()
def divergences(
    model: nn.Module,
    objective: Loss,
    items: Sequence[Batch],
    layers: Mapping[str, Layer],
    changed: Sequence[tuple[str, Tensor]],
) -> Float[Tensor, "items changes"]:
    """What every change alone costs each item beyond the slope of its loss (`Loss.rises`), summed
    over its positions. For a likelihood it is the KL divergence from the model's own outputs, in
    nats, and needs no labels. It is what ``½ δᵀ F δ`` is the second order of.

    Args:
        items: batches of one item each.
        changed: names of layers, each with another weight ``(out, in)`` for it.

    The layers' weights are written to and come back as they were, also when something fails.

    Cost: a forward pass per item and change, and one per item.
    """
    device = next(model.parameters()).device
    own = {n: layers[n].as_matrix(layers[n].weight.detach()).clone() for n in dict(changed)}
    sums = torch.zeros(len(items), len(changed), dtype=torch.float64)
    with evaluating(model):
        # Every item is read once, and its outputs compared with those after each change alone.
        for i, item in enumerate(items):
            batch = to_device(item, device)
            before = objective.outputs(model, batch)
            for k, (name, weight) in enumerate(changed):
                try:
                    layers[name].write_(weight)
                    after = objective.outputs(model, batch)
                finally:
                    layers[name].write_(own[name])
                sums[i, k] = objective.rises(before, after, batch).sum()
    return sums
