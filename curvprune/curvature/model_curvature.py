"""The curvature of the whole model: extreme eigenvalues and spectral density over all its
parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvprune.curvature.estimates import EigenPairs, Estimate
from curvprune.curvature.estimators import density, eigenpairs
from curvprune.curvature.lanczos import Lanczos
from curvprune.curvature.layer_hessian import EIGEN_TOL
from curvprune.curvature.products import loss_and_gradient
from curvprune.curvature.records import (
    DensityRecord,
    EigenvaluesRecord,
    EstimateRecord,
    ModelCurvatureRecord,
)
from curvprune.curvature.request import AnalysisRequest
from curvprune.curvature.spectral_density import SpectralDensity

# Lanczos: the fewest vectors worth starting with; runs and steps of the density.
LEAST_VECTORS, RUNS, STEPS = 8, 5, 40
# Streams of random numbers.
EIGENVALUES, DENSITY = 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCurvature:
    """The whole model: all its parameters, biases and norms included."""

    parameters: int
    loss: float
    gradient_norm: float
    trace: Estimate | None
    eigenpairs: EigenPairs | None
    density: SpectralDensity | None

    def to_record(self) -> ModelCurvatureRecord:
        pairs, density = self.eigenpairs, self.density
        return ModelCurvatureRecord(
            parameters=self.parameters,
            loss=self.loss,
            gradient_norm=self.gradient_norm,
            trace=EstimateRecord.of(self.trace),
            eigenvalues=None if pairs is None else EigenvaluesRecord.of(pairs),
            density=None if density is None else DensityRecord.of(density),
        )


def whole_model(request: AnalysisRequest) -> ModelCurvature:
    """Loss, gradient and, where its vectors fit into ``vector_bytes``, the spectrum."""
    asked = request.asked
    # 1. Loss and gradient.
    operator = request.operator()
    start = loss_and_gradient(operator)

    # 2. How many Lanczos vectors fit.
    n = operator.space.dim
    vector = n * torch.finfo(operator.dtype).bits // 8
    room, least = asked.vector_bytes // vector, min(n, LEAST_VECTORS)
    pairs: EigenPairs | None = None
    spectrum: SpectralDensity | None = None

    def extremes() -> EigenPairs:
        max_basis = None if room >= asked.max_products else max(5, int(room))
        return eigenpairs(
            operator,
            1,
            which="BE" if n > 1 else "LM",
            tol=EIGEN_TOL,
            method=Lanczos(max_basis=max_basis),
            max_products=max(asked.max_products, 8),
            generator=request.generator(EIGENVALUES),
        )

    def distribution() -> SpectralDensity:
        steps = int(min(STEPS, room, n))
        return density(operator, runs=RUNS, steps=steps, generator=request.generator(DENSITY))

    # 3. Both ends of the spectrum, and its density.
    if least <= room:
        pairs = request.recall(
            "model-eigenvalues",
            EigenvaluesRecord,
            extremes,
            to_record=EigenvaluesRecord.of,
            from_record=EigenvaluesRecord.eigenpairs,
        )
        request.advance("spectrum", 1, 2)
        spectrum = request.recall(
            "model-density",
            DensityRecord,
            distribution,
            to_record=DensityRecord.of,
            from_record=DensityRecord.spectral_density,
        )
        request.advance("spectrum", 2, 2)
    else:
        request.notes.append(
            f"the whole model's spectrum was left out: Lanczos needs at least {least} vectors of "
            f"{vector / 1e9:.1f} GB, and vector_bytes is {asked.vector_bytes / 1e9:.1f} GB; "
            "per-layer results are not affected"
        )
    return ModelCurvature(
        parameters=n,
        loss=start.loss,
        gradient_norm=start.gradient_norm,
        trace=None if spectrum is None else spectrum.trace(n),
        eigenpairs=pairs,
        density=spectrum,
    )
