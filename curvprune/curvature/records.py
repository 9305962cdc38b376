"""What an analysis writes: its numbers without tensors and eigenvectors, ready for JSON."""

from __future__ import annotations

from dataclasses import dataclass

from curvprune.schema import Number


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateRecord:
    """A number and its standard error."""

    value: Number
    stderr: Number


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRecord:
    """A layer's trace: how it was found, at what cost, and whether it met the tolerance."""

    value: Number
    stderr: Number
    num_products: int
    converged: bool
    method: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagonalRecord:
    """Mean, largest entry and two quantiles of a diagonal; ``error`` is its relative standard error
    where that is known."""

    mean: float
    max: float
    q50: float
    q99: float
    error: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EigenvaluesRecord:
    """Extreme eigenvalues, ascending, with residuals and error bounds; shapes ``(k,)``."""

    values: tuple[Number, ...]
    residuals: tuple[Number, ...]
    errors: tuple[Number, ...]
    converged: bool
    num_products: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityRecord:
    """A spectral density: smoothed on a grid ``(points,)``, and the quadrature nodes and weights
    ``(runs, steps)`` behind it."""

    grid: tuple[Number, ...]
    density: tuple[Number, ...]
    nodes: tuple[tuple[Number, ...], ...]
    weights: tuple[tuple[Number, ...], ...]
    num_products: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCurvatureRecord:
    """Curvature of one layer's block; see `curvprune.curvature.analysis.LayerCurvature`."""

    parameters: int
    shape: tuple[int, int]
    trace: TraceRecord | None
    diagonal: DiagonalRecord | None
    exact: bool
    gauss_newton_trace: EstimateRecord | None
    eigenvalues: EigenvaluesRecord | None
    density: DensityRecord | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCurvatureRecord:
    """Curvature of the whole model; see `curvprune.curvature.analysis.ModelCurvature`."""

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
    """What the whole model's spectrum says; see `curvprune.curvature.analysis.Diagnosis`."""

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
