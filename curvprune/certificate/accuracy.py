"""Is the fall of accuracy within the budget? The paired test of answers that are right or wrong."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from curvprune.certificate.arguments import check_limits, check_same_length, zero_one
from curvprune.certificate.clusters import Evidence, evidence_of, planned_drop
from curvprune.certificate.exact_score import exact_p_value, exact_upper, nuisance_miss
from curvprune.certificate.power import score_items
from curvprune.certificate.unseen import fewest_clusters
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, VIOLATED, Verdict

_INDEPENDENT = "paired, exact unconditional score test"
_CLUSTERED = (
    "paired, jackknife t bound over clusters and exact score test at the effective number of items"
)


def certify_accuracy(
    baseline_correct: ArrayLike,
    compressed_correct: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    copies: ArrayLike | None = None,
    max_drop: float,
    confidence: float = 0.95,
) -> Verdict:
    """Is the fall of accuracy at most ``max_drop`` (a fraction: 0.01 is one percentage point)?

    With n01 items that only the baseline answers and n10 that only the compressed model answers,
    drop = (n01 - n10) / N and stderr = sqrt((rho - drop^2) / N), rho = (n01 + n10)/N.

    Independent items (``clusters`` None): exact unconditional test that orders the outcomes by
    Tango's score statistic (1998, Statistics in Medicine 17). It maximises the p-value over the
    nuisance parameter P(only the compressed model is right) inside its 99.99 % interval (Berger and
    Boos 1994, JASA 89; for paired proportions Hsueh, Liu and Chen 2001, Biometrics 57). The plain
    score test accepts a drop equal to the budget in up to 7 % of the runs at nominal 5 % when few
    items disagree, this one never in more than 5 %. Cost: below a second at any N.

    Given ``clusters`` (subjects, documents) there are two bounds, and the one further from the drop
    counts: that of `certify_loss` on the paired differences, and the exact one with the number of
    items divided by the largest plausible design effect (see `plausible_design_effect`).

    ``needed``: `items_needed_for_accuracy` at the observed disagreement, times the design effect.

    Args:
        baseline_correct, compressed_correct: booleans or 0/1, ``(items,)``.
        clusters: the document that each item comes from; None when the items are independent.
        copies: a number that items share which are the same item. Copies are one cluster, and say
            no more than one of them.

    Clusters too few for the confidence (see `certify_loss`) decide nothing.

    Raises:
        ValueError: mismatched lengths, values other than 0/1, no items, fewer than two clusters.
    """
    # 1. Check what was passed.
    base = zero_one(baseline_correct, "baseline_correct")
    comp = zero_one(compressed_correct, "compressed_correct")
    check_same_length(baseline_correct=base, compressed_correct=comp)
    max_drop, confidence = check_limits(max_drop, confidence)
    if max_drop >= 1:
        raise ValueError(
            f"max_drop={max_drop:g}: accuracy drops are fractions below 1; write 0.01 for one "
            "percentage point"
        )
    items, alpha = base.size, 1 - confidence
    if items == 0:
        raise ValueError("no items: pass at least one result per model")

    # 2. Count the items on which one model is right and the other wrong.
    n01, n10 = int(np.sum(base & ~comp)), int(np.sum(~base & comp))
    drop, rho = (n01 - n10) / items, (n01 + n10) / items

    # 3. How much these items tell: fewer independent ones, where they come in clusters.
    variance = max(rho - drop**2, 0.0)
    difference = base.astype(float) - comp.astype(float)
    evidence = evidence_of(difference, clusters, variance=variance, alpha=alpha, copies=copies)
    counts = (n01, n10, items)
    if evidence.clusters is not None:
        counts = _effective_counts(n01, n10, items, evidence.inflation)

    # 4. The bound and the verdict.
    bound = max(evidence.upper, exact_upper(*counts, max_drop, alpha))
    status = _status(counts, drop, bound, evidence, max_drop, alpha)
    needed = None
    if status == INCONCLUSIVE and drop != max_drop:
        needed = _needed(drop, rho, items, evidence, max_drop, alpha)
    return Verdict(
        status=status,
        metric="accuracy",
        measure="fraction",
        baseline=float(base.mean()),
        compressed=float(comp.mean()),
        drop=drop,
        stderr=evidence.stderr,
        bound=float(bound),
        max_drop=max_drop,
        confidence=confidence,
        items=items,
        clusters=evidence.clusters,
        needed=needed,
        method=_INDEPENDENT if evidence.clusters is None else _CLUSTERED,
        note=evidence.note,
    )


def _effective_counts(n01: int, n10: int, items: int, inflation: float) -> tuple[int, int, int]:
    """Counts at the effective number of items, rounded against the compressed model."""
    effective = max(1, math.floor(items / inflation))
    losses = min(effective, math.ceil(n01 / inflation))
    gains = min(effective - losses, math.floor(n10 / inflation))
    return losses, gains, effective


def _status(
    counts: tuple[int, int, int],
    drop: float,
    bound: float,
    evidence: Evidence,
    max_drop: float,
    alpha: float,
) -> str:
    if evidence.few:
        return INCONCLUSIVE
    if bound <= max_drop:
        return CERTIFIED
    if evidence.lower > max_drop and drop > max_drop:
        # A violation is the same test with the two models exchanged.
        losses, gains, items = counts
        if exact_p_value(gains, losses, items, -max_drop, nuisance_miss(alpha)) <= alpha:
            return VIOLATED
    return INCONCLUSIVE


def _needed(
    drop: float, rho: float, items: int, evidence: Evidence, max_drop: float, alpha: float
) -> int:
    """Items that would decide with 80 % power, if drop and disagreement stay as observed."""
    planned = planned_drop(drop, max_drop)
    if drop < max_drop:
        wanted = score_items(max(rho, abs(planned)), planned, max_drop, alpha)
    else:
        wanted = score_items(rho, -drop, -max_drop, alpha)
    wanted = evidence.inflation * wanted
    if evidence.ratio is not None:
        # What clusters really cost is in the standard error; the design effect covers what few
        # losses cannot show.
        wanted = max(wanted, items * evidence.ratio.growth(max_drop - planned, alpha))
        wanted = max(wanted, items * fewest_clusters(alpha) / evidence.ratio.clusters)
    return max(math.ceil(wanted), items + 1)
