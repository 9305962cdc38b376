"""Two models' curvature on the same items: what is and what is not distinguishable.

Both are asked about the same items, so their errors over items are mostly shared: the error of a
difference is taken from the items' own differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn

from curvprune.curvature.capture import items_in
from curvprune.curvature.diagnosis import NEAR_ZERO, SIGMAS
from curvprune.curvature.estimates import End, Estimate, mean_and_stderr
from curvprune.curvature.estimators import density
from curvprune.curvature.model_curvature import (
    DENSITY,
    LEAST_VECTORS,
    STEPS,
    Effort,
    Spectrum,
)
from curvprune.curvature.over_items import Build, Parts
from curvprune.curvature.plots import plot_densities
from curvprune.curvature.products import gauss_newton, hessian, loss_and_gradient
from curvprune.curvature.records import DensityRecord, EstimateRecord
from curvprune.curvature.request import MATRICES
from curvprune.curvature.sampled_fisher import ratio_estimate
from curvprune.curvature.spectral_density import SpectralDensity, exact_density
from curvprune.model import Batch, Loss
from curvprune.schema import Json, encode

FOLDS = 5  # of the items, each left out once, for the errors of shares over items
MEMORY = 4 << 30  # bytes of Lanczos vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One quantity of both models.

    Attributes:
        difference: b − a. Its ``stderr`` is about these items, its ``over_items`` about the
            population, paired over the items.
        distinguishable: it exceeds two standard errors, of both kinds together; ``None`` where its
            error over items is not known.
    """

    name: str
    a: EstimateRecord
    b: EstimateRecord
    difference: EstimateRecord
    distinguishable: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureComparison:
    """Two models' curvature on the same items; see `curvprune.compare_curvature`.

    Attributes:
        parameters: of a and of b; shares are of as many directions.
        threshold: the bound of what counts as near zero, the same for both: ``10⁻³ · max|λ|``.
        quantities: ``lambda_max``, ``lambda_min``, ``trace``, and the shares ``below``, ``within``
            and ``above`` the threshold.
        text: what is and what is not distinguishable.
    """

    matrix: str
    measure: str
    num_items: int
    parameters: tuple[int, int]
    threshold: float
    quantities: tuple[Compared, ...]
    densities: tuple[DensityRecord, DensityRecord]
    text: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Compared:
        """A quantity by its name. Raises ``KeyError`` that lists the names there are."""
        for found in self.quantities:
            if found.name == name:
                return found
        raise KeyError(f"{name!r}: expected one of {[q.name for q in self.quantities]}")

    def to_dict(self) -> dict[str, Json]:
        """The record as JSON."""
        values: dict[str, Json] = encode(self)
        return values

    def plot(self, names: tuple[str, str] = ("a", "b")) -> Any:
        """Both densities on one axis, linear within the threshold and logarithmic beyond, as a
        matplotlib figure. Raises ``ValueError`` without matplotlib."""
        found = dict(zip(names, self.densities, strict=True))
        label = f"eigenvalue of the {self.matrix} ({self.measure})"
        return plot_densities(found, knee=self.threshold, label=label)


@dataclass(kw_only=True)
class _Side:
    """One model: its spectrum, and how its shares change with the items."""

    spectrum: Spectrum
    build: Build
    high: float
    low: float
    errors: tuple[float, float]
    ends: tuple[End | None, End | None]
    trace: Estimate
    density: SpectralDensity

    @staticmethod
    def of(build: Build, batches: Sequence[Batch], effort: Effort) -> _Side:
        op = build(batches)
        room = int(MEMORY // (op.space.dim * torch.finfo(op.dtype).bits // 8))
        if room < min(op.space.dim, LEAST_VECTORS):
            raise ValueError(
                f"compare_curvature: {op.space.dim} parameters, of which {LEAST_VECTORS} vectors "
                f"do not fit into {MEMORY / 1e9:.0f} GB; compare fewer of them with "
                "curvprune.hessian(..., parameters=...) and curvprune.density"
            )
        parts = Parts.of(batches, build)
        parts.gradients(keep=False)
        spectrum = Spectrum(op, parts, replace(effort, room=room))
        extremes = spectrum.extremes()
        values, errors = extremes.pairs.values, extremes.pairs.errors
        return _Side(
            spectrum=spectrum,
            build=build,
            high=float(values[0]),
            low=float(values[-1]),
            errors=(float(errors[0]), float(errors[-1])),
            ends=(extremes.highest, extremes.lowest),
            trace=spectrum.trace(),
            density=spectrum.density(),
        )

    def without(self, fold: int) -> SpectralDensity:
        """The density without every fifth item, from the same start for each fold."""
        # 1. The fold's own matrix, and its share of the positions.
        part, whole = self.build(self.spectrum.parts.fold(fold, FOLDS)), self.spectrum.op
        positions = float(self.spectrum.parts.count.sum())
        share = loss_and_gradient(part).positions / positions
        # 2. (H − share · H_fold) / (1 − share).
        if self.spectrum.exact:
            left = self.spectrum.matrix() - share * part.to_dense().double().cpu()
            return exact_density(torch.linalg.eigvalsh(left / (1 - share)).numpy(), 0)
        rest = (whole - share * part) * (1 / (1 - share))
        effort = self.spectrum.effort
        steps = min(STEPS, effort.room, whole.space.dim)
        return density(rest, runs=1, steps=steps, generator=effort.generator(DENSITY))


def compare(
    models: tuple[nn.Module, nn.Module],
    losses: tuple[Loss, Loss],
    batches: Sequence[Batch],
    *,
    matrix: str,
    max_products: int,
    generator: Callable[[int], torch.Generator],
) -> CurvatureComparison:
    """See `curvprune.compare_curvature`."""
    make = hessian if matrix == "hessian" else gauss_newton
    # All probes that may be had: the same for both models.
    effort = Effort(room=0, max_products=max_products, rtol=1e-12, generator=generator)
    sides = []
    for model, loss in zip(models, losses, strict=True):
        build = partial(_built, make, model, loss)
        sides.append(_Side.of(build, batches, effort))
    a, b = sides
    # The ends, the trace, and the shares beyond a threshold that both have in common.
    found = [_end("lambda_max", a, b, 0), _end("lambda_min", a, b, 1), _trace(a, b)]
    size = max(abs(x) for side in sides for x in (side.high, side.low))
    threshold = NEAR_ZERO * size
    if threshold > 0:
        found += _shares(a, b, threshold)
    notes = []
    if a.spectrum.op.space.dim != b.spectrum.op.space.dim:
        notes.append("the models have different numbers of parameters: shares are of its own each")
    if a.spectrum.notes or b.spectrum.notes:
        notes += dict.fromkeys([*a.spectrum.notes, *b.spectrum.notes])
    return CurvatureComparison(
        matrix=MATRICES[matrix],
        measure=losses[0].measure,
        num_items=sum(items_in(batch) for batch in batches),
        parameters=(a.spectrum.op.space.dim, b.spectrum.op.space.dim),
        threshold=threshold,
        quantities=tuple(found),
        densities=(DensityRecord.of(a.density), DensityRecord.of(b.density)),
        text=tuple(_sentence(one, threshold) for one in found),
        notes=tuple(notes),
    )


def _built(make: Any, model: nn.Module, loss: Loss, batches: Sequence[Batch]) -> Any:
    return make(model, batches, loss)


def _compared(name: str, both: Sequence[Estimate], stderr: float, paired: float | None) -> Compared:
    a, b = both
    value = b.value - a.value
    apart = None if paired is None else abs(value) > SIGMAS * math.hypot(stderr, paired)
    difference = Estimate(value=value, stderr=stderr, over_items=paired)
    return Compared(
        name=name,
        a=EstimateRecord.made(a),
        b=EstimateRecord.made(b),
        difference=EstimateRecord.made(difference),
        distinguishable=apart,
    )


def _end(name: str, a: _Side, b: _Side, end: int) -> Compared:
    """λ_max (end 0) or λ_min (1)."""
    estimates, fits = [], []
    for side in (a, b):
        value, other = (side.high, side.low)[end], side.ends[end]
        fits.append(0.0 if other is None else (value - other.held_out) / 3)
        over_items = None if other is None else other.over_items
        estimates.append(Estimate(value=value, stderr=side.errors[end], over_items=over_items))
    paired = None
    ours, theirs = a.spectrum.along, b.spectrum.along
    if ours is not None and theirs is not None and None not in (a.ends[end], b.ends[end]):
        apart = theirs[:, end] - ours[:, end]
        spread = ratio_estimate(apart, a.spectrum.parts.count).stderr
        paired = math.hypot(spread, fits[1] - fits[0])
    return _compared(name, estimates, math.hypot(a.errors[end], b.errors[end]), paired)


def _trace(a: _Side, b: _Side) -> Compared:
    ours, theirs, parts = a.spectrum.probed, b.spectrum.probed, a.spectrum.parts
    assert ours is not None and theirs is not None
    probes = min(ours.shape[1], theirs.shape[1])
    apart = theirs[:, :probes] - ours[:, :probes]
    stderr = math.hypot(a.trace.stderr, b.trace.stderr)
    if stderr > 0 and a.spectrum.op.space.dim == b.spectrum.op.space.dim:
        # The same probes: what they do to both cancels.
        _, stderr = mean_and_stderr(apart.sum(0) / parts.count.sum())
    paired = parts.spread(apart) if parts.enough else None
    return _compared("trace", (a.trace, b.trace), stderr, paired)


def _shares(a: _Side, b: _Side, threshold: float) -> list[Compared]:
    ranges = {
        "below": (-math.inf, math.nextafter(-threshold, -math.inf)),
        "within": (-threshold, threshold),
        "above": (math.nextafter(threshold, math.inf), math.inf),
    }
    # 1. The shares without each fold of the items.
    paired_items = len(a.spectrum.parts.batches) >= FOLDS
    left_out: list[np.ndarray] = []
    for side in (a, b) if paired_items else ():
        folds = [side.without(fold) for fold in range(FOLDS)]
        rows = [[one.mass(*bounds).value for bounds in ranges.values()] for one in folds]
        left_out.append(np.array(rows))
    # 2. All items, with the jackknife's errors of each and of the difference.
    found = []
    for column, (name, bounds) in enumerate(ranges.items()):
        estimates = [side.density.mass(*bounds) for side in (a, b)]
        paired = None
        if left_out:
            first, second = (rows[:, column] for rows in left_out)
            estimates = [
                replace(estimate, over_items=_jackknife(values))
                for estimate, values in zip(estimates, (first, second), strict=True)
            ]
            paired = _jackknife(second - first)
        stderr = math.hypot(*(estimate.stderr for estimate in estimates))
        found.append(_compared(name, estimates, stderr, paired))
    return found


def _jackknife(values: np.ndarray) -> float:
    """Standard error from the values without each fold. It counts two of itself as Student's
    95 %, which for few folds is more."""
    folds = len(values)
    spread = (folds - 1) / folds * float(((values - values.mean()) ** 2).sum())
    return math.sqrt(spread) * float(stdtrit(folds - 1, 0.975)) / SIGMAS


_NAMES = {
    "lambda_max": "The largest eigenvalue",
    "lambda_min": "The smallest eigenvalue",
    "trace": "The trace",
    "below": "The share of eigenvalues below −{0:.2g}",
    "within": "The share of eigenvalues within {0:.2g} of zero",
    "above": "The share of eigenvalues above {0:.2g}",
}


def _sentence(found: Compared, threshold: float) -> str:
    """What a difference is, and whether it is more than its errors."""
    difference = found.difference
    name = _NAMES[found.name].format(threshold)
    values = f"{name} is {found.a.value:.4g} of a and {found.b.value:.4g} of b"
    if difference.over_items is None:
        return f"{values}; there are too few items to tell whether others would agree."
    error = math.hypot(difference.stderr, difference.over_items)
    change = f"b − a = {difference.value:.3g} ± {error:.2g}"
    if found.distinguishable:
        side = "higher" if difference.value > 0 else "lower"
        return f"{values}: {side} by more than two errors ({change}, paired over the items)."
    return f"{values}: not distinguishable ({change}, paired over the items)."
