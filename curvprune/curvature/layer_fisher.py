"""The Fisher of a layer: trace and diagonal, from labels drawn from the model or, for the empirical
Fisher, from the data's own.

Standard errors are over items: about the population that the items come from.
"""

from __future__ import annotations

from collections.abc import Mapping

from curvprune.curvature.batched_fisher import fisher_moments
from curvprune.curvature.capture import Capture, items_in
from curvprune.curvature.layer_curvature import LayerCurvature, layers_of_moments
from curvprune.curvature.request import AnalysisRequest
from curvprune.curvature.sampled_fisher import fisher_pass
from curvprune.model import Batch, Layer


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
    if asked.matrix == "empirical-fisher":
        name = next(iter(layers))
        raise ValueError(
            f"layer {name}: {request.structure.reasons[name]}; the empirical Fisher needs layers "
            "that are called once; leave it out"
        )
    singles: list[Batch] = []
    for batch in request.batches:
        singles += [_item(batch, i) for i in range(items_in(batch))]
    passed = fisher_pass(request.model, request.objective, singles, layers, {}, draws=asked.draws)
    found = {}
    for name, layer in layers.items():
        found[name] = LayerCurvature(
            trace=passed.trace(name), diagonal=passed.diagonal[name], shape=layer.shape
        )
    return found


def _item(batch: Batch, number: int) -> Batch:
    one = slice(number, number + 1)
    if isinstance(batch, Mapping):
        return {k: v[one] for k, v in batch.items()}
    return batch[0][one], batch[1][one]
