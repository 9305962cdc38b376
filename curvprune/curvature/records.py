"""What an analysis writes: its numbers without tensors and eigenvectors, ready for JSON.

Every record is made from the result it stands for by ``of``. Those that an interrupted analysis
reads back have an inverse, which gives all but the eigenvectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvprune.curvature.estimates import EigenPairs, Estimate
from curvprune.curvature.spectral_density import SpectralDensity
from curvprune.schema import Number


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateRecord:
    """A number and its standard error."""

    value: Number
    stderr: Number

    @staticmethod
    def of(estimate: Estimate | None) -> EstimateRecord | None:
        if estimate is None:
            return None
        return EstimateRecord(value=estimate.value, stderr=estimate.stderr)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRecord:
    """A layer's trace: how it was found, at what cost, and whether it met the tolerance."""

    value: Number
    stderr: Number
    num_products: int
    converged: bool
    method: str

    @staticmethod
    def of(trace: Estimate | None, method: str) -> TraceRecord | None:
        if trace is None:
            return None
        return TraceRecord(
            value=trace.value,
            stderr=trace.stderr,
            num_products=trace.num_products,
            converged=trace.converged,
            method=method,
        )

    def estimate(self) -> Estimate:
        return Estimate(
            value=self.value,
            stderr=self.stderr,
            num_products=self.num_products,
            converged=self.converged,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagonalRecord:
    """Mean, largest entry and two quantiles of a diagonal; ``error`` is its relative standard error
    where that is known."""

    mean: Number
    max: Number
    q50: Number
    q99: Number
    error: float | None = None

    @staticmethod
    def of(diagonal: Tensor, error: float) -> DiagonalRecord:
        flat = diagonal.reshape(-1)
        return DiagonalRecord(
            mean=float(flat.mean()),
            max=float(flat.max()),
            q50=_quantile(flat, 0.5),
            q99=_quantile(flat, 0.99),
            error=error if math.isfinite(error) else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EigenvaluesRecord:
    """Extreme eigenvalues, ascending, with residuals and error bounds; shapes ``(k,)``."""

    values: tuple[Number, ...]
    residuals: tuple[Number, ...]
    errors: tuple[Number, ...]
    converged: bool
    num_products: int

    @staticmethod
    def of(pairs: EigenPairs) -> EigenvaluesRecord:
        return EigenvaluesRecord(
            values=_numbers(pairs.values),
            residuals=_numbers(pairs.residuals),
            errors=_numbers(pairs.errors),
            converged=pairs.converged,
            num_products=pairs.num_products,
        )

    def eigenpairs(self) -> EigenPairs:
        values = _tensor(self.values)
        return EigenPairs(
            values=values,
            residuals=_tensor(self.residuals),
            errors=_tensor(self.errors),
            vectors=values.new_zeros(0, len(values)),
            num_products=self.num_products,
            converged=self.converged,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityRecord:
    """A spectral density: smoothed on a grid ``(points,)``, and the quadrature nodes and weights
    ``(runs, steps)`` behind it."""

    grid: tuple[Number, ...]
    density: tuple[Number, ...]
    nodes: tuple[tuple[Number, ...], ...]
    weights: tuple[tuple[Number, ...], ...]
    num_products: int

    @staticmethod
    def of(found: SpectralDensity) -> DensityRecord:
        return DensityRecord(
            grid=_numbers(found.grid),
            density=_numbers(found.density),
            nodes=tuple(_numbers(run) for run in found.nodes),
            weights=tuple(_numbers(run) for run in found.weights),
            num_products=found.num_products,
        )

    def spectral_density(self) -> SpectralDensity:
        return SpectralDensity(
            nodes=_tensor(self.nodes),
            weights=_tensor(self.weights),
            grid=_tensor(self.grid),
            density=_tensor(self.density),
            num_products=self.num_products,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCurvatureRecord:
    """Curvature of one layer's block; see `curvprune.curvature.layer_curvature.LayerCurvature`."""

    parameters: int
    shape: tuple[int, int]
    trace: TraceRecord | None
    diagonal: DiagonalRecord | None
    exact: bool
    gauss_newton_trace: EstimateRecord | None
    eigenvalues: EigenvaluesRecord | None
    density: DensityRecord | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RememberedLayer:
    """What an interrupted analysis keeps of a layer.

    Attributes:
        method: how trace and diagonal were found, also where no trace was asked for.
        spectrum: of an exact block, all its eigenvalues but zeros, descending.
    """

    curvature: LayerCurvatureRecord
    method: str
    spectrum: tuple[Number, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RememberedLayers:
    """What an interrupted analysis keeps of layers that were finished together."""

    layers: dict[str, RememberedLayer]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCurvatureRecord:
    """Curvature of the whole model; see `curvprune.curvature.model_curvature.ModelCurvature`."""

    parameters: int
    loss: Number
    gradient_norm: Number
    trace: EstimateRecord | None
    eigenvalues: EigenvaluesRecord | None
    density: DensityRecord | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """A layer whose Hessian and Gauss–Newton traces differ by more than their errors and 20 %."""

    layer: str
    hessian: float
    gauss_newton: float
    ratio: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagnosisRecord:
    """What the whole model's spectrum says; see `curvprune.curvature.diagnosis.Diagnosis`."""

    lambda_max: float | None
    lambda_min: float | None
    sharpness: float | None
    max_learning_rate: float | None
    negative_share: EstimateRecord | None
    near_zero_share: EstimateRecord | None
    near_zero_below: float | None
    effective_rank: float | None
    gradient_norm: Number
    relative_gradient: float | None
    kind: str | None
    text: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalysisRecord:
    """Curvature of the loss by layer and of the whole model; ``matrix`` says of which matrix."""

    matrix: str
    measure: str
    num_items: int
    layers: dict[str, LayerCurvatureRecord]
    model: ModelCurvatureRecord | None = None
    diagnosis: DiagnosisRecord | None = None
    notes: tuple[str, ...] = ()


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())


def _tensor(numbers: tuple[float, ...] | tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _quantile(values: Tensor, share: float) -> float:
    # quantile() takes no more than 2**24 values.
    rank = max(1, int(share * values.numel()))
    return float(values.kthvalue(rank).values)
