"""Standard errors over documents: of ratios by the jackknife, of quantiles by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curvprune.schema import Number

Floats = NDArray[np.float64]
RESAMPLES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure and its standard error over documents; NaN where there is one document only."""

    value: Number
    stderr: Number


def ratio_of(
    total: Floats, count: Floats, then: Callable[[Floats], Floats] | None = None
) -> Estimate:
    """``then(sum(total) / sum(count))`` over documents, and its error.

    The variance is the jackknife's, (m - 1)/m sum_c (f_(-c) - f)^2, where f_(-c) is the figure
    without document c: for a ratio the standard error of `certify_loss`.

    Args:
        total, count: of every document, ``(documents,)``.
        then: a function of the ratio, such as exp for a perplexity.
    """
    function = then if then is not None else _same
    return function_of([total, count], lambda sums: function(sums[0] / sums[1]))


def function_of(totals: Sequence[Floats], function: Callable[[list[Floats]], Floats]) -> Estimate:
    """A function of several sums over documents, with the jackknife's error.

    Args:
        totals: arrays ``(documents,)``.
        function: from arrays ``(n,)`` of sums to an array ``(n,)``.
    """
    # 1. With all documents, then without each.
    documents = len(totals[0])
    whole, without = [], []
    for total in totals:
        whole.append(total.sum(keepdims=True))
        without.append(total.sum() - total)
    with np.errstate(all="ignore"):
        value = float(function(whole)[0])
        if documents < 2:
            return Estimate(value=value, stderr=math.nan)
        # 2. A document without which nothing counts leaves no figure, and no error.
        apart = function(without) - value
        variance = (documents - 1) / documents * float(np.sum(apart**2))
    return Estimate(value=value, stderr=math.sqrt(variance) if variance >= 0 else math.nan)


def _same(ratio: Floats) -> Floats:
    return ratio


def quantiles_of(
    values: NDArray[np.float32],
    owner: NDArray[np.int32],
    levels: Sequence[float],
    *,
    seed: int = 0,
) -> list[Estimate]:
    """Quantiles of all values, interpolated as NumPy does, and their errors: the standard deviation
    over `RESAMPLES` samples of documents, drawn with replacement.

    Args:
        values, owner: of every position its value and the number of its document, from 0.

    Cost: a sort, and a pass over the values for each resample.
    """
    # 1. Sorted once: a resample repeats values, in the same order.
    order = np.argsort(values, kind="stable")
    sorted_values, owner = values[order], owner[order]
    found = _at(sorted_values, levels)
    documents = int(owner.max()) + 1
    if documents < 2:
        return [Estimate(value=value, stderr=math.nan) for value in found]

    # 2. Documents drawn with replacement, each with all of its positions.
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        times = rng.multinomial(documents, np.full(documents, 1 / documents))
        drawn.append(_at(np.repeat(sorted_values, times[owner]), levels))
    with np.errstate(invalid="ignore"):
        errors = np.std(drawn, axis=0, ddof=1)
    return [
        Estimate(value=value, stderr=float(error))
        for value, error in zip(found, errors, strict=True)
    ]


def _at(sorted_values: NDArray[np.float32], levels: Sequence[float]) -> list[float]:
    """Quantiles of sorted values: linear between neighbours."""
    last = len(sorted_values) - 1
    found = []
    for level in levels:
        place = level * last
        below, above = math.floor(place), math.ceil(place)
        low, high = float(sorted_values[below]), float(sorted_values[above])
        # Where both are infinite, their difference is no number.
        found.append(low if low == high else low + (place - below) * (high - low))
    return found
