"""Items whose results are the same to the last digit: very likely the same item twice."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

# Scores that come in steps are equal by chance: multiples of 1/q up to a hundred (shares, F1),
# three and four decimals, and losses next to 0, where floats of 32 bits are coarse.
_STEPS = (*range(1, 101), 1000, 10_000)
_NEXT_TO_ZERO = 1e-4
_COARSE = 2.0**11
_SINGLE, _DOUBLE = 1e-7, 1e-14


def same_results(
    baseline: NDArray[np.float64], compressed: NDArray[np.float64], count: NDArray[np.float64]
) -> list[Hashable] | None:
    """For every item a label that it shares with those that have the same three numbers, if neither
    of the two models' is round; ``None`` if there are no two.

    Args:
        baseline, compressed: the mean result of every item, ``(items,)``.
        count: of its positions.
    """
    # 1. The items that are not alone with their numbers stand next to each other when sorted.
    order = np.lexsort((count, compressed, baseline))
    alike = np.ones(max(order.size - 1, 0), dtype=bool)
    for column in (baseline, compressed, count):
        alike &= np.diff(column[order]) == 0
    if not alike.any():
        return None
    group = np.concatenate([[0], np.cumsum(~alike)])
    several = np.concatenate([alike, [False]]) | np.concatenate([[False], alike])

    # 2. Of those, the ones whose numbers could not be equal by chance.
    items, groups = order[several], group[several]
    told = ~_round(baseline[items]) & ~_round(compressed[items])
    if not told.any():
        return None
    labels: list[Hashable] = list(range(order.size))
    for item, number in zip(items[told].tolist(), groups[told].tolist(), strict=True):
        labels[item] = ("same", number)
    return labels


def _round(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each value is one of few, such as 0.25 or 2/3."""
    found = np.abs(values) < _NEXT_TO_ZERO
    # A type of 16 bits has few values.
    mantissa = np.frexp(values)[0] * _COARSE
    found |= mantissa == np.rint(mantissa)
    # To the last digits of the type that it was computed in.
    single = values == values.astype(np.float32)
    near = np.where(single, _SINGLE, _DOUBLE) * np.maximum(1.0, np.abs(values))
    for step in _STEPS:
        found |= np.abs(values * step - np.rint(values * step)) <= step * near
    return found
