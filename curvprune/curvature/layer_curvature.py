"""What an analysis finds for one layer.

How it is found: `curvprune.curvature.layer_hessian` for the Hessian and the Gauss–Newton matrix,
`curvprune.curvature.layer_fisher` for the Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.batched_fisher import FisherMoments
from curvprune.curvature.capture import wide
from curvprune.curvature.estimates import EigenPairs, Estimate
from curvprune.curvature.records import (
    DensityRecord,
    DiagonalRecord,
    EigenvaluesRecord,
    EstimateRecord,
    LayerCurvatureRecord,
    RememberedLayer,
    RememberedLayers,
    TraceRecord,
)
from curvprune.curvature.sampled_fisher import ratio_estimate
from curvprune.curvature.spectral_density import SpectralDensity, exact_density
from curvprune.curvature.structure import Structure
from curvprune.model import Layer

HALF = "half precision"  # the method of closed forms with the error of rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCurvature:
    """Curvature of one layer's block.

    Attributes:
        trace: in nats per position; ``stderr`` 0 where it is exact. ``None`` if it was not asked
            for.
        diagonal: shaped as the weight as a matrix, ``(out, in)``.
        method: how trace and diagonal were found: ``"exact"``, ``"half precision"`` (in closed form
            by a model in half precision, with the error of rounding), ``"items"``, ``"joint
            probes"`` or ``"layer probes"``.
        exact: the layer's path to the loss is piecewise linear, so that its Hessian block is its
            Gauss–Newton block.
        eigenpairs: extreme ones, both ends. Of an exact block, the null space has no vectors: they
            are nan.
        density: of the block.
        spectrum: of an exact block, all its eigenvalues but the null space's zeros, descending, in
            nats; computed with the eigenpairs.
        diagonal_error: relative standard error of the diagonal (2-norm); 0 where exact, nan where
            not estimated.
        gauss_newton_trace: of the same block, for comparison with the Hessian's.
        diagonal_summary: mean, max and quantiles; all that is left of a diagonal that was found on
            disk.
    """

    trace: Estimate | None
    diagonal: Float[Tensor, "out in"] | None
    shape: tuple[int, int]
    method: str = "items"
    exact: bool = False
    eigenpairs: EigenPairs | None = None
    density: SpectralDensity | None = None
    diagonal_error: float = math.nan
    gauss_newton_trace: Estimate | None = None
    diagonal_summary: DiagonalRecord | None = None
    spectrum: Float[Tensor, " rank"] | None = None

    @staticmethod
    def nothing_of(layer: Layer) -> LayerCurvature:
        """A layer of which nothing is known yet."""
        return LayerCurvature(trace=None, diagonal=None, shape=layer.shape)

    @staticmethod
    def zeros_of(layer: Layer, quantities: Collection[str]) -> LayerCurvature:
        """What is asked of a layer on which the loss does not depend."""
        weight = layer.weight
        zero = torch.zeros((), dtype=wide(weight), device=weight.device)
        base = LayerCurvature(
            trace=None, diagonal=None, shape=layer.shape, method="exact", diagonal_error=0.0
        )
        if not {"trace", "diagonal"}.isdisjoint(quantities):
            base = replace(base, trace=Estimate(value=0.0, stderr=0.0))
        if "diagonal" in quantities:
            base = replace(base, diagonal=zero.repeat(layer.shape))
        if "eigenvalues" in quantities:
            ends = torch.zeros(min(2, layer.numel), dtype=torch.float64, device=weight.device)
            pairs = EigenPairs(
                values=ends,
                vectors=(zero + torch.nan).expand(layer.numel, len(ends)),
                residuals=ends,
                errors=ends,
                num_products=0,
                converged=True,
            )
            base = replace(base, eigenpairs=pairs, spectrum=ends[:0])
        if "layer-densities" in quantities:
            level = exact_density(np.zeros(1), 0)
            base = replace(base, density=replace(level, dim=layer.numel))
        return base

    def to_record(self) -> LayerCurvatureRecord:
        # Of a diagonal that was found on disk there is nothing but the summary.
        diagonal = self.diagonal_summary
        if self.diagonal is not None:
            diagonal = DiagonalRecord.of(self.diagonal, self.diagonal_error)
        pairs, density = self.eigenpairs, self.density
        return LayerCurvatureRecord(
            parameters=math.prod(self.shape),
            shape=self.shape,
            trace=TraceRecord.of(self.trace, self.method),
            diagonal=diagonal,
            exact=self.exact,
            gauss_newton_trace=EstimateRecord.of(self.gauss_newton_trace),
            eigenvalues=None if pairs is None else EigenvaluesRecord.of(pairs),
            density=None if density is None else DensityRecord.of(density),
        )


def remembered(layers: dict[str, LayerCurvature]) -> RememberedLayers:
    """What is kept of finished layers: all but the tensors of diagonals and eigenvectors."""
    kept = {}
    for name, found in layers.items():
        spectrum = None if found.spectrum is None else tuple(found.spectrum.tolist())
        kept[name] = RememberedLayer(
            curvature=found.to_record(), method=found.method, spectrum=spectrum
        )
    return RememberedLayers(layers=kept)


def recalled(record: RememberedLayers) -> dict[str, LayerCurvature]:
    """The layers that `remembered` kept."""
    layers = {}
    for name, kept in record.layers.items():
        found = kept.curvature
        spectrum = None
        if kept.spectrum is not None:
            spectrum = torch.tensor(kept.spectrum, dtype=torch.float64)
        layers[name] = LayerCurvature(
            trace=None if found.trace is None else found.trace.estimate(),
            diagonal=None,
            shape=found.shape,
            method=kept.method,
            exact=found.exact,
            eigenpairs=None if found.eigenvalues is None else found.eigenvalues.eigenpairs(),
            diagonal_summary=found.diagonal,
            spectrum=spectrum,
        )
    return layers


def layers_of_moments(
    moments: FisherMoments,
    layers: Mapping[str, Layer],
    structure: Structure,
    *,
    method: str,
    stderr: bool,
) -> dict[str, LayerCurvature]:
    """Traces and diagonals from sums over items; with ``stderr``, errors over items, else they are
    exact."""
    total = float(moments.count.sum())
    found = {}
    for name, sums in moments.traces.items():
        error = rounding_of(layers[name].weight)
        if stderr:
            trace = ratio_estimate(sums, moments.count)
        else:
            value = float(sums.sum()) / total
            trace = Estimate(value=value, stderr=error * abs(value), num_items=len(sums))
        found[name] = LayerCurvature(
            trace=trace,
            diagonal=moments.diagonal.get(name),
            shape=layers[name].shape,
            method=HALF if method == "exact" and error else method,
            exact=name in structure.piecewise_linear,
            diagonal_error=math.nan if stderr else error,
        )
    return found


def rounding_of(weight: Tensor) -> float:
    """Relative error of a closed form computed in half precision; 0 beyond that."""
    # Activations and gradients of a few layers, each rounded by half an eps, not all one way.
    return 4 * torch.finfo(weight.dtype).eps if weight.dtype.itemsize < 4 else 0.0
