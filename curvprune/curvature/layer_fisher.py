"""The Fisher of a layer: trace and diagonal, from labels drawn from the model or, for the empirical
Fisher, from the data's own.

Standard errors are over items: about the population that the items come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvprune.curvature.batched_fisher import fisher_moments
from curvprune.curvature.capture import Capture, items_in, wide
from curvprune.curvature.differentiation import differentiable
from curvprune.curvature.layer_curvature import LayerCurvature, layers_of_moments
from curvprune.curvature.request import AnalysisRequest
from curvprune.curvature.sampled_fisher import fisher_pass, ratio_estimate
from curvprune.curvature.unused import requiring
from curvprune.distributed import all_sum, gather, my_share
from curvprune.model import Batch, Layer, evaluating, one_item


def first_order(request: AnalysisRequest, taken: Capture) -> dict[str, LayerCurvature]:
    """The Fisher of all layers; ``taken`` is the first batch's forward pass."""
    factored = request.some(request.structure.factored)
    others = {n: layer for n, layer in request.layers.items() if n not in factored}
    found: dict[str, LayerCurvature] = {}
    # 1. Whole mini-batches at a time where the gradients have factors.
    if factored:
        found |= _from_factors(request, factored, taken)
    # 2. Item by item for the others.
    if others:
        found |= _from_items(request, others)
    return {n: found[n] for n in request.layers}


def _from_factors(
    request: AnalysisRequest, layers: Mapping[str, Layer], taken: Capture
) -> dict[str, LayerCurvature]:
    asked = request.asked
    moments = fisher_moments(
        request.model,
        request.objective,
        request.batches,
        layers,
        draws=None if asked.matrix == "empirical-fisher" else asked.draws,
        diagonal=asked.wants("diagonal"),
        first=taken,
    )
    return layers_of_moments(
        moments, request.layers, request.structure, method="items", stderr=True
    )


def _from_items(request: AnalysisRequest, layers: Mapping[str, Layer]) -> dict[str, LayerCurvature]:
    asked = request.asked
    singles: list[Batch] = []
    for batch in request.batches:
        singles += [one_item(batch, i) for i in range(items_in(batch))]
    if asked.matrix == "empirical-fisher":
        return _from_own_labels(request, layers, singles)
    passed = fisher_pass(request.model, request.objective, singles, layers, {}, draws=asked.draws)
    found = {}
    for name, layer in layers.items():
        found[name] = LayerCurvature(
            trace=passed.trace(name), diagonal=passed.diagonal[name], shape=layer.shape
        )
    return found


def _from_own_labels(
    request: AnalysisRequest, layers: Mapping[str, Layer], items: Sequence[Batch]
) -> dict[str, LayerCurvature]:
    """Squares of the gradients of every item's loss on its own labels, by the weights."""
    mine = my_share(items)
    weights = [layer.weight for layer in layers.values()]
    counts: list[float] = []
    traces: dict[str, list[float]] = {name: [] for name in layers}
    diagonals = {}
    for name, layer in layers.items():
        w = layer.weight
        diagonals[name] = torch.zeros(layer.shape, dtype=wide(w), device=w.device)
    # 1. One forward and one backward pass for each item.
    model = request.model
    with requiring(weights), evaluating(model), differentiable(model), torch.enable_grad():
        for item in mine:
            loss, positions = request.objective.loss(model, item)
            counts.append(float(positions))
            found: Sequence[Tensor | None] = [None] * len(weights)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, weights, allow_unused=True)
            for (name, layer), g in zip(layers.items(), found, strict=True):
                square = torch.zeros_like(diagonals[name])
                if g is not None:
                    square = layer.as_matrix(g).to(square.dtype).square()
                traces[name].append(float(square.sum(dtype=torch.float64)))
                diagonals[name] += square
    # 2. Means over the positions of all.
    count = gather(torch.tensor(counts, dtype=torch.float64))
    result = {}
    for name, layer in layers.items():
        sums = gather(torch.tensor(traces[name], dtype=torch.float64))
        result[name] = LayerCurvature(
            trace=ratio_estimate(sums, count),
            diagonal=all_sum(diagonals[name]) / float(count.sum()),
            shape=layer.shape,
        )
    return result
