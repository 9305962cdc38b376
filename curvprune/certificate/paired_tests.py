"""Verdicts with a known error rate: is the compressed model within the budget, on items that no
earlier step has seen?

Every test here is paired (both models, same items) and one-sided against the budget
(non-inferiority): the null hypothesis is "the drop exceeds the budget", so a small sample yields
INCONCLUSIVE, never a certificate. Drop > 0 means the compressed model is worse. The functions take
results per item as arrays and know nothing about models. `docs/certificate.md` has the statistics
and the simulated error rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict
from scipy import optimize, special, stats

from curvprune.schema import Json, Number, decode, encode

CERTIFIED, VIOLATED, INCONCLUSIVE = "CERTIFIED", "VIOLATED", "INCONCLUSIVE"
_POWER = 0.8

# Berger and Boos: the p-value is maximised over a confidence interval for the nuisance parameter
# that misses it with this probability, which is then added to the p-value.
_NUISANCE_MISS = 1e-4
_NUISANCE_POINTS = 64
_TAIL = 1e-10
_ASSUMED_CORRELATION = 0.1

# How many more times the most extreme clusters count in the third moment than they were seen.
# Chosen by simulation: without it a sample's skewness is far below its population's, and lognormal
# losses (sigma 1) at the budget are accepted in 8.5 % of the runs at 20 to 200 clusters; with 3 in
# 6.5 %, with 8 in 5.2 %. The price in power for normal losses is 15 points at 20 clusters of
# unequal size, 7 at 200, 3 at 500.
_UNSEEN_EXTREMES = 8
# The sample skewness of N normal items is N(0, 6/N); its positive part widens a 95 % bound by this
# over N, in standard deviations of an item.
_SKEWNESS_NOISE = 1.05
_FEW_CLUSTERS = 20
_HEAVY_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one test against a budget.

    `status` is CERTIFIED (drop <= max_drop at `confidence`), VIOLATED (drop > max_drop at
    `confidence`) or INCONCLUSIVE. `baseline`, `compressed`: mean loss or accuracy. `drop`: how much
    worse the compressed model is, in `unit`; `stderr` its standard error; `bound` its one-sided
    upper confidence bound (CERTIFIED iff bound <= max_drop). `items` and `clusters` count the
    evidence (clusters is None when items are independent); `needed` is the number of items that
    would decide an INCONCLUSIVE verdict with 80 % power if drop and variance stay as observed, None
    otherwise; a drop below 0 is planned as 0. `method` names the test; `note` says what makes the
    confidence doubtful, if anything was seen that does.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    status: str
    metric: str
    measure: str
    baseline: Number
    compressed: Number
    drop: Number
    stderr: Number
    bound: Number
    max_drop: Number
    confidence: Number
    items: int
    clusters: int | None
    needed: int | None
    method: str
    note: str = ""

    def to_dict(self) -> Any:
        """Plain JSON values; numbers that are not finite become None."""
        return encode(self)

    @staticmethod
    def from_dict(record: Json) -> Verdict:
        """The inverse of `to_dict` (None becomes NaN where a number must stand). Raises ValueError
        naming what does not fit."""
        return decode(Verdict, record, source="the record")


def certify_loss(
    baseline_sum: ArrayLike,
    compressed_sum: ArrayLike,
    count: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    max_drop: float,
    confidence: float = 0.95,
    measure: str = "nats/token",
) -> Verdict:
    """Is the rise of the mean loss at most `max_drop`?

    `baseline_sum`, `compressed_sum` [items]: summed loss of every item under both models; `count`
    [items]: tokens (or examples) in it, > 0. `clusters` [items]: the document each item comes from;
    None when the items are independent.

    The drop is the ratio d = sum(compressed - baseline) / sum(count). With r_c = sum_{i in c}
    (diff_i - d count_i), N_c the tokens of cluster c and N all of them, its variance is the
    leave-one-cluster-out jackknife around d, (m - 1)/m sum_c (r_c / (N - N_c))^2 (the CR3 form),
    and the reference is Student's t with Satterthwaite's degrees of freedom for this quadratic form
    (Bell and McCaffrey 2002), the smaller of those for equal cluster variances and for variances
    proportional to 1/N_c. Where the clusters are skewed towards large losses a t bound is too low;
    the bound is d + se (t + kappa (2 t^2 + 1)/6) (Johnson 1978, JASA 73), kappa = sum u^3 + 8 (max
    u^3 + min u^3) if that is positive, u_c the terms of the jackknife over se: large losses are
    rarer in a sample than in its population, so the most extreme clusters on either side count more
    often than they were seen. With equal clusters and no skew all this is the paired t test. The
    usual cluster-robust t with m - 1 degrees of freedom accepts a true drop equal to the budget in
    up to 15 % of the runs at nominal 5 % when a few long documents dominate.

    No test of an unbounded loss holds its level for every distribution (Bahadur and Savage 1956):
    losses so large and rare that no sampled document has one cannot be excluded. `note` says where
    the sample itself gives reason for doubt; a bounded score (`certify_values` with `bounds`) has
    no such gap.

    `needed`: the items at which t se + z_power se + the skewness term, which falls with the square,
    reach max_drop - d, at the observed items per cluster, and as much more as twice the largest
    loss's share of the variance. Raises ValueError on mismatched lengths, non-finite values, counts
    <= 0, fewer than two clusters.
    """
    base, comp, tokens = (
        _column(v, name)
        for v, name in (
            (baseline_sum, "baseline_sum"),
            (compressed_sum, "compressed_sum"),
            (count, "count"),
        )
    )
    _same_length(baseline_sum=base, compressed_sum=comp, count=tokens)
    _check_limits(max_drop, confidence)
    if (bad := np.flatnonzero(tokens <= 0)).size:
        raise ValueError(
            f"count must be > 0: items {bad[:5].tolist()} have none ({bad.size} in all); "
            "leave items without counted tokens out"
        )
    groups = _groups(clusters, base.size)
    ratio = _clustered_ratio(comp - base, tokens, groups)
    return Verdict(
        metric="loss",
        measure=measure,
        baseline=float(base.sum() / tokens.sum()),
        compressed=float(comp.sum() / tokens.sum()),
        method="paired ratio, jackknife over clusters, skewness-adjusted t bound",
        note=_doubts(ratio, groups, "clusters" if clusters is not None else "items"),
        **_decide(
            ratio, max_drop, confidence, base.size, int(groups.max()) + 1, clusters is not None
        ),
    )


def certify_values(
    baseline: ArrayLike,
    compressed: ArrayLike,
    *,
    max_drop: float,
    bounds: tuple[float, float] | None = None,
    higher_is_better: bool = True,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    metric: str = "value",
    measure: str = "",
) -> Verdict:
    """Is the mean of any score per item at most `max_drop` worse?

    `baseline`, `compressed` [items]: the score of every item under both models. `bounds`: the
    lowest and the highest value that an item can have (not those that were seen); None if there are
    none. `clusters` as for `certify_loss`.

    Without bounds: the test of `certify_loss`, every item counting once. With bounds (0, 1) and
    nothing but 0 and 1:
    `certify_accuracy`. With bounds otherwise: Gaffke's bound (2005), the `confidence` quantile of
    sum_i D_i x_i over the paired differences x_i and one more at the largest possible value, D
    uniform on the simplex. It needs no other assumption than independent items and cannot miss rare
    large losses; for 0/1 differences it is that of Clopper and Pearson. That its level holds at any
    N is proven for two values and conjectured otherwise, without a counterexample known
    (Learned-Miller and Thomas 2019, arXiv:1905.06208). The quantile comes from a saddlepoint
    approximation, which errs to the safe side by about half a percent. Given `clusters`, each item
    weighs as much as 1 / design effect of one (see `_design_effect`), and the larger of this bound
    and that of `certify_loss` counts.

    Raises ValueError on mismatched lengths, non-finite values, values outside `bounds`, a max_drop
    that the bounds cannot exceed, no items, fewer than two clusters.
    """
    base, comp = _column(baseline, "baseline"), _column(compressed, "compressed")
    _same_length(baseline=base, compressed=comp)
    _check_limits(max_drop, confidence)
    if bounds is None:
        worse = (base, comp) if not higher_is_better else (-base, -comp)
        verdict = certify_loss(
            *worse,
            np.ones(base.size),
            clusters=clusters,
            max_drop=max_drop,
            confidence=confidence,
            measure=measure,
        )
        return replace(
            verdict, metric=metric, baseline=float(base.mean()), compressed=float(comp.mean())
        )
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"bounds={bounds!r}: expected the lowest and the highest value of an item, such as "
            "(0, 1)"
        )
    if max_drop >= high - low:
        raise ValueError(
            f"max_drop={max_drop:g}: no drop of a score between {low:g} and {high:g} exceeds it"
        )
    if base.size == 0:
        raise ValueError("no items: pass at least one result per model")
    for name, values in (("baseline", base), ("compressed", comp)):
        if (bad := np.flatnonzero((values < low) | (values > high))).size:
            raise ValueError(
                f"{name} is outside bounds=({low:g}, {high:g}) at items {bad[:5].tolist()}"
            )
    if (low, high) == (0, 1) and all(
        np.all((values == 0) | (values == 1)) for values in (base, comp)
    ):
        right = (base, comp) if higher_is_better else (1 - base, 1 - comp)
        verdict = certify_accuracy(
            *right, clusters=clusters, max_drop=max_drop, confidence=confidence
        )
        return replace(
            verdict,
            metric=metric,
            measure=measure,
            baseline=float(base.mean()),
            compressed=float(comp.mean()),
        )
    difference = base - comp if higher_is_better else comp - base
    return Verdict(
        metric=metric,
        measure=measure,
        baseline=float(base.mean()),
        compressed=float(comp.mean()),
        **_decide_bounded(difference, high - low, clusters, float(max_drop), float(confidence)),
    )


def certify_accuracy(
    baseline_correct: ArrayLike,
    compressed_correct: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    max_drop: float,
    confidence: float = 0.95,
) -> Verdict:
    """Is the fall of accuracy at most `max_drop` (a fraction: 0.01 is one percentage point)?

    `baseline_correct`, `compressed_correct` [items]: booleans or 0/1. With n01 items that only the
    baseline answers and n10 that only the compressed model answers, drop = (n01 - n10) / N and
    stderr = sqrt((rho - drop^2) / N), rho = (n01 + n10)/N.

    Independent items (`clusters` None): exact unconditional test that orders the outcomes by
    Tango's score statistic (1998, Statistics in Medicine 17) and maximises the p-value over the
    nuisance parameter P(only the compressed model is right) inside its 99.99 % interval (Berger and
    Boos 1994, JASA 89; for paired proportions Hsueh, Liu and Chen 2001, Biometrics 57). The plain
    score test accepts a drop equal to the budget in up to 7 % of the runs at nominal 5 % when few
    items disagree, this one never in more than 5 %. Cost: below a second at any N.

    Given `clusters` (subjects, documents): the bound of `certify_loss` on the paired differences,
    or the exact one with the number of items divided by the largest plausible design effect (see
    `_design_effect`), whichever is further from the drop.

    `needed`: `items_needed_for_accuracy` at the observed disagreement, times the design effect.
    Raises ValueError on mismatched lengths, values other than 0/1, no items, fewer than two
    clusters.
    """
    base, comp = (
        _zero_one(baseline_correct, "baseline_correct"),
        _zero_one(compressed_correct, "compressed_correct"),
    )
    _same_length(baseline_correct=base, compressed_correct=comp)
    _check_limits(max_drop, confidence)
    if max_drop >= 1:
        raise ValueError(
            f"max_drop={max_drop:g}: accuracy drops are fractions below 1; write 0.01 for one "
            "percentage point"
        )
    items = base.size
    if items == 0:
        raise ValueError("no items: pass at least one result per model")
    n01, n10 = int(np.sum(base & ~comp)), int(np.sum(~base & comp))
    drop = (n01 - n10) / items
    rho = (n01 + n10) / items
    alpha = 1 - confidence
    number_of_clusters, note = None, ""

    if clusters is None:
        method = "paired, exact unconditional score test"
        stderr = math.sqrt(max(rho - drop**2, 0.0) / items)
        inflation = 1.0
        counts = (n01, n10, items)
        upper, lower = -math.inf, math.inf
    else:
        method = "paired, jackknife t bound over clusters and exact score test at the effective number of items"
        groups = _groups(clusters, items)
        number_of_clusters = int(groups.max() + 1)
        ratio = _clustered_ratio(base.astype(float) - comp.astype(float), np.ones(items), groups)
        stderr, drop = ratio.stderr, ratio.value
        inflation = _design_effect(groups, ratio.stderr, max(rho - drop**2, 0.0) / items)
        counts = _shrunk(n01, n10, items, inflation)
        upper, lower = ratio.upper(alpha), ratio.lower(alpha)
        note = _doubts(ratio, groups, "clusters", bounded=True)
    bound = max(upper, _exact_upper(*counts, max_drop, alpha))
    swapped = (counts[1], counts[0], counts[2])
    if bound <= max_drop:
        status = CERTIFIED
    elif lower > max_drop and _p_value(*swapped, -max_drop) <= alpha and drop > max_drop:
        status = VIOLATED
    else:
        status = INCONCLUSIVE

    needed = None
    if status == INCONCLUSIVE and drop != max_drop:
        if drop < max_drop:
            planned = _planned(drop, max_drop)
            # What clusters really cost is in the standard error; the design effect covers what few
            # losses cannot show.
            wanted = inflation * _score_items(max(rho, abs(planned)), planned, max_drop, alpha)
        else:
            wanted = inflation * _score_items(rho, -drop, -max_drop, alpha)
        if clusters is not None:
            wanted = max(wanted, items * ratio.growth(max_drop - _planned(drop, max_drop), alpha))
        needed = max(math.ceil(wanted), items + 1)
    return Verdict(
        status=status,
        metric="accuracy",
        measure="fraction",
        baseline=float(base.mean()),
        compressed=float(comp.mean()),
        drop=float(drop),
        stderr=float(stderr),
        bound=float(bound),
        max_drop=float(max_drop),
        confidence=float(confidence),
        items=items,
        clusters=number_of_clusters,
        needed=needed,
        method=method,
        note=note,
    )


def probability_of_certifying(
    drop: float,
    stderr_select: float,
    stderr_certify: float,
    *,
    max_drop: float,
    confidence: float = 0.95,
    reach: float | None = None,
) -> float:
    """Predictive probability that a plan measured on the select split will be CERTIFIED on the
    certify split.

    Phi((max_drop - drop - z se_c) / sqrt(se_s^2 + se_c^2)): `drop` and its standard error se_s come
    from the select split, se_c is the standard error expected on the certify split (se_s
    sqrt(items_select / items_certify)). `reach` stands for z se_c where the bound is expected
    further from the drop than that. Normal approximation with a flat prior; a guide for choosing
    among plans, not a certificate. Raises ValueError on negative or NaN input.
    """
    _check_limits(max_drop, confidence)
    if not (
        math.isfinite(drop) and 0 <= stderr_select < math.inf and 0 <= stderr_certify < math.inf
    ):
        raise ValueError(
            f"probability_of_certifying({drop!r}, {stderr_select!r}, {stderr_certify!r}): "
            "expected a finite drop and finite standard errors >= 0"
        )
    if reach is not None and not reach >= 0:
        raise ValueError(
            f"probability_of_certifying(reach={reach!r}): expected a distance >= 0 from drop to "
            "bound"
        )
    reach = stats.norm.ppf(confidence) * stderr_certify if reach is None else reach
    margin = max_drop - drop - reach
    spread = math.hypot(stderr_select, stderr_certify)
    if spread == 0:
        return 1.0 if margin >= 0 else 0.0
    return float(stats.norm.cdf(margin / spread))


def items_needed(
    sd: float,
    *,
    max_drop: float,
    drop: float = 0.0,
    confidence: float = 0.95,
    power: float = _POWER,
) -> int:
    """Items for which a model with true drop `drop` < `max_drop` is CERTIFIED with probability
    `power`.

    The N at which (z_confidence + z_power) sd / sqrt(N) + 1.05 sd / N = max_drop - drop, rounded
    up: the textbook's formula and what the correction for skewness costs where there is none. `sd`
    is the standard deviation of the paired difference of one independent item (document), without
    skew. For accuracy see `items_needed_for_accuracy`. Raises ValueError if no number of items
    suffices.
    """
    _check_limits(max_drop, confidence)
    if not (math.isfinite(sd) and sd >= 0 and math.isfinite(drop)):
        raise ValueError(
            f"items_needed(sd={sd!r}, drop={drop!r}): expected finite numbers, sd >= 0"
        )
    if not 0.5 <= power < 1:
        raise ValueError(
            f"items_needed(power={power!r}): expected a number in [0.5, 1), such as 0.8"
        )
    if drop >= max_drop:
        raise ValueError(
            f"items_needed(drop={drop:g}, max_drop={max_drop:g}): a model at or over the budget "
            "cannot be certified with any number of items; raise max_drop or assume a smaller drop"
        )
    z = float(stats.norm.ppf(confidence) + stats.norm.ppf(power))
    return max(2, math.ceil(_growth(z * sd, _SKEWNESS_NOISE * sd, max_drop - drop)))


def items_needed_for_accuracy(
    disagreement: float,
    *,
    max_drop: float,
    drop: float = 0.0,
    confidence: float = 0.95,
    power: float = _POWER,
) -> int:
    """Independent items for which `certify_accuracy` certifies a true fall `drop` with probability
    `power`.

    (z_confidence s_0 + z_power s_1)^2 / m^2 + 1/(2 m), m = max_drop - drop, rounded up, and at
    least what certifies without any disagreement. s_1^2 = disagreement - drop^2 is the variance of
    an item's difference, s_0^2 the one that the score test expects at the budget (Tango's
    restricted estimate at the true shares); the second term is what the exact test's discreteness
    costs. `disagreement`: the share of items on which one model is right and the other wrong.
    Raises ValueError if no number of items suffices.
    """
    _check_limits(max_drop, confidence)
    if not abs(drop) <= disagreement <= 1:
        raise ValueError(
            f"items_needed_for_accuracy(disagreement={disagreement!r}, drop={drop!r}): expected "
            "a share of the items, at least the drop"
        )
    if not 0.5 <= power < 1:
        raise ValueError(
            f"items_needed_for_accuracy(power={power!r}): expected a number in [0.5, 1), such as "
            "0.8"
        )
    if drop >= max_drop:
        raise ValueError(
            f"items_needed_for_accuracy(drop={drop:g}, max_drop={max_drop:g}): a model at or "
            "over the budget cannot be certified with any number of items; raise max_drop or "
            "assume a smaller drop"
        )
    return math.ceil(_score_items(disagreement, drop, max_drop, 1 - confidence, power))


def power_for_accuracy(
    items: float,
    disagreement: float,
    *,
    max_drop: float,
    drop: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Probability that `certify_accuracy` certifies a true fall `drop` with `items` independent
    items; the inverse of `items_needed_for_accuracy`, with its formula and its errors."""
    items_needed_for_accuracy(disagreement, max_drop=max_drop, drop=drop, confidence=confidence)
    alpha, margin = 1 - confidence, max_drop - drop
    if max_drop > 0 and items < math.log(alpha) / math.log1p(-max_drop):
        return 0.0
    at_budget, spread = _score_spreads(disagreement, drop, max_drop)
    reach = (
        margin * math.sqrt(max(items - 0.5 / margin, 0.0))
        - float(stats.norm.isf(alpha)) * at_budget
    )
    return float(stats.norm.cdf(reach / spread)) if spread > 0 else float(reach >= 0)


def design_effect(documents: ArrayLike) -> float:
    """How many items of these documents are assumed to carry as much as one independent item: 1 +
    0.1 (mean size of the document of an item - 1)."""
    sizes = np.unique(np.asarray(documents), return_counts=True)[1].astype(float)
    return 1 + _ASSUMED_CORRELATION * (float(np.sum(sizes**2) / sizes.sum()) - 1)


def fixed_sequence(verdicts: Sequence[Verdict]) -> int | None:
    """Index of the last CERTIFIED verdict in the unbroken run of CERTIFIED ones from the start;
    None if the first is not.

    Several plans may be tested on one certify split, each at the full confidence, if their order is
    fixed before the split is looked at and testing stops at the first failure (fixed-sequence
    testing, Maurer, Hothorn and Lehmacher 1995). A wrong certificate needs the first plan in the
    order that is over the budget to be accepted, and that happens with probability at most 1 -
    confidence, however many plans follow. Order from cautious to bold: the plans most likely to
    pass come first, so a failure costs only the bolder ones. A certificate after a failure does not
    count, hence the unbroken run.
    """
    last = None
    for index, verdict in enumerate(verdicts):
        if verdict.status != CERTIFIED:
            break
        last = index
    return last


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ratio:
    value: float
    stderr: float
    degrees: float
    skewness: float
    heaviest: float  # share of the variance that the cluster with the largest loss makes up

    def upper(self, alpha: float) -> float:
        return self.value + sum(self._reach(alpha, self.skewness))

    def lower(self, alpha: float) -> float:
        return self.value - sum(self._reach(alpha, -self.skewness))

    def growth(self, margin: float, alpha: float) -> float:
        """How many times the clusters at hand decide with 80 % power, if drop and `max_drop` are
        |margin| apart."""
        straight, skewed = self._reach(alpha, math.copysign(1.0, margin) * self.skewness)
        straight += float(special.ndtri(_POWER)) * self.stderr
        # Where one cluster makes up much of the variance, more like it are to come: without this,
        # 80 % are 70 % for lognormal losses (simulated).
        return (1 + 2 * self.heaviest) * _growth(straight, skewed, abs(margin))

    def _reach(self, alpha: float, skewness: float) -> tuple[float, float]:
        """From drop to bound: what falls with the root of the number of clusters, and what falls in
        proportion."""
        if self.stderr == 0:
            return 0.0, 0.0
        t = -float(special.stdtrit(self.degrees, alpha))
        # Only ever wider: with few clusters the estimated skewness is too noisy to narrow a bound
        # by.
        return t * self.stderr, max(skewness, 0.0) * (2 * t * t + 1) / 6 * self.stderr


def _growth(straight: float, skewed: float, margin: float) -> float:
    """The f that solves straight/sqrt(f) + skewed/f = margin."""
    if margin <= 0:
        return math.inf
    return ((straight + math.sqrt(straight**2 + 4 * skewed * margin)) / (2 * margin)) ** 2


def _planned(drop: float, max_drop: float) -> float:
    """The drop to plan for: few compressed models are better than the original, and one that
    measured so was lucky."""
    return max(drop, 0.0) if max_drop > 0 else drop


def _doubts(ratio: _Ratio, groups: NDArray[Any], what: str, *, bounded: bool = False) -> str:
    found = int(groups.max()) + 1
    doubts = []
    if found < _FEW_CLUSTERS:
        doubts.append(
            f"{found} {what} are few: the confidence holds if their differences are close to normal"
        )
    if not bounded and ratio.heaviest > _HEAVY_SHARE:
        doubts.append(
            f"one of the {what} makes up {ratio.heaviest:.0%} of the variance: losses as rare "
            "and large as that are hidden from a sample of this size, and the confidence may be "
            "lower than stated"
        )
    return "; ".join(doubts)


def _clustered_ratio(difference: NDArray[Any], count: NDArray[Any], groups: NDArray[Any]) -> _Ratio:
    total = float(count.sum())
    value = float(difference.sum()) / total
    sizes = np.bincount(groups, weights=count)
    clusters = sizes.size
    residual = np.bincount(groups, weights=difference - value * count)
    # Rounding leaves residuals of about one ulp of the sums; they are no evidence of spread.
    noise = (
        8
        * np.finfo(float).eps
        * (np.bincount(groups, weights=np.abs(difference)) + abs(value) * sizes)
    )
    residual[np.abs(residual) <= noise] = 0.0
    pseudo = residual / (total - sizes) * math.sqrt((clusters - 1) / clusters)
    variance = float(np.sum(pseudo**2))
    share = sizes / total
    weight = (clusters - 1) / clusters * (share / (1 - share)) ** 2
    degrees = min(
        _satterthwaite(weight, share, spread) for spread in (np.ones(clusters), 1 / sizes)
    )
    skewness = heaviest = 0.0
    if variance > 0:
        extremes = _UNSEEN_EXTREMES * (pseudo.max() ** 3 + pseudo.min() ** 3)
        skewness = float(np.sum(pseudo**3) + extremes) / variance**1.5
        heaviest = float(pseudo.max()) ** 2 / variance
    return _Ratio(
        value=value,
        stderr=math.sqrt(variance),
        degrees=degrees,
        skewness=skewness,
        heaviest=heaviest,
    )


def _satterthwaite(weight: NDArray[Any], share: NDArray[Any], spread: NDArray[Any]) -> float:
    """2 E^2 / Var of sum_c weight_c (y_c - sum_k share_k y_k)^2 for independent normal y_c with
    variances `spread`; O(m).
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


def _decide(
    ratio: _Ratio, max_drop: float, confidence: float, items: int, clusters: int, clustered: bool
) -> dict[str, Any]:
    alpha = 1 - confidence
    bound = ratio.upper(alpha)
    if bound <= max_drop:
        status = CERTIFIED
    elif ratio.lower(alpha) > max_drop:
        status = VIOLATED
    else:
        status = INCONCLUSIVE
    needed = None
    if status == INCONCLUSIVE and ratio.value != max_drop:
        margin = max_drop - _planned(ratio.value, max_drop)
        needed = max(math.ceil(items * ratio.growth(margin, alpha)), items + 1)
    return {
        "status": status,
        "drop": ratio.value,
        "stderr": ratio.stderr,
        "bound": bound,
        "max_drop": float(max_drop),
        "confidence": float(confidence),
        "items": int(items),
        "clusters": int(clusters) if clustered else None,
        "needed": needed,
    }


def _decide_bounded(
    difference: NDArray[Any],
    span: float,
    clusters: ArrayLike | None,
    max_drop: float,
    confidence: float,
) -> dict[str, Any]:
    alpha, items, drop = 1 - confidence, difference.size, float(difference.mean())
    variance = float(difference.var())
    inflation, note, upper, lower = 1.0, "", -math.inf, math.inf
    stderr, number_of_clusters, growth = math.sqrt(variance / items), None, 0.0
    method = "paired, Gaffke's bound"
    if clusters is not None:
        method = "paired, jackknife t bound over clusters and Gaffke's bound at the effective number of items"
        groups = _groups(clusters, items)
        number_of_clusters = int(groups.max()) + 1
        ratio = _clustered_ratio(difference, np.ones(items), groups)
        inflation = _design_effect(groups, ratio.stderr, variance / items)
        stderr, upper, lower = ratio.stderr, ratio.upper(alpha), ratio.lower(alpha)
        note = _doubts(ratio, groups, "clusters", bounded=True)
        growth = ratio.growth(max_drop - _planned(drop, max_drop), alpha)
    bound = max(upper, _gaffke_upper(difference, span, alpha, inflation))
    if bound <= max_drop:
        status = CERTIFIED
    elif lower > max_drop and -_gaffke_upper(-difference, span, alpha, inflation) > max_drop:
        status = VIOLATED
    else:
        status = INCONCLUSIVE
    needed = None
    if status == INCONCLUSIVE and drop != max_drop:
        margin = max_drop - _planned(drop, max_drop)
        # One more item at the end of the range moves the mean by this, and the skewness it adds
        # widens the bound.
        sign, z = math.copysign(1.0, margin), float(stats.norm.isf(alpha))
        third = sign * float(np.mean((difference - drop) ** 3))
        skewed = inflation * (
            (span - sign * drop) + max(third, 0.0) / max(variance, 1e-300) * (2 * z * z + 1) / 6
        )
        straight = (z + float(stats.norm.ppf(_POWER))) * math.sqrt(inflation * variance)
        wanted = _growth(straight, skewed, abs(margin))
        if (
            drop < max_drop
            # without any difference the bound is span (1 - alpha^(1/N)), and the saddlepoint's 0.5
            # % above
        ):
            wanted = max(
                wanted,
                1.01 * inflation * math.log(alpha) / math.log1p(-max_drop / span)
                if max_drop
                else 0,
            )
        needed = max(math.ceil(wanted), math.ceil(items * growth), items + 1)
    return {
        "status": status,
        "drop": drop,
        "stderr": stderr,
        "bound": bound,
        "max_drop": max_drop,
        "confidence": confidence,
        "items": items,
        "clusters": number_of_clusters,
        "needed": needed,
        "method": method,
        "note": note,
    }


def _gaffke_upper(difference: NDArray[Any], top: float, alpha: float, inflation: float) -> float:
    """The mean m with `_gaffke` = alpha, between the mean difference and `top`."""
    values, counts = np.unique(difference / top, return_counts=True)
    values, weights = np.append(values, 1.0), np.append(counts / inflation, 1.0)
    low = float(np.average(values, weights=weights))
    if low >= 1:
        return top
    root = optimize.brentq(
        lambda mean: _gaffke(values, weights, mean) - alpha, low, 1 - 1e-12, xtol=1e-9
    )
    return top * float(root)


def _gaffke(values: NDArray[Any], weights: NDArray[Any], mean: float) -> float:
    """P(sum_i G_i (values_i - mean) > 0) for independent gamma variables G_i with shapes `weights`,
    by Lugannani and Rice's formula in Barndorff-Nielsen's form; the tilting s solves K'(s) = 0,
    K(s) = -sum w log(1 - s y)."""
    y = values - mean
    if y.max() <= 0:
        return 0.0
    if y.min() >= 0:
        return 1.0
    ends = (1 - 1e-12) / y.min(), (1 - 1e-12) / y.max()
    s = float(
        optimize.brentq(
            lambda s: float(np.sum(weights * y / (1 - s * y))), *ends, xtol=1e-14, rtol=1e-12
        )
    )
    w = math.copysign(math.sqrt(max(2 * float(np.sum(weights * np.log1p(-s * y))), 0.0)), s)
    if abs(w) < 1e-3:  # the formula is 0/0 where the mean is the middle
        return 0.5
    u = s * math.sqrt(float(np.sum(weights * (y / (1 - s * y)) ** 2)))
    return float(stats.norm.sf(w + math.log(u / w) / w))


def _score_items(
    disagreement: float, drop: float, max_drop: float, alpha: float, power: float = _POWER
) -> float:
    """See `items_needed_for_accuracy`. With the signs of both drops turned: the items to show a
    violation."""
    at_budget, spread = _score_spreads(disagreement, drop, max_drop)
    margin = max_drop - drop
    z = stats.norm.isf(alpha) * at_budget, stats.norm.ppf(power) * spread
    unanimous = math.log(alpha) / math.log1p(-max_drop) if max_drop > 0 else 0.0
    return float(max((sum(z) / margin) ** 2 + 0.5 / margin, unanimous))


def _score_spreads(disagreement: float, drop: float, max_drop: float) -> tuple[float, float]:
    """Standard deviation of an item's difference as the score test expects it at `max_drop`, and
    the true one."""
    losses, gains = (disagreement + drop) / 2, (disagreement - drop) / 2
    expected = float(_restricted_gains(np.array([losses]), np.array([gains]), 1, max_drop)[0])
    at_budget = 2 * expected + max_drop * (1 - max_drop)
    return math.sqrt(max(at_budget, 0.0)), math.sqrt(max(disagreement - drop**2, 0.0))


def _design_effect(groups: NDArray[Any], stderr: float, independent_variance: float) -> float:
    """How many clustered items carry as much as one independent item: the larger of what is
    observed, stderr^2 over the variance for independent items, and 1 + 0.1 (mean cluster size seen
    by an item - 1).

    The second is needed because few disagreements show no correlation even where there is one. 0.1
    is an assumption: at a correlation of 0.1 between items of a cluster, simulated acceptance of a
    drop equal to the budget stays below 5 %; at 0.3 and with losses but no gains at all it was up
    to 10 %.
    """
    observed = stderr**2 / independent_variance if independent_variance > 0 else 1.0
    return max(1.0, observed, design_effect(groups))


def _shrunk(n01: int, n10: int, items: int, inflation: float) -> tuple[int, int, int]:
    """Counts at the effective number of items, rounded against the compressed model."""
    effective = max(1, math.floor(items / inflation))
    losses = min(effective, math.ceil(n01 / inflation))
    gains = min(effective - losses, math.floor(n10 / inflation))
    return losses, gains, effective


def _score(n01: NDArray[Any], n10: NDArray[Any], items: int, drop: float) -> NDArray[Any]:
    """Tango's score statistic for H0: P(only baseline right) - P(only compressed right) = drop."""
    b, c = np.atleast_1d(n01).astype(float), np.atleast_1d(n10).astype(float)
    gains = _restricted_gains(b, c, items, drop)
    variance = items * (2 * gains + drop * (1 - drop))
    excess = b - c - items * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(excess == 0, 0.0, excess / np.sqrt(variance))


def _restricted_gains(b: NDArray[Any], c: NDArray[Any], items: int, drop: float) -> NDArray[Any]:
    """Maximum likelihood estimate of P(only compressed right) given the drop (Tango 1998, the root
    of a quadratic)."""
    linear = (2 * items - b + c) * drop - b - c
    root = np.sqrt(np.maximum(linear**2 + 8 * items * c * drop * (1 - drop), 0.0))
    return np.clip((root - linear) / (4 * items), max(0.0, -drop), (1 - drop) / 2)


def _p_value(n01: int, n10: int, items: int, drop: float) -> float:
    """Exact p-value of H0: true drop >= `drop`, by the score ordering, maximised over the nuisance
    parameter."""
    half = _NUISANCE_MISS / 2
    low = float(stats.beta.ppf(half, n10, items - n10 + 1)) if n10 else 0.0
    high = float(stats.beta.isf(half, n10 + 1, items - n10)) if n10 < items else 1.0
    low, high = max(low, 0.0, -drop), min(high, (1 - drop) / 2)
    if low > high:
        return _NUISANCE_MISS
    # Even steps in arcsin(sqrt(q)) are even in standard errors, so the grid misses no peak at
    # either end.
    gains = (
        np.sin(
            np.linspace(math.asin(math.sqrt(low)), math.asin(math.sqrt(high)), _NUISANCE_POINTS)
        )[:, None]
        ** 2
    )
    first, last = stats.binom.ppf(_TAIL, items, low), stats.binom.isf(_TAIL, items, high)
    c = np.arange(max(0, int(first)), min(items, int(last)) + 1)
    reach = _last_as_extreme(
        float(_score(np.array(n01), np.array(n10), items, drop)[0]), c, items, drop
    )
    losses = np.clip((gains + drop) / (1 - gains), 0.0, 1.0)
    inside = np.where(
        reach >= 0, special.bdtr(np.maximum(reach, 0).astype(float), items - c, losses), 0.0
    )
    p = np.sum(stats.binom.pmf(c, items, gains) * inside, axis=1).max()
    return min(1.0, float(p) + _NUISANCE_MISS + 2 * _TAIL)


def _last_as_extreme(score: float, c: NDArray[Any], items: int, drop: float) -> NDArray[Any]:
    """For every n10 = c the largest n01 whose score is <= `score`, -1 if none; the score rises with
    n01."""
    low, high = np.full(c.shape, -1), items - c
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = _score(middle, c, items, drop) <= score + 1e-9
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _exact_upper(n01: int, n10: int, items: int, max_drop: float, alpha: float) -> float:
    """Upper bound of the drop by inverting `_p_value`; <= max_drop exactly when the test at
    max_drop rejects."""
    drop = (n01 - n10) / items
    if drop < max_drop and _p_value(n01, n10, items, max_drop) <= alpha:
        low, high = drop, max_drop
    else:
        low, high = max(drop, max_drop), 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if high - low <= 1e-7:
            break
        if _p_value(n01, n10, items, middle) <= alpha:
            high = middle
        else:
            low = middle
    return high


def _column(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one number per item: (items,)")
    if (bad := np.flatnonzero(~np.isfinite(array))).size:
        raise ValueError(
            f"{name} is not finite at items {bad[:5].tolist()} ({bad.size} in all); "
            "a model that returns NaN or inf cannot be certified"
        )
    return array


def _zero_one(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    array = _column(values, name)
    if np.any((array != 0) & (array != 1)):
        raise ValueError(
            f"{name} must hold booleans or 0/1, one per item; for scores that are not 0/1 use "
            "certify_values"
        )
    return array.astype(bool)


def _same_length(**arrays: NDArray[Any]) -> None:
    lengths = {name: array.size for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"results must be paired item by item, but the lengths differ: {lengths}")


def _groups(clusters: ArrayLike | None, items: int) -> NDArray[Any]:
    if clusters is None:
        groups = np.arange(items)
    else:
        labels = (
            clusters.tolist()
            if isinstance(clusters, np.ndarray)
            else list(cast(Sequence[Any], clusters))
        )
        if len(labels) != items:
            raise ValueError(
                f"clusters has {len(labels)} entries for {items} items; pass one document id per "
                "item"
            )
        numbers: dict[Any, int] = {}
        try:
            groups = np.array(
                [numbers.setdefault(label, len(numbers)) for label in labels], dtype=int
            )
        except TypeError as error:
            raise ValueError(
                "clusters must hold one hashable document id (number or text) per item"
            ) from error
    found = int(groups.max()) + 1 if groups.size else 0
    if found < 2:
        what = "items" if clusters is None else "clusters"
        raise ValueError(
            f"{found} {what}: a bound needs at least 2 independent {what} (20 or more to be of "
            "use); add documents, or pass finer cluster ids"
        )
    return groups


def _check_limits(max_drop: float, confidence: float) -> None:
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop={max_drop!r}: expected a finite number >= 0")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: expected a number in (0.5, 1), such as 0.95")
