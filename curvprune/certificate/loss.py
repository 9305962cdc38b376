"""Is the rise of a mean loss within the budget? The paired test of losses, which have no bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curvprune.certificate.arguments import (
    check_limits,
    check_same_length,
    column,
    numbered_clusters,
)
from curvprune.certificate.clusters import Ratio, clustered_ratio, doubts, planned_drop
from curvprune.certificate.repeated import same_results
from curvprune.certificate.unseen import (
    fewest_clusters,
    fewest_without_spread,
    no_spread_text,
    too_few_text,
    unseen_share,
    unseen_text,
)
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, VIOLATED, Verdict
from curvprune.model import joined


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
    """Is the rise of the mean loss at most ``max_drop``?

    The drop is the ratio d = sum(compressed - baseline) / sum(count). Its variance is the
    leave-one-cluster-out jackknife around d, (m - 1)/m sum_c (r_c / (N - N_c))^2 (the CR3 form).
    There r_c = sum_{i in c} (diff_i - d count_i), N_c are the tokens of cluster c, and N all of
    them.

    The reference is Student's t with Satterthwaite's degrees of freedom for this quadratic form
    (Bell and McCaffrey 2002). They are the smaller of those for equal cluster variances and for
    variances proportional to 1/N_c.

    Where the clusters are skewed towards large losses a t bound is too low. The bound is then
    d + se (t + kappa (2 t^2 + 1)/6) (Johnson 1978, JASA 73), where kappa is positive.
    kappa = sum u^3 + 8 (max u^3 + min u^3), u_c the terms of the jackknife over se. Large losses
    are rarer in a sample than in its population, so the most extreme clusters on either side count
    more often than they were seen.

    With equal clusters and no skew all this is the paired t test. The usual cluster-robust t with
    m - 1 degrees of freedom accepts a true drop equal to the budget in up to 15 % of the runs at
    nominal 5 %, when a few long documents dominate.

    No test of an unbounded loss holds its level for every distribution (Bahadur and Savage 1956): a
    loss that hits a share s of clusters is in none of m with probability (1 - s)^m, so nothing is
    known of shares below 1 - alpha^(1/m), the verdict's ``unseen``. The convention: a cluster in
    that share loses at most as much as the one that lost most, so the bound is at least d + unseen
    * m max_c r_c / N. Where most clusters differ by the very same there is no such scale: nothing
    is certified below the clusters that show a loss in 5 % of them (59 at 95 %); the bound is
    infinite if all differ by the same. Nothing at all is decided below those that show a loss in
    half of them (5 at 95 %, 20 at 99.9999 %), which a sign test needs too. ``note`` says so, and
    where the sample itself gives reason for doubt. A bounded score (`certify_values` with
    ``bounds``) has no such gap.

    Items with the same three numbers to the last digit, none of them round, are taken for one item
    that is there several times: one cluster.

    ``needed``: the items at which t se + z_power se + the skewness term, which falls with the
    square, reach max_drop - d, at the observed items per cluster. Twice the largest loss's share
    of the variance is added to it.

    Args:
        baseline_sum, compressed_sum: summed loss of every item under both models, ``(items,)``.
        count: tokens (or examples) in every item, > 0, ``(items,)``.
        clusters: the document that each item comes from; None when the items are independent.

    Raises:
        ValueError: mismatched lengths, values that are no finite numbers, counts <= 0, fewer than
            two clusters.
    """
    # 1. Check what was passed.
    base = column(baseline_sum, "baseline_sum")
    comp = column(compressed_sum, "compressed_sum")
    tokens = column(count, "count")
    check_same_length(baseline_sum=base, compressed_sum=comp, count=tokens)
    max_drop, confidence = check_limits(max_drop, confidence)
    bad = np.flatnonzero(tokens <= 0)
    if bad.size:
        raise ValueError(
            f"count must be > 0: items {bad[:5].tolist()} have none ({bad.size} in all); "
            "leave items without counted tokens out"
        )
    alpha = 1 - confidence
    found = _clusters(base, comp, tokens, clusters)

    # 2. The drop with its standard error, and its bound.
    ratio = clustered_ratio(comp - base, tokens, found.numbers)
    number, what = found.independent, found.what
    few, alike = too_few_text(number, what, alpha), ""
    if not ratio.spread:
        alike = no_spread_text(number, what, alpha)
    bound = ratio.upper(alpha)
    if alike and ratio.stderr == 0:
        bound = math.inf

    # 3. The verdict.
    status = INCONCLUSIVE if few else _status(ratio, max_drop, alpha)
    if alike and status == CERTIFIED:
        status = INCONCLUSIVE
    needed, doubt = None, few
    if status == INCONCLUSIVE:
        doubt = few or alike
        fewest = fewest_without_spread(alpha) if alike else fewest_clusters(alpha)
        needed = _needed(ratio, base.size, max_drop, alpha, fewest / number)
    notes = [doubt, found.note]
    if not doubt:
        notes = [doubts(ratio, number, what), unseen_text(number, what, alpha), found.note]
    return Verdict(
        status=status,
        metric="loss",
        measure=measure,
        baseline=float(base.sum() / tokens.sum()),
        compressed=float(comp.sum() / tokens.sum()),
        drop=ratio.value,
        stderr=ratio.stderr,
        bound=bound,
        max_drop=max_drop,
        confidence=confidence,
        items=base.size,
        clusters=None if what == "items" else number,
        needed=needed,
        method="paired ratio, jackknife over clusters, skewness-adjusted t bound",
        note="; ".join(filter(None, notes)),
        unseen=unseen_share(number, alpha),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clusters:
    """The number of every item's cluster; how many are independent; what they are called; and what
    to say of items that are there several times."""

    numbers: NDArray[np.int_]
    independent: int
    what: str
    note: str


def _clusters(
    base: NDArray[np.float64],
    comp: NDArray[np.float64],
    tokens: NDArray[np.float64],
    clusters: ArrayLike | None,
) -> _Clusters:
    numbers = numbered_clusters(clusters, base.size)
    what = "items" if clusters is None else "clusters"
    labels = same_results(base / tokens, comp / tokens, tokens)
    if labels is None:
        return _Clusters(numbers=numbers, independent=int(numbers.max()) + 1, what=what, note="")
    # 1. What was passed as independent may be the same item.
    merged = joined(numbers.tolist(), labels)
    independent = int(merged.max()) + 1
    if independent == int(numbers.max()) + 1:
        return _Clusters(numbers=numbers, independent=independent, what=what, note="")
    note = (
        f"{base.size - len(set(labels))} of the {base.size} items have the very results of others "
        f"and count as the same: {independent} clusters"
    )
    # 2. One cluster has no standard error; how few there are is judged by their number.
    if independent < 2:
        merged = numbers
    return _Clusters(numbers=merged, independent=independent, what="clusters", note=note)


def _status(ratio: Ratio, max_drop: float, alpha: float) -> str:
    if ratio.upper(alpha) <= max_drop:
        return CERTIFIED
    return VIOLATED if ratio.lower(alpha) > max_drop else INCONCLUSIVE


def _needed(ratio: Ratio, items: int, max_drop: float, alpha: float, fewest: float) -> int | None:
    """Items that would decide, at least ``fewest`` times those at hand; None where the drop is the
    budget itself, which none decide."""
    # At the budget itself the margin is 0.
    if ratio.value == max_drop:
        return None
    margin = max_drop - planned_drop(ratio.value, max_drop)
    wanted = max(ratio.growth(margin, alpha), fewest)
    return max(math.ceil(items * wanted), items + 1)
