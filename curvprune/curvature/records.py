"""What an analysis writes: its numbers without tensors and eigenvectors, ready for JSON.

Every record is made from the result it stands for by ``of``. Those that an interrupted analysis
reads back have an inverse, which gives all but the eigenvectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvprune.curvature.estimates import EigenPairs, End, Estimate
from curvprune.curvature.spectral_density import SpectralDensity
from curvprune.schema import Number


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateRecord:
    """A number and its standard error; see `curvprune.curvature.Estimate`.

    Attributes:
        stderr: about these items: of probes, starts and quadrature.
        over_items: about the population that the items come from, where it was estimated.
        converged: whether the accuracy asked for was met, where one was asked for.
    """

    value: Number
    stderr: Number
    over_items: float | None = None
    converged: bool | None = None
    num_products: int = 0

    @staticmethod
    def of(estimate: Estimate | None) -> EstimateRecord | None:
        return None if estimate is None else EstimateRecord.made(estimate)

    @staticmethod
    def made(estimate: Estimate) -> EstimateRecord:
        return EstimateRecord(
            value=estimate.value,
            stderr=estimate.stderr,
            over_items=estimate.over_items,
            converged=estimate.converged,
            num_products=estimate.num_products,
        )

    def estimate(self) -> Estimate:
        return Estimate(
            value=self.value,
            stderr=self.stderr,
            num_products=self.num_products,
            converged=bool(self.converged),
            over_items=self.over_items,
        )


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
class EndRecord:
    """What other items say of an extreme eigenvalue; see `curvprune.curvature.End`."""

    over_items: Number
    held_out: Number
    held_out_error: Number

    @staticmethod
    def of(end: End | None) -> EndRecord | None:
        if end is None:
            return None
        return EndRecord(
            over_items=end.over_items, held_out=end.held_out, held_out_error=end.held_out_error
        )

    def end(self) -> End:
        return End(
            over_items=self.over_items,
            held_out=self.held_out,
            held_out_error=self.held_out_error,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtremesRecord:
    """Both ends of the whole model's spectrum, as an interrupted analysis keeps them."""

    eigenvalues: EigenvaluesRecord
    highest: EndRecord | None
    lowest: EndRecord | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityRecord:
    """A spectral density: smoothed on a grid ``(points,)``, and the quadrature nodes and weights
    ``(runs, steps)`` behind it."""

    grid: tuple[Number, ...]
    density: tuple[Number, ...]
    nodes: tuple[tuple[Number, ...], ...]
    weights: tuple[tuple[Number, ...], ...]
    num_products: int
    dim: int
    exact: bool = False

    @staticmethod
    def of(found: SpectralDensity) -> DensityRecord:
        return DensityRecord(
            grid=_numbers(found.grid),
            density=_numbers(found.density),
            nodes=tuple(_numbers(run) for run in found.nodes),
            weights=tuple(_numbers(run) for run in found.weights),
            num_products=found.num_products,
            dim=found.dim,
            exact=found.exact,
        )

    def spectral_density(self) -> SpectralDensity:
        return SpectralDensity(
            nodes=_tensor(self.nodes),
            weights=_tensor(self.weights),
            grid=_tensor(self.grid),
            density=_tensor(self.density),
            num_products=self.num_products,
            dim=self.dim,
            exact=self.exact,
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
    highest: EndRecord | None = None
    lowest: EndRecord | None = None
    gradient_noise: float | None = None
    gradient_chance: float | None = None


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
    lambda_max_over_items: float | None = None
    lambda_min_over_items: float | None = None
    effective_rank_stderr: float | None = None
    gradient_noise: float | None = None


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
