"""Estimates with their errors: what an estimator returns, and when an error bar is believed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from scipy.special import chdtri
from torch import Tensor

from curvprune.curvature.working_precision import check_finite

ENOUGH = 8  # samples before an error bar is believed


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: in the operator's measure.
        stderr: standard error; 0 for an exact value.
        num_items: independent (or leave-one-out) samples behind the standard error; 0 for an exact
            value.
        num_products: operator–vector products spent.
        converged: whether the accuracy asked for was met, with enough samples to believe it.
        over_items: standard error over items, about the population that these come from; ``None``
            where it was not estimated. ``stderr`` is then about these items alone.
    """

    value: float
    stderr: float
    num_items: int = 0
    num_products: int = 0
    converged: bool = True
    over_items: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagonalEstimate:
    """The diagonal with a standard error for each entry, ``(n,)`` each; see :class:`Estimate`."""

    values: Float[Tensor, " n"]
    stderr: Float[Tensor, " n"]
    num_products: int
    converged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EigenPairs:
    """Extreme eigenpairs.

    Attributes:
        values: eigenvalues, the wanted end first (``BE``: k largest, descending, then k smallest,
            ascending).
        vectors: orthonormal columns.
        residuals: ``‖A v − λ v‖``; an eigenvalue lies within it.
        errors: estimated error of each value: the smaller of the residual and ``residual² / gap``
            (Kato–Temple).
        num_products: operator–vector products spent.
        converged: every error is within ``tol · |λ|`` or at rounding level.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float[Tensor, " k"]
    errors: Float[Tensor, " k"]
    num_products: int
    converged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """One end of a spectrum and what other items say of it.

    Attributes:
        over_items: standard error over items of the eigenvalue. It counts the spread of the items'
            own curvature along the eigenvector, and what an extreme eigenvalue owes to its fit.
        held_out: curvature of one half of the items along the eigenvector of the other, both ways.
            It has no bias of fitting: in the mean it lies inside the population's spectrum.
        held_out_error: its standard error over items.
    """

    over_items: float
    held_out: float
    held_out_error: float


def mean_and_stderr(samples: Tensor) -> tuple[float, float]:
    """Mean and standard error, in float64. The standard error of a single sample is infinite."""
    samples = samples.double().cpu()
    # Relative to the first sample, equal samples give an error of exactly zero.
    centred = samples - samples[0]
    value = float(samples[0] + centred.mean())
    if len(samples) < 2:
        return value, math.inf
    return value, float((centred.var() / len(samples)).sqrt())


def believable(stderr: float, count: int) -> float:
    """90 % upper confidence bound of a standard error from ``count`` samples; infinite for fewer
    than 8."""
    if count < ENOUGH:
        return math.inf
    # (count − 1) · s² / σ² has a χ² distribution of count − 1 degrees of freedom.
    return stderr * math.sqrt((count - 1) / float(chdtri(count - 1, 0.9)))


def accurate(stderr: float, size: float, count: int, rtol: float) -> bool:
    """Whether ``count`` samples show that the standard error is within ``rtol · |size|``.

    Raises:
        FloatingPointError: ``size`` is not finite.
    """
    check_finite(math.isfinite(size))
    return count >= ENOUGH and believable(stderr, count) <= rtol * abs(size)


def samples_to_add(stderr: float, size: float, count: int, rtol: float) -> int:
    """Samples that are missing if the standard error falls with the square root of their number;
    at least half of ``count`` and at most ``count``."""
    if count < ENOUGH:
        return ENOUGH - count
    # No relative accuracy of a value of zero is ever reached: as many as a round may have.
    ratio = believable(stderr, count) / (rtol * abs(size)) if size else math.inf
    wanted = count * min(ratio, 1e6) ** 2 - count
    return math.ceil(min(max(wanted, count / 2), count))
