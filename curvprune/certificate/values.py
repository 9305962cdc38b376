"""Is the fall of a mean score within the budget? Paired tests of any score per item, with or
without bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from curvprune.certificate.accuracy import certify_accuracy
from curvprune.certificate.arguments import (
    check_bounds,
    check_limits,
    check_same_length,
    column,
    numbered_clusters,
)
from curvprune.certificate.clusters import Evidence, evidence_of, growth, planned_drop
from curvprune.certificate.gaffke import gaffke_upper
from curvprune.certificate.loss import certify_loss
from curvprune.certificate.repeated import same_results
from curvprune.certificate.unseen import fewest_clusters, too_few_text
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, POWER, VIOLATED, Verdict
from curvprune.model import joined

_BOUNDED = "paired, Gaffke's bound"
_BOUNDED_CLUSTERED = (
    "paired, jackknife t bound over clusters and Gaffke's bound at the effective number of items"
)


def certify_values(
    baseline: ArrayLike,
    compressed: ArrayLike,
    *,
    max_drop: float,
    bounds: tuple[float, float] | None = None,
    higher_is_better: bool = True,
    clusters: ArrayLike | None = None,
    copies: ArrayLike | None = None,
    confidence: float = 0.95,
    metric: str = "value",
    unit: str = "",
) -> Verdict:
    """Is the mean of any score per item at most ``max_drop`` worse?

    Without bounds: the test of `certify_loss`, every item counting once. With bounds (0, 1) and
    nothing but 0 and 1: `certify_accuracy`.

    With bounds otherwise: Gaffke's bound (2005), the ``confidence`` quantile of sum_i D_i x_i over
    the paired differences x_i and one more at the largest possible value, D uniform on the simplex.
    It needs no other assumption than independent items and cannot miss rare large losses. For 0/1
    differences it is that of Clopper and Pearson. That its level holds at any N is proven for two
    values and conjectured otherwise, without a counterexample known (Learned-Miller and Thomas
    2019, arXiv:1905.06208). The quantile comes from a saddlepoint approximation, which errs to the
    safe side by about half a percent. Given ``clusters``, each item weighs as much as 1 / design
    effect of one (see `plausible_design_effect`), and the larger of this bound and that of
    `certify_loss` counts.

    Args:
        baseline, compressed: the score of every item under both models, ``(items,)``.
        bounds: the lowest and the highest value that an item can have (not those that were seen);
            None if there are none.
        clusters: as for `certify_loss`.
        copies: as for `certify_accuracy`. Without it, items whose two scores are the same to the
            last digit, and not round, are taken for copies.
        unit: what a score is counted in, such as ``"points"``: the verdict's ``measure``.

    Raises:
        ValueError: mismatched lengths, non-finite values, values outside ``bounds``, a max_drop
            that the bounds cannot exceed, no items, fewer than two clusters.
    """
    base, comp = column(baseline, "baseline"), column(compressed, "compressed")
    check_same_length(baseline=base, compressed=comp)
    max_drop, confidence = check_limits(max_drop, confidence)
    if bounds is None:
        if copies is not None:
            numbers = numbered_clusters(copies, base.size)
            documents = numbers if clusters is None else numbered_clusters(clusters, base.size)
            clusters = joined(numbers.tolist(), documents.tolist())
        # A score that should be high is a loss with the sign turned.
        losses = (-base, -comp) if higher_is_better else (base, comp)
        verdict = certify_loss(
            *losses,
            np.ones(base.size),
            clusters=clusters,
            max_drop=max_drop,
            confidence=confidence,
            measure=unit,
        )
        return replace(
            verdict, metric=metric, baseline=float(base.mean()), compressed=float(comp.mean())
        )
    low, high = check_bounds(bounds)
    _check_range(base, comp, (low, high), max_drop)
    if (low, high) == (0, 1) and _zero_or_one(base) and _zero_or_one(comp):
        right = (base, comp) if higher_is_better else (1 - base, 1 - comp)
        verdict = certify_accuracy(
            *right, clusters=clusters, copies=copies, max_drop=max_drop, confidence=confidence
        )
    else:
        difference = base - comp if higher_is_better else comp - base
        repeated = None
        if copies is None:
            labels = same_results(base, comp, np.ones(base.size))
            repeated = None if labels is None else joined(labels)
        given = _Given(
            difference=difference,
            span=high - low,
            clusters=clusters,
            copies=repeated if copies is None else copies,
            repeated=repeated is not None,
        )
        verdict = _certify_bounded(given, max_drop=max_drop, confidence=confidence)
    return replace(
        verdict,
        metric=metric,
        measure=unit,
        baseline=float(base.mean()),
        compressed=float(comp.mean()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Given:
    """Paired differences between -``span`` and ``span``, and which items depend on each other;
    ``repeated``: copies are those with the same results."""

    difference: NDArray[np.float64]
    span: float
    clusters: ArrayLike | None
    copies: ArrayLike | None
    repeated: bool


def _check_range(
    base: NDArray[np.float64],
    comp: NDArray[np.float64],
    bounds: tuple[float, float],
    max_drop: float,
) -> None:
    low, high = bounds
    if max_drop >= high - low:
        raise ValueError(
            f"max_drop={max_drop:g}: no drop of a score between {low:g} and {high:g} exceeds it"
        )
    if base.size == 0:
        raise ValueError("no items: pass at least one result per model")
    for name, values in (("baseline", base), ("compressed", comp)):
        outside = np.flatnonzero((values < low) | (values > high))
        if outside.size:
            raise ValueError(
                f"{name} is outside bounds=({low:g}, {high:g}) at items {outside[:5].tolist()}"
            )


def _zero_or_one(values: NDArray[np.float64]) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _certify_bounded(given: _Given, *, max_drop: float, confidence: float) -> Verdict:
    """The verdict on bounded differences; the caller names the metric and the means."""
    # 1. What the items and their clusters say.
    difference, span = given.difference, given.span
    alpha, items = 1 - confidence, difference.size
    drop, variance = float(difference.mean()), float(difference.var())
    evidence = _evidence(given, variance, alpha)

    # 2. The bound: of two that could be too low, the larger.
    bound = max(evidence.upper, gaffke_upper(difference, span, alpha, evidence.inflation))

    # 3. The verdict.
    if evidence.few:
        status = INCONCLUSIVE
    elif bound <= max_drop:
        status = CERTIFIED
    elif (
        evidence.lower > max_drop
        and -gaffke_upper(-difference, span, alpha, evidence.inflation) > max_drop
    ):
        status = VIOLATED
    else:
        status = INCONCLUSIVE
    needed = None
    if status == INCONCLUSIVE and drop != max_drop:
        needed = _needed(difference, span, evidence, max_drop, alpha)
    return Verdict(
        status=status,
        metric="",
        measure="",
        baseline=math.nan,
        compressed=math.nan,
        drop=drop,
        stderr=evidence.stderr,
        bound=bound,
        max_drop=max_drop,
        confidence=confidence,
        items=items,
        clusters=evidence.clusters,
        needed=needed,
        method=_BOUNDED if evidence.clusters is None else _BOUNDED_CLUSTERED,
        note=evidence.note,
    )


def _evidence(given: _Given, variance: float, alpha: float) -> Evidence:
    """What the items say, those with the same results counted once."""
    difference, items, copies = given.difference, given.difference.size, given.copies
    if not given.repeated:
        return evidence_of(
            difference, given.clusters, variance=variance, alpha=alpha, copies=copies
        )
    distinct = len(np.unique(np.asarray(copies)))
    note = (
        f"{items - distinct} of the {items} items have the very results of others and count as "
        "the same"
    )
    # One item has no standard error, and is too few by any measure.
    if distinct < 2:
        alone = evidence_of(difference, None, variance=variance, alpha=alpha)
        few = too_few_text(1, "items", alpha)
        note = f"{few}; {note}"
        return replace(alone, inflation=float(items), clusters=1, few=few, note=note)
    found = evidence_of(difference, given.clusters, variance=variance, alpha=alpha, copies=copies)
    return replace(found, note="; ".join(filter(None, (found.note, note))))


def _needed(
    difference: NDArray[np.float64],
    span: float,
    evidence: Evidence,
    max_drop: float,
    alpha: float,
) -> int:
    """Items that would decide with 80 % power, if drop and variance stay as observed."""
    items, drop, variance = difference.size, float(difference.mean()), float(difference.var())
    inflation = evidence.inflation
    margin = max_drop - planned_drop(drop, max_drop)
    # 1. One more item at the end of the range moves the mean by ``span`` less the drop, and the
    # skewness that it adds widens the bound.
    sign, z = math.copysign(1.0, margin), float(stats.norm.isf(alpha))
    third = sign * float(np.mean((difference - drop) ** 3))
    widened = max(third, 0.0) / max(variance, 1e-300) * (2 * z * z + 1) / 6
    skewed = inflation * ((span - sign * drop) + widened)
    straight = (z + float(stats.norm.ppf(POWER))) * math.sqrt(inflation * variance)
    wanted = growth(straight, skewed, abs(margin))
    # 2. Without any difference the bound is span (1 - alpha^(1/N)), and the saddlepoint's half a
    # percent above.
    if drop < max_drop and max_drop:
        unanimous = 1.01 * inflation * math.log(alpha) / math.log1p(-max_drop / span)
        wanted = max(wanted, unanimous)
    # 3. The bound over clusters may need more of them.
    by_clusters = 0.0
    if evidence.ratio is not None:
        by_clusters = evidence.ratio.growth(margin, alpha)
        by_clusters = max(by_clusters, fewest_clusters(alpha) / evidence.ratio.clusters)
    return max(math.ceil(wanted), math.ceil(items * by_clusters), items + 1)
