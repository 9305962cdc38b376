"""The curvature of the whole model: extreme eigenvalues, trace and spectral density over all its
parameters, each with what is wrong with it on these items and what it would be on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from curvprune.curvature.estimates import EigenPairs, End, Estimate
from curvprune.curvature.estimators import density, eigenpairs
from curvprune.curvature.lanczos import Lanczos
from curvprune.curvature.layer_hessian import EIGEN_TOL
from curvprune.curvature.operators import Operator
from curvprune.curvature.over_items import GradientNoise, Parts
from curvprune.curvature.products import MatrixFree, loss_and_gradient
from curvprune.curvature.records import (
    DensityRecord,
    EigenvaluesRecord,
    EndRecord,
    EstimateRecord,
    ExtremesRecord,
    ModelCurvatureRecord,
)
from curvprune.curvature.request import AnalysisRequest
from curvprune.curvature.spectral_density import SpectralDensity, exact_density
from curvprune.curvature.working_precision import rounding

# Parameters up to which all eigenvalues are computed, at one product each.
EXACT = 1024
# Lanczos: the fewest vectors worth starting with; products of the density, and steps of a run. The
# spread of starts is small where parameters are many, so few long runs serve best.
LEAST_VECTORS, PRODUCTS, STEPS = 8, 200, 100
# Streams of random numbers.
EIGENVALUES, DENSITY, TRACE = 2, 3, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Extremes:
    """Both ends of a spectrum, and what other items say of each."""

    pairs: EigenPairs
    highest: End | None = None
    lowest: End | None = None

    def to_record(self) -> ExtremesRecord:
        return ExtremesRecord(
            eigenvalues=EigenvaluesRecord.of(self.pairs),
            highest=EndRecord.of(self.highest),
            lowest=EndRecord.of(self.lowest),
        )

    @staticmethod
    def from_record(record: ExtremesRecord) -> Extremes:
        return Extremes(
            pairs=record.eigenvalues.eigenpairs(),
            highest=None if record.highest is None else record.highest.end(),
            lowest=None if record.lowest is None else record.lowest.end(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCurvature:
    """The whole model: all its parameters, biases and norms included.

    Attributes:
        trace: its error over probes on these items, and over items; ``converged`` is about the
            first.
        highest, lowest: what other items say of the two extreme eigenvalues.
        gradient_noise: what the items' spread alone would make of the gradient.
    """

    parameters: int
    loss: float
    gradient_norm: float
    trace: Estimate | None
    eigenpairs: EigenPairs | None
    density: SpectralDensity | None
    highest: End | None = None
    lowest: End | None = None
    gradient_noise: GradientNoise | None = None

    def to_record(self) -> ModelCurvatureRecord:
        pairs, density, noise = self.eigenpairs, self.density, self.gradient_noise
        return ModelCurvatureRecord(
            parameters=self.parameters,
            loss=self.loss,
            gradient_norm=self.gradient_norm,
            trace=EstimateRecord.of(self.trace),
            eigenvalues=None if pairs is None else EigenvaluesRecord.of(pairs),
            density=None if density is None else DensityRecord.of(density),
            highest=EndRecord.of(self.highest),
            lowest=EndRecord.of(self.lowest),
            gradient_noise=None if noise is None else noise.size,
            gradient_chance=None if noise is None else noise.chance,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """What may be spent on a spectrum.

    Attributes:
        room: vectors of the operator's length that fit into memory.
        max_products: for one eigenvalue problem, and for the trace.
        rtol: relative standard error asked of the trace.
        generator: the random numbers of a stream.
    """

    room: int
    max_products: int
    rtol: float
    generator: Callable[[int], torch.Generator]


class Spectrum:
    """Ends, trace and density of one operator, exact where it is small.

    Attributes:
        along: forms of every part along both extreme eigenvectors, once `extremes` has run.
        probed: forms along the probes of the trace, once `trace` has run.
    """

    along: Tensor | None = None
    probed: Tensor | None = None

    def __init__(self, op: MatrixFree, parts: Parts, effort: Effort) -> None:
        self.op, self.parts, self.effort = op, parts, effort
        self.notes: list[str] = []
        self._all: tuple[np.ndarray, Tensor] | None = None
        self._matrix: Tensor | None = None

    @property
    def exact(self) -> bool:
        n = self.op.space.dim
        return n <= EXACT and n <= self.effort.room

    def extremes(self) -> Extremes:
        """The largest and the smallest eigenvalue, with errors over items."""
        n, parts = self.op.space.dim, self.parts
        if self.exact:
            values, vectors = self._eigenpairs()
            places = [n - 1, 0] if n > 1 else [0]
            pairs = self._exact_pairs(values[places], vectors[:, places])
        else:
            pairs = self._lanczos(self.op, EIGENVALUES)
        # Other batches draw other labels.
        if n < 2 or not parts.enough or self.op.stochastic:
            return Extremes(pairs=pairs)

        # Along the eigenvectors of all items, and along those of each half.
        found = [pairs.vectors]
        for half in parts.halves:
            found.append(self._lanczos(parts.build(half), EIGENVALUES).vectors)
        self.along, first, second = parts.forms(torch.cat(found, 1)).split(2, 1)
        total = self.along.sum(0) / parts.count.sum()
        apart = (total - pairs.values.double().cpu()).abs().max()
        if float(apart) > 1e-2 * float(pairs.values.abs().max()):
            self.notes.append(
                "no errors over items of the whole model's spectrum: the loss of a batch is not "
                "the mean of its items' losses"
            )
            return Extremes(pairs=pairs)
        ends = []
        for column in (0, 1):
            ends.append(parts.end(self.along[:, column], (first[:, column], second[:, column])))
        return Extremes(pairs=pairs, highest=ends[0], lowest=ends[1])

    def trace(self) -> Estimate:
        """The trace, exact or by probes, with its errors over probes and over items."""
        generator = self.effort.generator(TRACE)
        # Where the trace is known, probes are for the spread of items only.
        most = 8 if self.exact else max(self.effort.max_products, 8)
        self.probed = self.parts.probe(self.effort.rtol, most, generator)
        found = self.parts.trace(self.probed, self.effort.rtol)
        if not self.exact:
            return found
        values, _ = self._eigenpairs()
        return Estimate(value=float(values.sum()), stderr=0.0, over_items=found.over_items)

    def density(self) -> SpectralDensity:
        """The distribution of the eigenvalues."""
        n = self.op.space.dim
        if self.exact:
            values, _ = self._eigenpairs()
            return exact_density(values, n)
        steps = min(STEPS, self.effort.room, n)
        generator = self.effort.generator(DENSITY)
        return density(self.op, runs=PRODUCTS // steps, steps=steps, generator=generator)

    def _lanczos(self, op: Operator, stream: int) -> EigenPairs:
        most, room = max(self.effort.max_products, 8), self.effort.room
        return eigenpairs(
            op,
            1,
            which="BE" if op.space.dim > 1 else "LM",
            tol=EIGEN_TOL,
            method=Lanczos(max_basis=None if room >= most else max(5, room)),
            max_products=most,
            generator=self.effort.generator(stream),
        )

    def matrix(self) -> Tensor:
        """The matrix itself, in float64; only of a small operator."""
        if self._matrix is None:
            matrix = self.op.to_dense().to(device="cpu", dtype=torch.float64)
            self._matrix = (matrix + matrix.mT) / 2
        return self._matrix

    def _eigenpairs(self) -> tuple[np.ndarray, Tensor]:
        """All of them, in float64."""
        if self._all is None:
            values, vectors = torch.linalg.eigh(self.matrix())
            self._all = values.numpy(), vectors
        return self._all

    def _exact_pairs(self, values: np.ndarray, vectors: Tensor) -> EigenPairs:
        op = self.op
        found = torch.from_numpy(values).to(device=op.device, dtype=op.dtype)
        # What is left is the rounding of the products.
        error = torch.full_like(found, rounding(op) * float(found.abs().max()))
        return EigenPairs(
            values=found,
            vectors=vectors.to(device=op.device, dtype=op.dtype),
            residuals=error,
            errors=error,
            num_products=op.space.dim,
            converged=True,
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
    room, least = int(asked.vector_bytes // vector), min(n, LEAST_VECTORS)
    parts = Parts.of(request.batches, request.operator_of)
    noise = parts.gradients(keep=least <= room)
    found = ModelCurvature(
        parameters=n,
        loss=start.loss,
        gradient_norm=start.gradient_norm,
        trace=None,
        eigenpairs=None,
        density=None,
        gradient_noise=noise,
    )
    if least > room:
        request.notes.append(
            f"the whole model's spectrum was left out: Lanczos needs at least {least} vectors of "
            f"{vector / 1e9:.1f} GB, and vector_bytes is {asked.vector_bytes / 1e9:.1f} GB; "
            "per-layer results are not affected"
        )
        return found

    # 3. Both ends of the spectrum, its trace and its density.
    effort = Effort(
        room=room, max_products=asked.max_products, rtol=asked.rtol, generator=request.generator
    )
    spectrum = Spectrum(operator, parts, effort)
    ends, trace, density = _recalled(request, spectrum)
    request.notes += spectrum.notes
    if not trace.converged:
        request.notes.append(
            f"the whole model's trace has a standard error of {trace.stderr:.2g} where rtol asks "
            f"for {asked.rtol * abs(trace.value):.2g}; raise max_products"
        )
    return replace(
        found,
        trace=trace,
        eigenpairs=_checked(ends.pairs, density),
        density=density,
        highest=ends.highest,
        lowest=ends.lowest,
    )


def _recalled(
    request: AnalysisRequest, spectrum: Spectrum
) -> tuple[Extremes, Estimate, SpectralDensity]:
    """The parts of a spectrum, computed or found where an interrupted analysis left them."""
    ends = request.recall(
        "model-eigenvalues",
        ExtremesRecord,
        spectrum.extremes,
        to_record=Extremes.to_record,
        from_record=Extremes.from_record,
    )
    request.advance("spectrum", 1, 3)
    trace = request.recall(
        "model-trace",
        EstimateRecord,
        spectrum.trace,
        to_record=EstimateRecord.made,
        from_record=EstimateRecord.estimate,
    )
    request.advance("spectrum", 2, 3)
    density = request.recall(
        "model-density",
        DensityRecord,
        spectrum.density,
        to_record=DensityRecord.of,
        from_record=DensityRecord.spectral_density,
    )
    request.advance("spectrum", 3, 3)
    return ends, trace, density


def _checked(pairs: EigenPairs, density: SpectralDensity) -> EigenPairs:
    """The ends with errors that reach to whatever the density's runs found beyond them: their
    nodes lie inside the spectrum, so a search that stopped short of one missed something."""
    high, low = float(density.nodes.max()), float(density.nodes.min())
    errors = pairs.errors.clone()
    for i, value in enumerate(pairs.values.tolist()):
        beyond = high - value if i == 0 else value - low
        errors[i] = max(float(errors[i]), beyond)
    met = bool((errors <= EIGEN_TOL * pairs.values.abs()).all())
    missed = bool((errors > pairs.errors).any()) and not met
    return replace(pairs, errors=errors, converged=pairs.converged and not missed)
