"""A ratio whose items come in clusters: its standard error, its bounds, and what clusters cost.

Items of one document resemble each other, and documents differ in size. Everything here counts
documents, not items, as the independent evidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from curvprune.certificate.arguments import numbered_clusters
from curvprune.certificate.unseen import too_few_text, unseen_share
from curvprune.certificate.verdict import POWER
from curvprune.model import joined

# The correlation between items of a cluster that few disagreements cannot rule out.
_ASSUMED_CORRELATION = 0.1

# How many more times the most extreme clusters count in the third moment than they were seen.
# Chosen by simulation: without it a sample's skewness is far below its population's, and lognormal
# losses (sigma 1) at the budget are accepted in 8.5 % of the runs at 20 to 200 clusters; with 3 in
# 6.5 %, with 8 in 5.2 %. The price in power for normal losses is 15 points at 20 clusters of
# unequal size, 7 at 200, 3 at 500.
_UNSEEN_EXTREMES = 8
_FEW_CLUSTERS = 20
_HEAVY_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """A ratio of sums over clusters, and how far to trust it.

    Attributes:
        value: sum of the differences over sum of the counts.
        stderr: its standard error, the jackknife over clusters.
        degrees: degrees of freedom of the t distribution that it is compared with.
        skewness: of the clusters towards large losses, in units of the standard error.
        heaviest: share of the variance that the cluster with the largest loss makes up.
        clusters: how many.
        largest_loss, largest_gain: by how much the value would be higher, or lower, if every
            cluster deviated as far as the one that lost, or gained, most.
        resolution: rounding of the sums, below which no difference is seen.
        spread: whether fewer than half of the clusters differ by the same. Else losses are rare
            events, or none was seen, and what is seen is no scale for them.
    """

    value: float
    stderr: float
    degrees: float
    skewness: float
    heaviest: float
    clusters: int
    largest_loss: float
    largest_gain: float
    resolution: float
    spread: bool

    def upper(self, alpha: float) -> float:
        """The larger of two bounds: that of the clusters seen, and what a share of unseen ones
        would add that each lose as much as the one that lost most."""
        reach = sum(self._reach(alpha, self.skewness))
        return self.value + max(reach, self._unseen(alpha, self.largest_loss))

    def lower(self, alpha: float) -> float:
        """`upper` of the opposite difference, turned round."""
        reach = sum(self._reach(alpha, -self.skewness))
        return self.value - max(reach, self._unseen(alpha, self.largest_gain))

    def _unseen(self, alpha: float, largest: float) -> float:
        return max(unseen_share(self.clusters, alpha) * largest, self.resolution)

    def growth(self, margin: float, alpha: float) -> float:
        """How many times the clusters at hand decide with 80 % power, if drop and ``max_drop`` are
        |margin| apart."""
        straight, skewed = self._reach(alpha, math.copysign(1.0, margin) * self.skewness)
        straight += float(special.ndtri(POWER)) * self.stderr
        # Where one cluster makes up much of the variance, more like it are to come: without this,
        # 80 % are 70 % for lognormal losses (simulated).
        found = (1 + 2 * self.heaviest) * growth(straight, skewed, abs(margin))
        # The unseen share falls in proportion to the number of clusters.
        largest = self.largest_loss if margin > 0 else self.largest_gain
        return max(found, growth(0.0, self._unseen(alpha, largest), abs(margin)))

    def _reach(self, alpha: float, skewness: float) -> tuple[float, float]:
        """From drop to bound: what falls with the root of the number of clusters, and what falls in
        proportion to it."""
        if self.stderr == 0:
            return 0.0, 0.0
        t = -float(special.stdtrit(self.degrees, alpha))
        # Only ever wider: with few clusters the estimated skewness is too noisy to narrow a bound
        # by.
        return t * self.stderr, max(skewness, 0.0) * (2 * t * t + 1) / 6 * self.stderr


def growth(straight: float, skewed: float, margin: float) -> float:
    """The f that solves straight/sqrt(f) + skewed/f = margin."""
    if margin <= 0:
        return math.inf
    return ((straight + math.sqrt(straight**2 + 4 * skewed * margin)) / (2 * margin)) ** 2


def planned_drop(drop: float, max_drop: float) -> float:
    """The drop to plan for: few compressed models are better than the original, and one that
    measured so was lucky."""
    return max(drop, 0.0) if max_drop > 0 else drop


def clustered_ratio(
    difference: NDArray[np.float64], count: NDArray[np.float64], clusters: NDArray[np.int_]
) -> Ratio:
    """sum(difference) / sum(count), judged by its clusters; see `certify_loss` for the formulas.

    Args:
        difference, count: of every item, ``(items,)``.
        clusters: the number of every item's cluster, from 0.
    """
    # 1. The ratio, and what every cluster deviates from it.
    total = float(count.sum())
    value = float(difference.sum()) / total
    sizes = np.bincount(clusters, weights=count)
    number = sizes.size
    residual = np.bincount(clusters, weights=difference - value * count)
    # Rounding leaves residuals of about one ulp of the sums; they are no evidence of spread.
    magnitude = np.bincount(clusters, weights=np.abs(difference)) + abs(value) * sizes
    noise = 8 * np.finfo(float).eps * magnitude
    residual[np.abs(residual) <= noise] = 0.0

    # 2. The variance: leave out one cluster after the other.
    pseudo = residual / (total - sizes) * math.sqrt((number - 1) / number)
    variance = float(np.sum(pseudo**2))

    # 3. The degrees of freedom: the fewer of those under two assumptions about the clusters.
    share = sizes / total
    weight = (number - 1) / number * (share / (1 - share)) ** 2
    equal_variances = _satterthwaite(weight, share, np.ones(number))
    shrinking_variances = _satterthwaite(weight, share, 1 / sizes)

    # 4. The skewness, as if the most extreme clusters had been seen more often.
    skewness = heaviest = 0.0
    if variance > 0:
        extremes = _UNSEEN_EXTREMES * (pseudo.max() ** 3 + pseudo.min() ** 3)
        skewness = float(np.sum(pseudo**3) + extremes) / variance**1.5
        heaviest = float(pseudo.max()) ** 2 / variance
    return Ratio(
        value=value,
        stderr=math.sqrt(variance),
        degrees=min(equal_variances, shrinking_variances),
        skewness=skewness,
        heaviest=heaviest,
        clusters=number,
        largest_loss=number * max(float(residual.max()), 0.0) / total,
        largest_gain=number * max(-float(residual.min()), 0.0) / total,
        resolution=float(noise.sum()) / total + np.finfo(float).eps,
        spread=bool(_most_alike((residual + value * sizes) / sizes, noise / sizes) <= number / 2),
    )


def _most_alike(rates: NDArray[np.float64], noise: NDArray[np.float64]) -> int:
    """The largest number of clusters whose differences per position are the same, up to
    rounding."""
    ordered = np.sort(rates)
    ends = np.searchsorted(ordered, ordered + 2 * noise.max(), side="right")
    return int((ends - np.arange(ordered.size)).max())


def _satterthwaite(
    weight: NDArray[np.float64], share: NDArray[np.float64], spread: NDArray[np.float64]
) -> float:
    """Degrees of freedom of a quadratic form: twice its squared mean over its variance.

    The form is sum_c weight_c (y_c - sum_k share_k y_k)^2 for independent normal y_c with
    variances ``spread``. Cost: O(clusters).
    """
    load = share * spread
    common = float(np.sum(share * load))
    own = spread + common - 2 * load
    k0, k1, k2 = float(weight.sum()), float(np.sum(weight * load)), float(np.sum(weight * load**2))
    everywhere = common**2 * k0**2 + 2 * k2 * k0 - 4 * common * k1 * k0 + 2 * k1**2
    diagonal = float(np.sum(weight**2 * (own**2 - (common - 2 * load) ** 2)))
    twice = everywhere + diagonal
    # Sizes so unequal that one cluster is all there is cancel to nothing: one degree of freedom is
    # the least there is.
    return float(np.sum(weight * own)) ** 2 / twice if twice > 0 else 1.0


def doubts(ratio: Ratio, number: int, what: str, *, bounded: bool = False) -> str:
    """What was seen that makes the confidence doubtful: few clusters, or one that is very large.

    Args:
        number: how many clusters.
        what: ``"clusters"``, or ``"items"`` where every item is one.
        bounded: a score whose range is known hides no large losses.
    """
    found = []
    if number < _FEW_CLUSTERS:
        found.append(
            f"{number} {what} are few: the confidence holds if their differences are close to "
            "normal"
        )
    if not bounded and ratio.heaviest > _HEAVY_SHARE:
        found.append(
            f"one of the {what} makes up {ratio.heaviest:.0%} of the variance: losses as rare "
            "and large as that are hidden from a sample of this size, and the confidence may be "
            "lower than stated"
        )
    return "; ".join(found)


def design_effect(documents: ArrayLike, copies: ArrayLike | None = None) -> float:
    """How many items of these documents are assumed to carry as much as one independent item.

    1 + 0.1 (s - 1), s the mean size of the document of an item. Where each item stands there c
    times, for a mean item, c + 0.1 (s - c): copies say nothing new at all.

    Args:
        copies: a number that items share which are the same.
    """
    times = 1.0 if copies is None else _mean_size(copies)
    return times + _ASSUMED_CORRELATION * max(_mean_size(documents) - times, 0.0)


def _mean_size(labels: ArrayLike) -> float:
    """How many items the cluster of a mean item has."""
    sizes = np.unique(np.asarray(labels), return_counts=True)[1].astype(float)
    return float(np.sum(sizes**2) / sizes.sum())


def plausible_design_effect(
    clusters: NDArray[np.int_],
    stderr: float,
    independent_variance: float,
    copies: NDArray[np.int_] | None = None,
) -> float:
    """The largest plausible number of items that carry as much as one independent item.

    The larger of what is observed, stderr^2 over the variance for independent items, and of
    `design_effect`. The second is needed because few disagreements show no correlation even where
    there is one. 0.1 is an assumption: at a correlation of 0.1 between items of a cluster,
    simulated acceptance of a drop equal to the budget stays below 5 %. At 0.3 and with losses but
    no gains at all it was up to 10 %.
    """
    observed = stderr**2 / independent_variance if independent_variance > 0 else 1.0
    return max(1.0, observed, design_effect(clusters, copies))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the clusters of a bounded score say beside its items.

    Attributes:
        stderr: standard error of the mean difference.
        inflation: how many items carry as much as one independent item.
        upper, lower: the t bounds over clusters; infinite, so that they decide nothing, where
            items are independent.
        clusters: how many; None where items are independent.
        ratio: the mean difference judged by its clusters, where there are some.
        note: see `doubts`.
        few: why so few clusters decide nothing; empty where they are enough.
    """

    stderr: float
    inflation: float
    upper: float
    lower: float
    clusters: int | None
    ratio: Ratio | None
    note: str
    few: str


def evidence_of(
    difference: NDArray[np.float64],
    clusters: ArrayLike | None,
    *,
    variance: float,
    alpha: float,
    copies: ArrayLike | None = None,
) -> Evidence:
    """What `Evidence` holds, of paired differences ``(items,)`` with this variance.

    Args:
        copies: a number that items share which are the same; ``None`` where no two are.
    """
    items = difference.size
    if clusters is None and copies is None:
        return Evidence(
            stderr=math.sqrt(variance / items),
            inflation=1.0,
            upper=-math.inf,
            lower=math.inf,
            clusters=None,
            ratio=None,
            note="",
            few="",
        )
    same = None if copies is None else numbered_clusters(copies, items)
    numbers = same if clusters is None else numbered_clusters(clusters, items)
    assert numbers is not None
    if same is not None:
        numbers = joined(numbers.tolist(), same.tolist())
    number = int(numbers.max()) + 1
    ratio = clustered_ratio(difference, np.ones(items), numbers)
    few = too_few_text(number, "clusters", alpha)
    note = few or doubts(ratio, number, "clusters", bounded=True)
    return Evidence(
        stderr=ratio.stderr,
        inflation=plausible_design_effect(numbers, ratio.stderr, variance / items, same),
        upper=ratio.upper(alpha),
        lower=ratio.lower(alpha),
        clusters=number,
        ratio=ratio,
        note=note,
        few=few,
    )
