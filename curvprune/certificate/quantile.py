"""Is a quantile of a score within the budget? Order statistics, which hold for every
distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from curvprune.certificate.arguments import check_limits, column
from curvprune.certificate.verdict import CERTIFIED, INCONCLUSIVE, POWER, VIOLATED, Verdict

_METHOD = "order statistics, binomial bound of a quantile over documents"


def documents_needed(quantile: float, confidence: float = 0.95) -> int:
    """The fewest independent documents with which a quantile can be bounded from above: all of N
    lie below it with probability ``quantile``^N, which must be at most ``1 - confidence``.

    >>> documents_needed(0.99), documents_needed(0.5)
    (299, 5)
    """
    return max(1, math.ceil(math.log(1 - confidence) / math.log(quantile) - 1e-9))


def upper_rank(documents: int, quantile: float, confidence: float) -> int | None:
    """Which of the sorted values, counted from 1, is an upper bound of the quantile; None if there
    are too few.

    The smallest r with P(Binomial(N, q) <= r - 1) >= confidence: the quantile lies above the r-th
    smallest value only if r or more of N values lie below the quantile.
    """
    rank = int(stats.binom.ppf(confidence, documents, quantile)) + 1
    return rank if rank <= documents else None


def certify_quantile(
    values: ArrayLike,
    *,
    quantile: float,
    max_drop: float,
    confidence: float = 0.95,
    metric: str = "value",
    measure: str = "",
) -> Verdict:
    """Is the ``quantile`` of a score at most ``max_drop``?

    With N independent documents, of which K exceed ``max_drop``, this is CERTIFIED iff
    P(Binomial(N, 1 - quantile) <= K) <= 1 - confidence, and VIOLATED iff
    P(Binomial(N, 1 - quantile) >= K) <= 1 - confidence. Both hold for every distribution. The bound
    is an order statistic (David and Nagaraja 2003, Order Statistics, section 7.1), infinite where
    there are too few documents for any; ``needed`` says how many it takes. Cost: a sort.

    Args:
        values: a number for every independent document, lower is better, ``(documents,)``.
        quantile: between 0 and 1, such as 0.99.

    Raises:
        ValueError: no values, values that are not finite, a quantile that is none.
    """
    # 1. Check what was passed.
    found = np.sort(column(values, "values"))
    check_limits(max_drop, confidence)
    _check_quantile(quantile)
    documents, alpha = found.size, 1 - confidence
    if documents == 0:
        raise ValueError("no documents: pass at least one value")

    # 2. How many exceed the budget, and whether that is few or many enough.
    exceeding = int(np.sum(found > max_drop))
    rank = upper_rank(documents, quantile, confidence)
    bound = math.inf if rank is None else float(found[rank - 1])
    status = INCONCLUSIVE
    if bound <= max_drop:
        status = CERTIFIED
    elif stats.binom.sf(exceeding - 1, documents, 1 - quantile) <= alpha:
        status = VIOLATED

    # 3. The quantile itself, and half the distance of its neighbours one standard error away.
    value = float(found[_place(documents, quantile)])
    spread = math.sqrt(quantile * (1 - quantile) / documents)
    low, high = _place(documents, quantile - spread), _place(documents, quantile + spread)
    needed = None
    if status == INCONCLUSIVE:
        needed = _needed(exceeding, documents, quantile, alpha)
    return Verdict(
        status=status,
        metric=metric,
        measure=measure,
        baseline=0.0,
        compressed=value,
        drop=value,
        stderr=float(found[high] - found[low]) / 2 if high > low else math.nan,
        bound=bound,
        max_drop=float(max_drop),
        confidence=float(confidence),
        items=documents,
        clusters=None,
        needed=needed,
        method=_METHOD,
        note=_note(documents, quantile, confidence),
    )


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile!r}: expected a number in (0, 1), such as 0.99")


def _note(documents: int, quantile: float, confidence: float) -> str:
    least = documents_needed(quantile, confidence)
    if documents >= least:
        return ""
    return (
        f"{documents} documents bound no {quantile:g} quantile at {confidence:g} confidence: it "
        f"takes {least}, even if none exceeds the budget"
    )


def _place(documents: int, quantile: float) -> int:
    """Where the quantile of a sample stands, from 0."""
    return min(documents, max(1, math.ceil(documents * quantile - 1e-9))) - 1


def _needed(exceeding: int, documents: int, quantile: float, alpha: float) -> int | None:
    """Documents that decide with 80 % power, if the share that exceeds the budget stays."""
    allowed, share = 1 - quantile, exceeding / documents
    if share == allowed:
        return None
    z, z_power = stats.norm.isf(alpha), stats.norm.ppf(POWER)
    reach = z * math.sqrt(allowed * quantile) + z_power * math.sqrt(share * (1 - share))
    wanted = math.ceil((reach / (allowed - share)) ** 2)
    least = documents_needed(quantile, 1 - alpha) if share < allowed else 1
    return max(wanted, least, documents + 1)


# ---------------------------------------------------------------------------------- looking ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreseen:
    """What a few documents say of a certificate with more: the quantile, the bound that the
    certificate is expected to have, and the standard error of that expectation."""

    value: float
    bound: float
    stderr: float


def foreseen_quantile(
    values: NDArray[np.float64], *, quantile: float, confidence: float, documents: int
) -> Foreseen:
    """The quantile and the bound of `certify_quantile` with ``documents`` documents, if logarithms
    of the values are normal: a guide for choosing among plans, not a certificate.

    Few documents have no 99 % quantile of their own, so that one is had from mean and standard
    deviation of the logarithms.
    """
    # 1. Logarithms; a document without any divergence counts as a very small one.
    least = max(float(values.max()) * 1e-6, 1e-12)
    logs = np.log(np.maximum(values, least))
    mean = float(logs.mean())
    spread = float(logs.std(ddof=1)) if logs.size > 1 else 0.0

    # 2. The level at which the order statistic is expected, by Blom's formula.
    rank = upper_rank(documents, quantile, confidence) or documents
    level = (rank - 0.375) / (documents + 0.25)
    z = float(stats.norm.ppf(level))
    bound = math.exp(mean + spread * z)

    # 3. The errors of mean and deviation here, and of the order statistic there.
    here = (1 + z * z / 2) / max(1, logs.size - 1)
    there = level * (1 - level) / documents / float(stats.norm.pdf(z)) ** 2
    return Foreseen(
        value=math.exp(mean + spread * float(stats.norm.ppf(quantile))),
        bound=bound,
        stderr=bound * spread * math.sqrt(here + there),
    )
