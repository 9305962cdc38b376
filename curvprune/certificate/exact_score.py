"""The exact test of paired proportions: outcomes in the order of Tango's score statistic, the
p-value maximised over what is not known.

Of ``items``, ``n01`` are right for the baseline only and ``n10`` for the compressed model only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

# Berger and Boos: the p-value is maximised over a confidence interval for the nuisance parameter
# that misses it with this probability, which is then added to the p-value.
_NUISANCE_MISS = 1e-4
_NUISANCE_POINTS = 64
_TAIL = 1e-10


def nuisance_miss(alpha: float) -> float:
    """How often the interval of the nuisance parameter may miss it at this level: little beside
    it."""
    return min(_NUISANCE_MISS, alpha / 500)


def exact_p_value(
    n01: int, n10: int, items: int, drop: float, miss: float = _NUISANCE_MISS
) -> float:
    """Exact p-value of the hypothesis that accuracy truly falls by ``drop`` or more.

    The probability of outcomes whose score is at most the observed one, at the worst probability
    that only the compressed model is right. Cost: milliseconds at hundreds of items.

    Args:
        miss: see `nuisance_miss`; it is part of the p-value.

    Source: Tango (1998, Statistics in Medicine 17); Berger and Boos (1994, JASA 89).
    """
    # 1. An interval for the nuisance parameter, P(only the compressed model is right).
    half = miss / 2
    low = float(stats.beta.ppf(half, n10, items - n10 + 1)) if n10 else 0.0
    high = float(stats.beta.isf(half, n10 + 1, items - n10)) if n10 < items else 1.0
    low, high = max(low, 0.0, -drop), min(high, (1 - drop) / 2)
    if low > high:
        return miss
    # Even steps in arcsin(sqrt(q)) are even in standard errors, so the grid misses no peak at
    # either end.
    angles = math.asin(math.sqrt(low)), math.asin(math.sqrt(high))
    gains = np.sin(np.linspace(*angles, _NUISANCE_POINTS)[:, None]) ** 2

    # 2. The outcomes as extreme as the observed one: for every n10 = c the largest n01.
    tail = _TAIL * miss / _NUISANCE_MISS
    first, last = stats.binom.ppf(tail, items, low), stats.binom.isf(tail, items, high)
    c = np.arange(max(0, int(first)), min(items, int(last)) + 1)
    observed = float(score_statistic(np.array(n01), np.array(n10), items, drop)[0])
    reach = _last_as_extreme(observed, c, items, drop)

    # 3. Their probability at every point of the interval; the largest counts.
    losses = np.clip((gains + drop) / (1 - gains), 0.0, 1.0)
    within = special.bdtr(np.maximum(reach, 0).astype(float), items - c, losses)
    inside = np.where(reach >= 0, within, 0.0)
    p = np.sum(stats.binom.pmf(c, items, gains) * inside, axis=1).max()
    return min(1.0, float(p) + miss + 2 * tail)


def exact_upper(n01: int, n10: int, items: int, max_drop: float, alpha: float) -> float:
    """Upper bound of the drop by inverting `exact_p_value`.

    It is <= ``max_drop`` exactly when the test at ``max_drop`` rejects.
    """
    drop, miss = (n01 - n10) / items, nuisance_miss(alpha)
    # 1. On which side of ``max_drop`` the bound lies.
    if drop < max_drop and exact_p_value(n01, n10, items, max_drop, miss) <= alpha:
        low, high = drop, max_drop
    else:
        low, high = max(drop, max_drop), 1.0
    # 2. Halve that side until it is known to 1e-7.
    for _ in range(40):
        middle = (low + high) / 2
        if high - low <= 1e-7:
            break
        if exact_p_value(n01, n10, items, middle, miss) <= alpha:
            high = middle
        else:
            low = middle
    return high


def score_statistic(
    n01: NDArray[np.int_] | NDArray[np.float64],
    n10: NDArray[np.int_] | NDArray[np.float64],
    items: int,
    drop: float,
) -> NDArray[np.float64]:
    """Tango's score statistic for H0: P(only baseline right) - P(only compressed right) = drop."""
    b, c = np.atleast_1d(n01).astype(float), np.atleast_1d(n10).astype(float)
    gains = restricted_gains(b, c, items, drop)
    variance = items * (2 * gains + drop * (1 - drop))
    excess = b - c - items * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(excess == 0, 0.0, excess / np.sqrt(variance))


def restricted_gains(
    b: NDArray[np.float64], c: NDArray[np.float64], items: int, drop: float
) -> NDArray[np.float64]:
    """Maximum likelihood estimate of P(only compressed right), given the drop.

    Tango 1998: the root of a quadratic. ``b`` and ``c`` are n01 and n10.
    """
    linear = (2 * items - b + c) * drop - b - c
    root = np.sqrt(np.maximum(linear**2 + 8 * items * c * drop * (1 - drop), 0.0))
    return np.clip((root - linear) / (4 * items), max(0.0, -drop), (1 - drop) / 2)


def _last_as_extreme(
    score: float, c: NDArray[np.int_], items: int, drop: float
) -> NDArray[np.int_]:
    """For every n10 = c the largest n01 whose score is <= ``score``, -1 if none.

    The score rises with n01, so that halving finds it.
    """
    low, high = np.full(c.shape, -1), items - c
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = score_statistic(middle, c, items, drop) <= score + 1e-9
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low
