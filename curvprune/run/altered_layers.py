"""Layers that are left as they are because their output is not their weight times their input."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from curvprune.model import Batch, Layer, Loss, deviations, to_device


def altered_layers(
    model: nn.Module, objective: Loss, item: Batch, layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Layer → what its module computes instead of its weight times its input.

    What would be rounded or pruned there is not what is used, and is solved for other inputs.
    Embeddings whose output is a row of their weight times a number are no such layers: their rows
    are rounded as they are. Cost: one forward pass of ``item``.
    """
    batch = to_device(item, next(model.parameters()).device)
    found = deviations(model, objective, batch, layers)
    return {name: one.what for name, one in found.items() if not one.used}
