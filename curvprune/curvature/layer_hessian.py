"""The Hessian of a layer, or its Gauss–Newton matrix: trace, diagonal, eigenvalues and density of
the layer's block, each by the best method that the model's structure allows.

    exact      Gauss–Newton blocks where every item has one prediction of few classes; Hessian
               blocks of layers whose path to the loss is piecewise linear; output layers
    probes     traces and diagonals from joint and restricted Hutchinson probes, with standard
               errors over probes
    Lanczos    extreme eigenpairs with residuals; density by stochastic Lanczos quadrature

Standard errors of probes are about these data, not about the population that the items come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch

from curvprune.curvature.batched_fisher import fisher_moments
from curvprune.curvature.estimates import EigenPairs
from curvprune.curvature.estimators import density, eigenpairs
from curvprune.curvature.gauss_newton_blocks import (
    exact_gauss_newton,
    has_columns,
    head_moments,
)
from curvprune.curvature.layer_curvature import (
    LayerCurvature,
    layers_of_moments,
    recalled,
    remembered,
    rounding_of,
)
from curvprune.curvature.probes import LayerTrace, probe_layers
from curvprune.curvature.products import MatrixFree
from curvprune.curvature.records import DensityRecord, EigenvaluesRecord, RememberedLayers
from curvprune.curvature.request import AnalysisRequest
from curvprune.curvature.spectral_density import SpectralDensity
from curvprune.model import Layer, evaluating

# Asked of eigenvalues whose error shall be below 1e-2: r²/gap is optimistic where the spectrum is
# dense at its ends.
EIGEN_TOL = 2e-3

# Streams of random numbers, far enough apart for any number of layers or groups.
TRACES, EIGENVALUES, DENSITIES = 1, 1000, 500_000
TRACES_APART = 2_000_000


def second_order(request: AnalysisRequest) -> dict[str, LayerCurvature]:
    """Blocks of the Hessian or the Gauss–Newton matrix, of all layers."""
    asked, layers = request.asked, request.layers
    per_layer = asked.wants("trace", "diagonal")
    exact = _exact_layers(request)
    rest = [n for n in layers if n not in exact]
    heads = [n for n in rest if n in request.structure.heads]
    found: dict[str, LayerCurvature] = {}

    # 1. Exact blocks, from the columns of the loss's Hessian at the outputs.
    if exact:
        request.advance("exact blocks", 0, 1)
        found |= _recall_layers(request, "exact", lambda: _exact_blocks(request, exact))
        request.advance("exact blocks", 1, 1)

    # 2. Trace and diagonal of output layers, in closed form.
    if per_layer and heads:
        found |= _recall_layers(request, "heads", lambda: _output_layers(request, heads))

    # 3. Probes and Lanczos for the others.
    if rest and (per_layer or asked.wants("eigenvalues")):
        _estimate(request, rest, found)
        # 4. Beside the Hessian's, the Gauss–Newton trace.
        if asked.matrix == "hessian" and asked.wants("trace"):
            probed = {n: found[n] for n in rest if n not in heads}
            found |= _beside_gauss_newton(request, probed)

    # 5. Densities, of all layers.
    if asked.wants("layer-densities"):
        found |= _densities(request, found)

    # 6. In the order of the layers, also those that nothing was asked of.
    return {n: found.get(n) or LayerCurvature.nothing_of(layer) for n, layer in layers.items()}


def _recall_layers(
    request: AnalysisRequest, key: str, compute: Callable[[], dict[str, LayerCurvature]]
) -> dict[str, LayerCurvature]:
    """Layers that are finished together, computed or read back."""
    return request.recall(
        key, RememberedLayers, compute, to_record=remembered, from_record=recalled
    )


# -------------------------------------------------------------------------------------------- exact


def _exact_layers(request: AnalysisRequest) -> Sequence[str]:
    """Layers whose block is a Gauss–Newton block that columns give exactly."""
    structure = request.structure
    if not structure.exact or not has_columns(request.model, request.objective, request.batches):
        return ()
    return structure.factored if request.asked.matrix == "ggn" else structure.piecewise_linear


def _exact_blocks(request: AnalysisRequest, names: Sequence[str]) -> dict[str, LayerCurvature]:
    asked, structure = request.asked, request.structure
    blocks = exact_gauss_newton(
        request.model,
        request.objective,
        request.batches,
        request.some(names),
        moments=asked.wants("trace", "diagonal"),
        diagonal=asked.wants("diagonal"),
        eigenvalues=1 if asked.wants("eigenvalues") else 0,
    )
    found = layers_of_moments(
        blocks.moments, request.layers, structure, method="exact", stderr=False
    )
    for name in names:
        base = found.get(name)
        if base is None:
            nothing = LayerCurvature.nothing_of(request.layers[name])
            base = replace(nothing, method="exact", exact=name in structure.piecewise_linear)
        pairs = blocks.eigenpairs.get(name)
        error = rounding_of(request.layers[name].weight)
        if pairs is not None and error:
            bound = torch.full_like(pairs.errors, error * float(pairs.values.abs().max()))
            pairs = replace(pairs, residuals=bound, errors=bound)
        found[name] = replace(base, eigenpairs=pairs, spectrum=blocks.spectra.get(name))
    return found


def _output_layers(request: AnalysisRequest, names: Sequence[str]) -> dict[str, LayerCurvature]:
    moments = head_moments(
        request.model,
        request.objective,
        request.batches,
        request.some(names),
        diagonal=request.asked.wants("diagonal"),
    )
    return layers_of_moments(
        moments, request.layers, request.structure, method="exact", stderr=False
    )


# ------------------------------------------------------------------------------- probes and Lanczos


class _Group:
    """Neighbouring layers that are probed together.

    Attributes:
        names: the layers.
        number: of the group.
        before: layers in the groups before it.
        parameters: layer → parameter of the operator.
    """

    def __init__(
        self, request: AnalysisRequest, names: Sequence[str], number: int, before: int
    ) -> None:
        self.request, self.names = request, names
        self.number, self.before = number, before
        self.parameters = {n: request.parameter(n) for n in names}

    @cached_property
    def operator(self) -> MatrixFree:
        """Over the group's layers, built where it is first needed."""
        return self.request.operator(list(self.parameters.values()))


def _estimate(
    request: AnalysisRequest, rest: Sequence[str], found: dict[str, LayerCurvature]
) -> None:
    """Probed traces and diagonals, and eigenvalues by Lanczos; ``found`` takes them in."""
    asked, heads = request.asked, request.structure.heads
    before = 0
    groups = _groups(request, rest)
    for number, names in enumerate(groups):
        # Gone before the next group's is built: a graph is the largest thing here.
        group = _Group(request, names, number, before)
        probed = [n for n in names if n not in heads]
        if probed and asked.wants("trace", "diagonal"):
            found |= _traces(request, group, probed, len(rest))
        if asked.wants("eigenvalues"):
            for i, name in enumerate(names, start=before):
                base = found.get(name) or LayerCurvature.nothing_of(request.layers[name])
                found[name] = replace(base, eigenpairs=_extremes(request, group, name, i))
                request.advance("eigenvalues", i + 1, len(rest))
        before += len(names)
    _note_limits(request, len(groups), {n: found[n] for n in rest if n in found})


def _note_limits(
    request: AnalysisRequest, groups: int, probed: Mapping[str, LayerCurvature]
) -> None:
    """Say what memory and the number of products did to the estimates."""
    asked = request.asked
    if groups > 1:
        request.notes.append(
            f"layers were probed in {groups} groups, so that their vectors fit vector_bytes"
        )
    slow = [n for n, c in probed.items() if c.trace is not None and not c.trace.converged]
    if slow:
        request.notes.append(
            f"{len(slow)} of {len(probed)} probed traces did not reach a standard error of "
            f"{asked.rtol:.0%} with {asked.max_products} probes each (first: {slow[0]}); raise "
            "max_products or rtol"
        )


def _groups(request: AnalysisRequest, names: Sequence[str]) -> list[list[str]]:
    """Neighbouring layers whose vectors fit into ``vector_bytes`` together; at least one layer
    each."""
    # Probe, product, retained gradient, one to move them; two halves of the diagonal for each kind
    # of probe.
    vectors = 8 if request.asked.wants("diagonal") else 4
    groups: list[list[str]] = []
    room = 0
    for name in names:
        weight = request.layers[name].weight
        size = vectors * weight.numel() * (8 if weight.dtype == torch.float64 else 4)
        if not groups or size > room:
            groups.append([])
            room = request.asked.vector_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _traces(
    request: AnalysisRequest, group: _Group, names: Sequence[str], total: int
) -> dict[str, LayerCurvature]:
    """Probed traces and diagonals of some layers of a group, of ``total`` layers."""
    asked = request.asked

    def advance(done: int, _: int) -> None:
        request.advance("traces", group.before + done, total)

    def compute() -> dict[str, LayerCurvature]:
        traces = probe_layers(
            group.operator,
            {n: group.parameters[n] for n in names},
            rtol=asked.rtol,
            max_products=asked.max_products,
            diagonal=asked.wants("diagonal"),
            generator=request.generator(TRACES + TRACES_APART * group.number),
            advance=advance,
        )
        return {n: _of_probes(request.layers[n], trace) for n, trace in traces.items()}

    return _recall_layers(request, f"traces-{group.number}", compute)


def _of_probes(layer: Layer, found: LayerTrace) -> LayerCurvature:
    diagonal, error = None, math.nan
    if found.diagonal is not None:
        diagonal = layer.as_matrix(found.diagonal.view(layer.weight.shape))
        error = found.diagonal_error
    return LayerCurvature(
        trace=found.trace,
        diagonal=diagonal,
        shape=layer.shape,
        method="layer probes" if found.restricted else "joint probes",
        diagonal_error=error,
    )


def _extremes(request: AnalysisRequest, group: _Group, name: str, number: int) -> EigenPairs:
    """Extreme eigenpairs of the layer with that number among the estimated ones."""
    asked = request.asked

    def compute() -> EigenPairs:
        block = group.operator.restrict([group.parameters[name]])
        return eigenpairs(
            block,
            1,
            which=asked.which if block.space.dim > 1 else "LM",
            tol=EIGEN_TOL,
            max_products=max(asked.max_products, 8),
            generator=request.generator(EIGENVALUES + number),
        )

    return request.recall(
        f"eigenvalues-{number}",
        EigenvaluesRecord,
        compute,
        to_record=EigenvaluesRecord.of,
        from_record=EigenvaluesRecord.eigenpairs,
    )


def _densities(
    request: AnalysisRequest, found: Mapping[str, LayerCurvature]
) -> dict[str, LayerCurvature]:
    """Spectral density of every layer's block: 3 runs of 30 products restricted to the layer."""
    parameters = {n: request.parameter(n) for n in request.layers}
    operator = request.operator(list(parameters.values()))

    def compute(number: int, parameter: str) -> SpectralDensity:
        block = operator.restrict([parameter])
        generator = request.generator(DENSITIES + number)
        return density(block, runs=3, steps=30, points=256, generator=generator)

    result = {}
    for i, (name, layer) in enumerate(request.layers.items()):
        spectrum = request.recall(
            f"density-{i}",
            DensityRecord,
            partial(compute, i, parameters[name]),
            to_record=DensityRecord.of,
            from_record=DensityRecord.spectral_density,
        )
        base = found.get(name) or LayerCurvature.nothing_of(layer)
        result[name] = replace(base, density=spectrum)
        request.advance("densities of the layers", i + 1, len(parameters))
    return result


def _beside_gauss_newton(
    request: AnalysisRequest, layers: Mapping[str, LayerCurvature]
) -> dict[str, LayerCurvature]:
    """Layers with their Gauss–Newton trace: exact where that is possible, else from sampled labels.
    Cost: one gradient or a few."""
    structure = request.structure
    known = request.some([n for n in layers if n in structure.factored])
    model, objective, batches = request.model, request.objective, request.batches
    # A loss that is not convex in the outputs, or not known as their function, has no such trace.
    if not known or not _is_drawn(request):
        return dict(layers)
    if structure.exact:
        moments = exact_gauss_newton(model, objective, batches, known, diagonal=False).moments
    else:
        draws = request.asked.draws
        moments = fisher_moments(model, objective, batches, known, draws=draws, diagonal=False)
    traces = layers_of_moments(
        moments, request.layers, structure, method="items", stderr=not structure.exact
    )
    result = dict(layers)
    for name, theirs in traces.items():
        result[name] = replace(layers[name], gauss_newton_trace=theirs.trace)
    return result


def _is_drawn(request: AnalysisRequest) -> bool:
    """Whether the loss's curvature at the outputs is a covariance."""
    objective = request.objective
    if objective.curvature != "differentiation":
        return objective.curvature == "closed form"
    if request.structure.exact:
        return has_columns(request.model, objective, request.batches)
    # Beyond a few outputs a draw itself tells.
    batch = request.batches[0]
    with torch.no_grad(), evaluating(request.model):
        outputs = objective.outputs(request.model, batch)
    try:
        objective.draw(outputs, batch, request.generator(0))
    except ValueError:
        return False
    return True
