"""Is the rise of a mean loss within the budget? The paired test of losses, which have no bound."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from curvprune.certificate.arguments import (
    check_limits,
    check_same_length,
    column,
    numbered_clusters,
)
from curvprune.certificate.clusters import Ratio, clustered_ratio, doubts, planned_drop
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, VIOLATED, Verdict


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

    No test of an unbounded loss holds its level for every distribution (Bahadur and Savage 1956):
    losses so large and rare that no sampled document has one cannot be excluded. ``note`` says
    where the sample itself gives reason for doubt. A bounded score (`certify_values` with
    ``bounds``) has no such gap.

    ``needed``: the items at which t se + z_power se + the skewness term, which falls with the
    square, reach max_drop - d, at the observed items per cluster. Twice the largest loss's share
    of the variance is added to it.

    Args:
        baseline_sum, compressed_sum: summed loss of every item under both models, ``(items,)``.
        count: tokens (or examples) in every item, > 0, ``(items,)``.
        clusters: the document that each item comes from; None when the items are independent.

    Raises:
        ValueError: mismatched lengths, non-finite values, counts <= 0, fewer than two clusters.
    """
    # 1. Check what was passed.
    base = column(baseline_sum, "baseline_sum")
    comp = column(compressed_sum, "compressed_sum")
    tokens = column(count, "count")
    check_same_length(baseline_sum=base, compressed_sum=comp, count=tokens)
    check_limits(max_drop, confidence)
    bad = np.flatnonzero(tokens <= 0)
    if bad.size:
        raise ValueError(
            f"count must be > 0: items {bad[:5].tolist()} have none ({bad.size} in all); "
            "leave items without counted tokens out"
        )
    numbers = numbered_clusters(clusters, base.size)
    number = int(numbers.max()) + 1

    # 2. The drop with its standard error, and its bound.
    ratio = clustered_ratio(comp - base, tokens, numbers)
    bound = ratio.upper(1 - confidence)

    # 3. The verdict.
    status = _status(ratio, max_drop, 1 - confidence)
    needed = None
    if status == INCONCLUSIVE:
        needed = _needed(ratio, base.size, max_drop, 1 - confidence)
    return Verdict(
        status=status,
        metric="loss",
        measure=measure,
        baseline=float(base.sum() / tokens.sum()),
        compressed=float(comp.sum() / tokens.sum()),
        drop=ratio.value,
        stderr=ratio.stderr,
        bound=bound,
        max_drop=float(max_drop),
        confidence=float(confidence),
        items=base.size,
        clusters=None if clusters is None else number,
        needed=needed,
        method="paired ratio, jackknife over clusters, skewness-adjusted t bound",
        note=doubts(ratio, number, "items" if clusters is None else "clusters"),
    )


def _status(ratio: Ratio, max_drop: float, alpha: float) -> str:
    if ratio.upper(alpha) <= max_drop:
        return CERTIFIED
    return VIOLATED if ratio.lower(alpha) > max_drop else INCONCLUSIVE


def _needed(ratio: Ratio, items: int, max_drop: float, alpha: float) -> int | None:
    """Items that would decide; None where the drop is the budget itself, which none decide."""
    # At the budget itself the margin is 0.
    if ratio.value == max_drop:
        return None
    margin = max_drop - planned_drop(ratio.value, max_drop)
    return max(math.ceil(items * ratio.growth(margin, alpha)), items + 1)
