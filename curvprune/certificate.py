"""Verdicts with a known error rate: is the compressed model within the budget, on items that no earlier step has seen?

Every test here is paired (both models, same items) and one-sided against the budget (non-inferiority): the null
hypothesis is "the drop exceeds the budget", so a small sample yields INCONCLUSIVE, never a certificate. Drop > 0 means
the compressed model is worse. The functions take results per item as arrays and know nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

CERTIFIED, VIOLATED, INCONCLUSIVE = "CERTIFIED", "VIOLATED", "INCONCLUSIVE"
_POWER = 0.8

# Berger and Boos: the p-value is maximised over a confidence interval for the nuisance parameter that misses it with
# this probability, which is then added to the p-value.
_NUISANCE_MISS = 1e-4
_NUISANCE_POINTS = 64
_TAIL = 1e-10
_ASSUMED_CORRELATION = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one test against a budget.

    `status` is CERTIFIED (drop <= max_drop at `confidence`), VIOLATED (drop > max_drop at `confidence`) or
    INCONCLUSIVE. `baseline`, `compressed`: mean loss or accuracy. `drop`: how much worse the compressed model is, in
    `unit`; `stderr` its standard error; `bound` its one-sided upper confidence bound (CERTIFIED iff bound <=
    max_drop). `items` and `clusters` count the evidence (clusters is None when items are independent); `needed` is the
    number of items that would decide an INCONCLUSIVE verdict with 80 % power if drop and variance stay as observed,
    None otherwise. `method` names the test.
    """

    status: str
    metric: str
    unit: str
    baseline: float
    compressed: float
    drop: float
    stderr: float
    bound: float
    max_drop: float
    confidence: float
    items: int
    clusters: int | None
    needed: int | None
    method: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record; numbers that are not finite become None."""
        record = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict` (None becomes NaN where a number must stand). Raises ValueError on unknown keys."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(set(record) - names):
            raise ValueError(f"Verdict.from_dict: unknown keys {unknown}; expected {sorted(names)}")
        numbers = ("baseline", "compressed", "drop", "stderr", "bound", "max_drop", "confidence")
        known: dict[str, Any] = {k: math.nan if v is None and k in numbers else v for k, v in record.items()}
        return cls(**known)


def certify_loss(
    baseline_sum: ArrayLike,
    compressed_sum: ArrayLike,
    count: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    max_drop: float,
    confidence: float = 0.95,
    unit: str = "nats/token",
) -> Verdict:
    """Is the rise of the mean loss at most `max_drop`?

    `baseline_sum`, `compressed_sum` [items]: summed loss of every item under both models; `count` [items]: tokens (or
    examples) in it, > 0. `clusters` [items]: the document each item comes from; None when the items are independent.

    The drop is the ratio d = sum(compressed - baseline) / sum(count). With r_c = sum_{i in c} (diff_i - d count_i),
    N_c the tokens of cluster c and N all of them, its variance is the leave-one-cluster-out jackknife around d, (m -
    1)/m sum_c (r_c / (N - N_c))^2 (the CR3 form), and the reference is Student's t with Satterthwaite's degrees of
    freedom for this quadratic form (Bell and McCaffrey 2002), the smaller of those for equal cluster variances and for
    variances proportional to 1/N_c. The bound d + t se is widened by se kappa (2 t^2 + 1)/6, kappa = sum r^3 / (sum
    r^2)^1.5 with r as in the jackknife, when the clusters are skewed towards large losses, where a t bound is too low
    (Johnson 1978, JASA 73). With equal clusters and no skew all this is the paired t test. The usual cluster-robust t
    with m - 1 degrees of freedom accepts a true drop equal to the budget in up to 15 % of the runs at nominal 5 % when
    a few long documents dominate; this one stays below 5.5 % for normal effects (simulated in the tests). A few
    documents with rare, very large losses can still hide from any small sample: with skewed effects (lognormal, s =
    0.6, half of the variance between documents) acceptance was up to 9 % at 20 clusters, 7 % at 300.

    `needed` = items ((t + z_power) se / |max_drop - d|)^2: clusters needed, at the observed items per cluster. Raises
    ValueError on mismatched lengths, non-finite values, counts <= 0, fewer than two clusters.
    """
    base, comp, tokens = (
        _column(v, name)
        for v, name in ((baseline_sum, "baseline_sum"), (compressed_sum, "compressed_sum"), (count, "count"))
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
        unit=unit,
        baseline=float(base.sum() / tokens.sum()),
        compressed=float(comp.sum() / tokens.sum()),
        method="paired ratio, jackknife over clusters, skewness-adjusted t bound",
        **_decide(ratio, max_drop, confidence, base.size, int(groups.max()) + 1, clusters is not None),
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

    `baseline_correct`, `compressed_correct` [items]: booleans or 0/1. With n01 items that only the baseline answers
    and n10 that only the compressed model answers, drop = (n01 - n10) / N and stderr = sqrt((rho - drop^2) / N), rho =
    (n01 + n10)/N.

    Independent items (`clusters` None): exact unconditional test that orders the outcomes by Tango's score statistic
    (1998, Statistics in Medicine 17) and maximises the p-value over the nuisance parameter P(only the compressed model
    is right) inside its 99.99 % interval (Berger and Boos 1994, JASA 89; for paired proportions Hsueh, Liu and Chen
    2001, Biometrics 57). The plain score test accepts a drop equal to the budget in up to 7 % of the runs at nominal 5
    % when few items disagree, this one never in more than 5 %. Cost: below a second at any N.

    Given `clusters` (subjects, documents): the bound of `certify_loss` on the paired differences, or the exact one
    with the number of items divided by the largest plausible design effect (see `_design_effect`), whichever is
    further from the drop.

    `needed`: (z_conf + z_power)^2 (rho - drop^2) / (max_drop - drop)^2, but at least what certifies without any
    disagreement, and more than the items at hand. Raises ValueError on mismatched lengths, values other than 0/1, no
    items, fewer than two clusters.
    """
    base, comp = _zero_one(baseline_correct, "baseline_correct"), _zero_one(compressed_correct, "compressed_correct")
    _same_length(baseline_correct=base, compressed_correct=comp)
    _check_limits(max_drop, confidence)
    if max_drop >= 1:
        raise ValueError(
            f"max_drop={max_drop:g}: accuracy drops are fractions below 1; write 0.01 for one percentage point"
        )
    items = base.size
    if items == 0:
        raise ValueError("no items: pass at least one result per model")
    n01, n10 = int(np.sum(base & ~comp)), int(np.sum(~base & comp))
    drop = (n01 - n10) / items
    rho = (n01 + n10) / items
    alpha = 1 - confidence
    number_of_clusters = None

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
        z = stats.norm.isf(alpha) + stats.norm.ppf(_POWER)
        variance = max(rho - drop**2, stderr**2 * items / inflation)
        wanted = inflation * z**2 * variance / (max_drop - drop) ** 2
        if drop < max_drop:
            wanted = max(wanted, inflation * math.log(alpha) / math.log1p(-max_drop))
        needed = max(math.ceil(wanted), items + 1)
    return Verdict(
        status=status,
        metric="accuracy",
        unit="fraction",
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
    )


def probability_of_certifying(
    drop: float, stderr_select: float, stderr_certify: float, *, max_drop: float, confidence: float = 0.95
) -> float:
    """Predictive probability that a plan measured on the select split will be CERTIFIED on the certify split.

    Phi((max_drop - drop - z se_c) / sqrt(se_s^2 + se_c^2)): `drop` and its standard error se_s come from the select
    split, se_c is the standard error expected on the certify split (se_s sqrt(items_select / items_certify)). Normal
    approximation with a flat prior; a guide for choosing among plans, not a certificate. Raises ValueError on negative
    or NaN input.
    """
    _check_limits(max_drop, confidence)
    if not (math.isfinite(drop) and 0 <= stderr_select < math.inf and 0 <= stderr_certify < math.inf):
        raise ValueError(
            f"probability_of_certifying({drop!r}, {stderr_select!r}, {stderr_certify!r}): "
            "expected a finite drop and finite standard errors >= 0"
        )
    margin = max_drop - drop - stats.norm.ppf(confidence) * stderr_certify
    spread = math.hypot(stderr_select, stderr_certify)
    if spread == 0:
        return 1.0 if margin >= 0 else 0.0
    return float(stats.norm.cdf(margin / spread))


def items_needed(
    sd: float, *, max_drop: float, drop: float = 0.0, confidence: float = 0.95, power: float = _POWER
) -> int:
    """Items for which a model with true drop `drop` < `max_drop` is CERTIFIED with probability `power`.

    N = (z_confidence + z_power)^2 sd^2 / (max_drop - drop)^2, rounded up. `sd` is the standard deviation of the paired
    difference of one item; for accuracy it is sqrt(rho) (drop 0), rho the share of items on which the two models
    disagree: at a budget of 1 pp, rho = .02, .05, .10 need 1,237, 3,092 and 6,183 items. Raises ValueError if no
    number of items suffices.
    """
    _check_limits(max_drop, confidence)
    if not (math.isfinite(sd) and sd >= 0 and math.isfinite(drop)):
        raise ValueError(f"items_needed(sd={sd!r}, drop={drop!r}): expected finite numbers, sd >= 0")
    if not 0.5 <= power < 1:
        raise ValueError(f"items_needed(power={power!r}): expected a number in [0.5, 1), such as 0.8")
    if drop >= max_drop:
        raise ValueError(
            f"items_needed(drop={drop:g}, max_drop={max_drop:g}): a model at or over the budget "
            "cannot be certified with any number of items; raise max_drop or assume a smaller drop"
        )
    z = float(stats.norm.ppf(confidence) + stats.norm.ppf(power))
    return max(1, math.ceil((z * sd / (max_drop - drop)) ** 2))


def fixed_sequence(verdicts: Sequence[Verdict]) -> int | None:
    """Index of the last CERTIFIED verdict in the unbroken run of CERTIFIED ones from the start; None if the first is
    not.

    Several plans may be tested on one certify split, each at the full confidence, if their order is fixed before the
    split is looked at and testing stops at the first failure (fixed-sequence testing, Maurer, Hothorn and Lehmacher
    1995). A wrong certificate needs the first plan in the order that is over the budget to be accepted, and that
    happens with probability at most 1 - confidence, however many plans follow. Order from cautious to bold: the plans
    most likely to pass come first, so a failure costs only the bolder ones. A certificate after a failure does not
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

    def upper(self, alpha: float) -> float:
        return self.value + self._reach(alpha, self.skewness)

    def lower(self, alpha: float) -> float:
        return self.value - self._reach(alpha, -self.skewness)

    def _reach(self, alpha: float, skewness: float) -> float:
        if self.stderr == 0:
            return 0.0
        t = float(stats.t.isf(alpha, self.degrees))
        # Only ever wider: with few clusters the estimated skewness is too noisy to narrow a bound by.
        return (t + max(skewness, 0.0) * (2 * t * t + 1) / 6) * self.stderr


def _clustered_ratio(difference: NDArray[Any], count: NDArray[Any], groups: NDArray[Any]) -> _Ratio:
    total = float(count.sum())
    value = float(difference.sum()) / total
    sizes = np.bincount(groups, weights=count)
    clusters = sizes.size
    residual = np.bincount(groups, weights=difference - value * count)
    # Rounding leaves residuals of about one ulp of the sums; they are no evidence of spread.
    noise = 8 * np.finfo(float).eps * (np.bincount(groups, weights=np.abs(difference)) + abs(value) * sizes)
    residual[np.abs(residual) <= noise] = 0.0
    pseudo = residual / (total - sizes) * math.sqrt((clusters - 1) / clusters)
    variance = float(np.sum(pseudo**2))
    share = sizes / total
    weight = (clusters - 1) / clusters * (share / (1 - share)) ** 2
    degrees = min(_satterthwaite(weight, share, spread) for spread in (np.ones(clusters), 1 / sizes))
    skewness = float(np.sum(pseudo**3)) / variance**1.5 if variance > 0 else 0.0
    return _Ratio(value=value, stderr=math.sqrt(variance), degrees=degrees, skewness=skewness)


def _satterthwaite(weight: NDArray[Any], share: NDArray[Any], spread: NDArray[Any]) -> float:
    """2 E^2 / Var of sum_c weight_c (y_c - sum_k share_k y_k)^2 for independent normal y_c with variances `spread`;
    O(m).
    """
    load = share * spread
    common = float(np.sum(share * load))
    own = spread + common - 2 * load
    k0, k1, k2 = float(weight.sum()), float(np.sum(weight * load)), float(np.sum(weight * load**2))
    everywhere = common**2 * k0**2 + 2 * k2 * k0 - 4 * common * k1 * k0 + 2 * k1**2
    diagonal = float(np.sum(weight**2 * (own**2 - (common - 2 * load) ** 2)))
    return float(np.sum(weight * own)) ** 2 / (everywhere + diagonal)


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
        z = float(stats.t.isf(alpha, ratio.degrees) + stats.norm.ppf(_POWER))
        needed = max(math.ceil(items * (z * ratio.stderr / (max_drop - ratio.value)) ** 2), items + 1)
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


def _design_effect(groups: NDArray[Any], stderr: float, independent_variance: float) -> float:
    """How many clustered items carry as much as one independent item: the larger of what is observed, stderr^2 over
    the variance for independent items, and 1 + 0.1 (mean cluster size seen by an item - 1).

    The second is needed because few disagreements show no correlation even where there is one. 0.1 is an assumption:
    at a correlation of 0.1 between items of a cluster, simulated acceptance of a drop equal to the budget stays below
    5 %; at 0.3 and with losses but no gains at all it was up to 10 %.
    """
    sizes = np.bincount(groups)
    seen = float(np.sum(sizes.astype(float) ** 2) / sizes.sum())
    observed = stderr**2 / independent_variance if independent_variance > 0 else 1.0
    return max(1.0, observed, 1 + _ASSUMED_CORRELATION * (seen - 1))


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
    """Maximum likelihood estimate of P(only compressed right) given the drop (Tango 1998, the root of a quadratic)."""
    linear = (2 * items - b + c) * drop - b - c
    root = np.sqrt(np.maximum(linear**2 + 8 * items * c * drop * (1 - drop), 0.0))
    return np.clip((root - linear) / (4 * items), max(0.0, -drop), (1 - drop) / 2)


def _p_value(n01: int, n10: int, items: int, drop: float) -> float:
    """Exact p-value of H0: true drop >= `drop`, by the score ordering, maximised over the nuisance parameter."""
    half = _NUISANCE_MISS / 2
    low = float(stats.beta.ppf(half, n10, items - n10 + 1)) if n10 else 0.0
    high = float(stats.beta.isf(half, n10 + 1, items - n10)) if n10 < items else 1.0
    low, high = max(low, 0.0, -drop), min(high, (1 - drop) / 2)
    if low > high:
        return _NUISANCE_MISS
    # Even steps in arcsin(sqrt(q)) are even in standard errors, so the grid misses no peak at either end.
    gains = np.sin(np.linspace(math.asin(math.sqrt(low)), math.asin(math.sqrt(high)), _NUISANCE_POINTS))[:, None] ** 2
    first, last = stats.binom.ppf(_TAIL, items, low), stats.binom.isf(_TAIL, items, high)
    c = np.arange(max(0, int(first)), min(items, int(last)) + 1)
    reach = _last_as_extreme(float(_score(np.array(n01), np.array(n10), items, drop)[0]), c, items, drop)
    losses = np.clip((gains + drop) / (1 - gains), 0.0, 1.0)
    inside = np.where(reach >= 0, special.bdtr(np.maximum(reach, 0).astype(float), items - c, losses), 0.0)
    p = np.sum(stats.binom.pmf(c, items, gains) * inside, axis=1).max()
    return min(1.0, float(p) + _NUISANCE_MISS + 2 * _TAIL)


def _last_as_extreme(score: float, c: NDArray[Any], items: int, drop: float) -> NDArray[Any]:
    """For every n10 = c the largest n01 whose score is <= `score`, -1 if none; the score rises with n01."""
    low, high = np.full(c.shape, -1), items - c
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = _score(middle, c, items, drop) <= score + 1e-9
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _exact_upper(n01: int, n10: int, items: int, max_drop: float, alpha: float) -> float:
    """Upper bound of the drop by inverting `_p_value`; <= max_drop exactly when the test at max_drop rejects."""
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
            f"{name} must hold booleans or 0/1, one per item; for scores that are not 0/1 use certify_loss"
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
        labels = clusters.tolist() if isinstance(clusters, np.ndarray) else list(cast(Sequence[Any], clusters))
        if len(labels) != items:
            raise ValueError(f"clusters has {len(labels)} entries for {items} items; pass one document id per item")
        numbers: dict[Any, int] = {}
        try:
            groups = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=int)
        except TypeError as error:
            raise ValueError("clusters must hold one hashable document id (number or text) per item") from error
    found = int(groups.max()) + 1 if groups.size else 0
    if found < 2:
        what = "items" if clusters is None else "clusters"
        raise ValueError(
            f"{found} {what}: a bound needs at least 2 independent {what} (20 or more to be of use); "
            "add documents, or pass finer cluster ids"
        )
    return groups


def _check_limits(max_drop: float, confidence: float) -> None:
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop={max_drop!r}: expected a finite number >= 0")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: expected a number in (0.5, 1), such as 0.95")
