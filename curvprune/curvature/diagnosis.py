"""What the spectrum of the whole model says: sharpness, learning rate, minimum or saddle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from curvprune.curvature.estimates import Estimate
from curvprune.curvature.layer_curvature import LayerCurvature
from curvprune.curvature.model_curvature import ModelCurvature
from curvprune.curvature.records import DiagnosisRecord, Disagreement, EstimateRecord

NEAR_ZERO = 1e-3  # of the largest eigenvalue in magnitude
STATIONARY = 0.05  # a Newton step of at most this share of the parameters' norm
DISAGREE = 0.2  # of the Gauss–Newton trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What the spectrum of the whole model says.

    Attributes:
        lambda_max, lambda_min: extreme eigenvalues (sharpness is ``lambda_max``).
        max_learning_rate: ``2/λmax``, above which plain gradient descent diverges along the top
            direction; None if λmax ≤ 0.
        negative_share, near_zero_share: shares of the eigenvalues below ``−near_zero_below`` and
            within it.
        near_zero_below: ``10⁻³ · max|λ|``.
        effective_rank: ``(Σ|λ|)² / Σλ²``.
        relative_gradient: ``‖∇L‖ / |λmax|``, the length of a Newton step along the top direction if
            the gradient lay there: a point is called stationary if it is below 0.05 times the
            parameters' norm.
        kind: ``"minimum"``, ``"saddle"`` or ``"not stationary"``.
        text: the same in sentences.
        disagreements: layers whose Hessian and Gauss–Newton traces differ by more than their errors
            and 20 %.
    """

    lambda_max: float | None
    lambda_min: float | None
    max_learning_rate: float | None
    negative_share: Estimate | None
    near_zero_share: Estimate | None
    near_zero_below: float | None
    effective_rank: float | None
    gradient_norm: float
    relative_gradient: float | None
    kind: str | None
    text: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]

    def to_record(self) -> DiagnosisRecord:
        return DiagnosisRecord(
            lambda_max=self.lambda_max,
            lambda_min=self.lambda_min,
            sharpness=self.lambda_max,
            max_learning_rate=self.max_learning_rate,
            negative_share=EstimateRecord.of(self.negative_share),
            near_zero_share=EstimateRecord.of(self.near_zero_share),
            near_zero_below=self.near_zero_below,
            effective_rank=self.effective_rank,
            gradient_norm=self.gradient_norm,
            relative_gradient=self.relative_gradient,
            kind=self.kind,
            text=self.text,
            disagreements=self.disagreements,
        )


def diagnose(
    matrix: str, whole: ModelCurvature, layers: Mapping[str, LayerCurvature], parameter_norm: float
) -> Diagnosis:
    """Turn the whole model's spectrum and the layers' traces into what people want to know from
    them.

    Args:
        matrix: its name in words.
        parameter_norm: 2-norm of all parameters.
    """
    # 1. Both ends of the spectrum.
    ends = _Ends()
    if whole.eigenpairs is not None:
        values = [float(x) for x in whole.eigenpairs.values]
        ends = _ends(max(values), min(values), whole.gradient_norm, parameter_norm)
    # 2. Its density.
    shares = _shares(whole, ends)
    # 3. Layers where the Gauss–Newton matrix is another one.
    disagreements = _disagreements(layers)
    text = [*ends.text, *shares.text]
    if disagreements:
        text.append(
            f"In {len(disagreements)} of {len(layers)} layers the {matrix} and Gauss–Newton "
            "traces differ by more than 20 % and twice their error: there the second is no "
            "stand-in for the first."
        )
    return Diagnosis(
        lambda_max=ends.high,
        lambda_min=ends.low,
        max_learning_rate=ends.rate,
        negative_share=shares.negative,
        near_zero_share=shares.zero,
        near_zero_below=shares.below,
        effective_rank=shares.rank,
        gradient_norm=whole.gradient_norm,
        relative_gradient=ends.relative_gradient,
        kind=ends.kind,
        text=tuple(text),
        disagreements=disagreements,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ends:
    """What the extreme eigenvalues say."""

    high: float | None = None
    low: float | None = None
    rate: float | None = None
    relative_gradient: float | None = None
    kind: str | None = None
    text: tuple[str, ...] = ()


def _ends(high: float, low: float, gradient_norm: float, parameter_norm: float) -> _Ends:
    # 1. Sharpness: gradient descent diverges along the top direction above 2/λmax.
    text = []
    rate = relative = kind = None
    size = max(abs(high), abs(low))
    if high > 0:
        rate = 2 / high
        text.append(
            f"The sharpest direction has curvature {high:.4g}: plain gradient descent is "
            f"stable up to a learning rate of 2/λmax = {rate:.3g}."
        )
    # 2. How far a Newton step would lead, and whether some direction curves down.
    if size > 0:
        relative = gradient_norm / size
        stationary = relative <= STATIONARY * parameter_norm
        if not stationary:
            kind = "not stationary"
        elif low < -NEAR_ZERO * size:
            kind = "saddle"
        else:
            kind = "minimum"
        if low < 0:
            text.append(
                f"The lowest eigenvalue is {low:.4g}, {abs(low) / size:.1%} of the largest "
                f"in magnitude; the gradient norm is {gradient_norm:.3g}."
            )
    return _Ends(
        high=high, low=low, rate=rate, relative_gradient=relative, kind=kind, text=tuple(text)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shares:
    """What the density says."""

    negative: Estimate | None = None
    zero: Estimate | None = None
    below: float | None = None
    rank: float | None = None
    text: tuple[str, ...] = ()


def _shares(whole: ModelCurvature, ends: _Ends) -> _Shares:
    density = whole.density
    if density is None:
        return _Shares()
    # Lanczos finds the ends better than the density's few runs do.
    size = float(density.nodes.abs().max())
    size = max(size, abs(ends.high or 0.0), abs(ends.low or 0.0))
    # The bound itself counts as near zero, not as negative.
    below = NEAR_ZERO * size
    zero = density.mass(-below, below)
    negative = density.mass(-math.inf, math.nextafter(-below, -math.inf))
    rank = density.effective_rank(whole.parameters).value
    text = (
        f"{zero.value:.1%} of the eigenvalues are within {below:.2g} of zero and "
        f"{negative.value:.2%} below that; the curvature is carried by about {rank:.0f} of "
        f"{whole.parameters} directions."
    )
    return _Shares(negative=negative, zero=zero, below=below, rank=rank, text=(text,))


def _disagreements(layers: Mapping[str, LayerCurvature]) -> tuple[Disagreement, ...]:
    found = []
    for name, layer in layers.items():
        ours, theirs = layer.trace, layer.gauss_newton_trace
        if ours is None or theirs is None:
            continue
        gap = abs(ours.value - theirs.value)
        error = math.hypot(ours.stderr, theirs.stderr)
        if gap > 2 * error and gap > DISAGREE * abs(theirs.value):
            ratio = ours.value / theirs.value if theirs.value else None
            found.append(
                Disagreement(layer=name, hessian=ours.value, gauss_newton=theirs.value, ratio=ratio)
            )
    return tuple(found)
