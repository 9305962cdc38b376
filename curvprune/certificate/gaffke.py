"""Gaffke's bound of the mean of a score whose range is known, by a saddlepoint approximation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats


def gaffke_upper(
    difference: NDArray[np.float64], top: float, alpha: float, inflation: float
) -> float:
    """Upper bound of the mean: the m between the mean difference and ``top`` with
    `gaffke_probability` = ``alpha``.

    Args:
        difference: paired differences, ``(items,)``, at most ``top``.
        inflation: how many items carry as much as one independent item.
    """
    values, counts = np.unique(difference / top, return_counts=True)
    # Beside what was seen, one more item at the largest possible value.
    values, weights = np.append(values, 1.0), np.append(counts / inflation, 1.0)
    low = float(np.average(values, weights=weights))
    if low >= 1:
        return top
    root = optimize.brentq(
        lambda mean: gaffke_probability(values, weights, mean) - alpha, low, 1 - 1e-12, xtol=1e-9
    )
    return top * float(root)


def gaffke_probability(
    values: NDArray[np.float64], weights: NDArray[np.float64], mean: float
) -> float:
    """P(sum_i G_i (values_i - mean) > 0) for independent gamma variables G_i with shapes
    ``weights``.

    By Lugannani and Rice's formula in Barndorff-Nielsen's form. The tilting s solves K'(s) = 0,
    K(s) = -sum w log(1 - s y).
    """
    y = values - mean
    if y.max() <= 0:
        return 0.0
    if y.min() >= 0:
        return 1.0

    # 1. The saddlepoint, between the poles of K.
    ends = (1 - 1e-12) / y.min(), (1 - 1e-12) / y.max()
    tilting = optimize.brentq(
        lambda s: float(np.sum(weights * y / (1 - s * y))), *ends, xtol=1e-14, rtol=1e-12
    )
    s = float(tilting)
    # 2. The two quantities that the formula is in: K and its curvature, there.
    w = math.copysign(math.sqrt(max(2 * float(np.sum(weights * np.log1p(-s * y))), 0.0)), s)
    if abs(w) < 1e-3:  # the formula is 0/0 where the mean is the middle
        return 0.5
    u = s * math.sqrt(float(np.sum(weights * (y / (1 - s * y)) ** 2)))
    # 3. The tail probability.
    return float(stats.norm.sf(w + math.log(u / w) / w))
