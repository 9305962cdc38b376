"""What the spectrum of the whole model says: sharpness, learning rate, minimum or saddle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from curvprune.curvature.estimates import End, Estimate
from curvprune.curvature.layer_curvature import LayerCurvature
from curvprune.curvature.model_curvature import ModelCurvature
from curvprune.curvature.records import DiagnosisRecord, Disagreement, EstimateRecord

NEAR_ZERO = 1e-3  # of the largest eigenvalue in magnitude
SIGMAS = 2  # standard errors that a difference must exceed
DISAGREE = 0.2  # of the Gauss–Newton trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What the spectrum of the whole model says.

    Attributes:
        lambda_max, lambda_min: extreme eigenvalues (sharpness is ``lambda_max``).
        lambda_max_over_items, lambda_min_over_items: their standard errors over items.
        max_learning_rate: ``2/λmax``, above which plain gradient descent diverges along the top
            direction; None if λmax ≤ 0.
        negative_share, near_zero_share: shares of the eigenvalues below ``−near_zero_below`` and
            within it, on these items.
        near_zero_below: ``10⁻³ · max|λ|``.
        effective_rank: ``(Σ|λ|)² / Σλ²``, with its standard error.
        gradient_noise: length that the gradient would have by the items' noise alone.
        relative_gradient: ``‖∇L‖ / max|λ|``, the length of a Newton step along the top direction if
            the gradient lay there.
        kind: what the items can tell, at two standard errors.

            - ``"not stationary"``: the gradient is not zero (5 %), so it is none of the others;
            - ``"saddle"``: some direction curves down, also on items that it was not chosen on, and
              some curves up;
            - ``"minimum"``: every direction curves up, or is level to rounding;
            - ``"maximum"``: no direction curves up, and some curve down;
            - ``"flat"``: the lowest eigenvalue cannot be told from zero, so a minimum and a saddle
              are both possible;
            - ``None``: there are too few items, or the matrix has no negative curvature to see.
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
    lambda_max_over_items: float | None = None
    lambda_min_over_items: float | None = None
    effective_rank_stderr: float | None = None
    gradient_noise: float | None = None

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
            lambda_max_over_items=self.lambda_max_over_items,
            lambda_min_over_items=self.lambda_min_over_items,
            effective_rank_stderr=self.effective_rank_stderr,
            gradient_noise=self.gradient_noise,
        )


def diagnose(matrix: str, whole: ModelCurvature, layers: Mapping[str, LayerCurvature]) -> Diagnosis:
    """Turn the whole model's spectrum and the layers' traces into what people want to know from
    them.

    Args:
        matrix: its name in words.
    """
    # 1. Both ends of the spectrum, the gradient, and what kind of point they make.
    ends = _ends(whole)
    kind, said = _kind(matrix, whole, ends)
    # 2. Its density.
    shares = _shares(whole, ends)
    # 3. Layers where the Gauss–Newton matrix is another one.
    disagreements = _disagreements(layers)
    text = [*ends.text, *said, *shares.text]
    if disagreements:
        text.append(
            f"In {len(disagreements)} of {len(layers)} layers the {matrix} and Gauss–Newton "
            "traces differ by more than 20 % and twice their error: there the second is no "
            "stand-in for the first."
        )
    noise, size = whole.gradient_noise, max(abs(ends.high or 0.0), abs(ends.low or 0.0))
    return Diagnosis(
        lambda_max=ends.high,
        lambda_min=ends.low,
        lambda_max_over_items=None if whole.highest is None else whole.highest.over_items,
        lambda_min_over_items=None if whole.lowest is None else whole.lowest.over_items,
        max_learning_rate=ends.rate,
        negative_share=shares.negative,
        near_zero_share=shares.zero,
        near_zero_below=shares.below,
        effective_rank=None if shares.rank is None else shares.rank.value,
        effective_rank_stderr=None if shares.rank is None else shares.rank.stderr,
        gradient_norm=whole.gradient_norm,
        gradient_noise=None if noise is None else noise.size,
        relative_gradient=whole.gradient_norm / size if size else None,
        kind=kind,
        text=tuple(text),
        disagreements=disagreements,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ends:
    """What the extreme eigenvalues say; ``level`` is the error below which the lowest is zero."""

    high: float | None = None
    low: float | None = None
    level: float = 0.0
    rate: float | None = None
    text: tuple[str, ...] = ()


def _ends(whole: ModelCurvature) -> _Ends:
    if whole.eigenpairs is None:
        return _Ends()
    values = [float(x) for x in whole.eigenpairs.values]
    high, low = max(values), min(values)
    text = []
    rate = None
    if high > 0:
        rate = 2 / high
        text.append(
            f"The sharpest direction has curvature {high:.4g}{_over(whole.highest)}: plain "
            f"gradient descent is stable up to a learning rate of 2/λmax = {rate:.3g}."
        )
    lowest = f"The lowest eigenvalue is {low:.4g}{_over(whole.lowest)}"
    if whole.lowest is not None and low < 0:
        held_out = f"{whole.lowest.held_out:.3g} ± {whole.lowest.held_out_error:.2g}"
        lowest += f"; on items that its direction was not chosen on, the curvature is {held_out}"
    text.append(f"{lowest}.")
    if not whole.eigenpairs.converged:
        text.append(
            "The search for them has not converged: the spectrum may reach further at both ends. "
            "Raise max_products."
        )
    level = SIGMAS * float(whole.eigenpairs.errors[int(whole.eigenpairs.values.argmin())])
    return _Ends(high=high, low=low, level=level, rate=rate, text=tuple(text))


def _over(end: End | None) -> str:
    return "" if end is None else f" ± {end.over_items:.2g} over items"


def _kind(matrix: str, whole: ModelCurvature, ends: _Ends) -> tuple[str | None, list[str]]:
    """The kind of point, and what can and what cannot be told."""
    # 1. Where nothing can be told.
    noise, low, high = whole.gradient_noise, whole.lowest, whole.highest
    if ends.low is None or ends.high is None:
        return None, []
    if matrix != "Hessian":
        return None, [
            f"The {matrix} matrix has no negative curvature, so it cannot tell a minimum from a "
            "saddle: matrix='hessian' can."
        ]
    if noise is None or noise.significant is None or low is None or high is None:
        return None, [
            f"The gradient norm is {whole.gradient_norm:.3g}. There are too few items to tell a "
            "minimum from a saddle."
        ]

    # 2. A point with a gradient is neither.
    gradient = f"The gradient norm is {whole.gradient_norm:.3g}"
    if noise.significant:
        return "not stationary", [
            f"{gradient}, above what the items' noise makes of none ({noise.size:.2g}): the loss "
            "still falls to first order, and the point is neither a minimum nor a saddle."
        ]
    gradient += f", which the items' noise makes of none as well ({noise.size:.2g})"

    # 3. Down means down on items that the direction was not chosen on.
    down = low.held_out + SIGMAS * low.held_out_error < -ends.level
    up = high.held_out - SIGMAS * high.held_out_error > ends.level
    if down and up:
        return "saddle", [f"{gradient}; some directions curve up and some down: a saddle."]
    if down and ends.high <= ends.level:
        return "maximum", [f"{gradient}; no direction curves up: a maximum."]
    if up and ends.low - SIGMAS * low.over_items >= -ends.level:
        return "minimum", [f"{gradient}; no direction curves down: a minimum."]
    return "flat", [
        f"{gradient}; the lowest curvature cannot be told from zero: a minimum and a saddle are "
        "both possible."
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shares:
    """What the density says."""

    negative: Estimate | None = None
    zero: Estimate | None = None
    below: float | None = None
    rank: Estimate | None = None
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
    rank = density.effective_rank(whole.parameters)
    text = (
        f"{_percent(zero)} of the eigenvalues are within {below:.2g} of zero and "
        f"{_percent(negative)} below that; the curvature is carried by about {rank.value:.0f} of "
        f"{whole.parameters} directions."
    )
    return _Shares(negative=negative, zero=zero, below=below, rank=rank, text=(text,))


def _percent(share: Estimate) -> str:
    if share.stderr == 0:
        return f"{share.value:.1%}"
    return f"{100 * share.value:.1f} ± {100 * share.stderr:.1f} %"


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
