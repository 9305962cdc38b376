"""Checks of what the tests are given: results of items, documents, limits."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray


def column(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """One finite number per item, as floats."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one number per item: (items,)")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name} is not finite at items {bad[:5].tolist()} ({bad.size} in all); "
            "a model that returns NaN or inf cannot be certified"
        )
    return array


def zero_one(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    """Whether each item was right."""
    array = column(values, name)
    if np.any((array != 0) & (array != 1)):
        raise ValueError(
            f"{name} must hold booleans or 0/1, one per item; for scores that are not 0/1 use "
            "certify_values"
        )
    return array.astype(bool)


def check_same_length(**arrays: NDArray[np.float64] | NDArray[np.bool_]) -> None:
    lengths = {name: array.size for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"results must be paired item by item, but the lengths differ: {lengths}")


def check_limits(max_drop: float, confidence: float) -> None:
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ValueError(f"max_drop={max_drop!r}: expected a finite number >= 0")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: expected a number in (0.5, 1), such as 0.95")


def numbered_clusters(clusters: ArrayLike | None, items: int) -> NDArray[np.int_]:
    """For every item the number of its cluster, counted from 0 as they first appear.

    Without clusters every item is one of its own.
    """
    numbers = np.arange(items) if clusters is None else _numbered(clusters, items)
    found = int(numbers.max()) + 1 if numbers.size else 0
    if found < 2:
        what = "items" if clusters is None else "clusters"
        raise ValueError(
            f"{found} {what}: a bound needs at least 2 independent {what} (20 or more to be of "
            "use); add documents, or pass finer cluster ids"
        )
    return numbers


def _numbered(clusters: ArrayLike, items: int) -> NDArray[np.int_]:
    if isinstance(clusters, np.ndarray):
        labels = clusters.tolist()
    else:
        labels = list(cast(Sequence[Hashable], clusters))
    if len(labels) != items:
        raise ValueError(
            f"clusters has {len(labels)} entries for {items} items; pass one document id per item"
        )
    numbers: dict[Hashable, int] = {}
    try:
        found = [numbers.setdefault(label, len(numbers)) for label in labels]
    except TypeError as error:
        raise ValueError(
            "clusters must hold one hashable document id (number or text) per item"
        ) from error
    return np.array(found, dtype=int)
