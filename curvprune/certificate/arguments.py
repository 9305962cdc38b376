"""Checks of what the tests are given: results of items, documents, limits."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from numbers import Real
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


def column(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """One finite number per item, as floats."""
    array = _floats(values, name)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one number per item: (items,)")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name} is not finite at items {bad[:5].tolist()} ({bad.size} in all); "
            "a model that returns NaN or inf cannot be certified"
        )
    return array


def _floats(values: object, name: str) -> NDArray[np.float64]:
    # A tensor may lie elsewhere, want gradients, or have a type that NumPy does not know.
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double() if not values.is_complex() else values.tolist()
    expected = "expected one number per item, as a list or an array"
    if values is None or isinstance(values, (str, bytes)):
        raise ValueError(f"{name}={values!r}: {expected}")
    try:
        found = np.asarray(values)
        # Texts that look like numbers are more likely the wrong column than results.
        if found.dtype.kind not in "buif" and not (found.dtype.kind == "O" and found.size):
            raise TypeError(f"it holds {found.dtype}")
        if found.dtype.kind == "O" and any(isinstance(one, str) for one in found.flat):
            raise TypeError("it holds text")
        return found.astype(float)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} cannot be read as numbers ({error}): {expected}") from None


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


def check_limits(max_drop: object, confidence: object) -> tuple[float, float]:
    """Both as floats. Raises ``ValueError`` for what is no number, or no such one."""
    drop, level = _number(max_drop), _number(confidence)
    if drop is None or not (math.isfinite(drop) and drop >= 0):
        raise ValueError(f"max_drop={max_drop!r}: expected a finite number >= 0, such as 0.02")
    if level is None or not 0.5 < level < 1:
        raise ValueError(f"confidence={confidence!r}: expected a number in (0.5, 1), such as 0.95")
    return drop, level


def _number(value: object) -> float | None:
    """A number of Python, NumPy or torch as a float; ``None`` for anything else."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, complex)) or not isinstance(value, Real):
        return None
    return float(value)


def check_bounds(bounds: object) -> tuple[float, float]:
    """The lowest and the highest value of an item, as floats."""
    ends: list[float] = []
    if isinstance(bounds, (tuple, list, np.ndarray)) and len(bounds) == 2:
        ends = [end for end in map(_number, bounds) if end is not None and math.isfinite(end)]
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(
            f"bounds={bounds!r}: expected the lowest and the highest value of an item, such as "
            "(0, 1)"
        )
    return ends[0], ends[1]


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


def _numbered(clusters: object, items: int) -> NDArray[np.int_]:
    expected = "expected one document id (number or text) per item"
    if isinstance(clusters, (np.ndarray, torch.Tensor)):
        clusters = clusters.tolist()
    if isinstance(clusters, (str, bytes)) or not isinstance(clusters, Iterable):
        raise ValueError(f"clusters={clusters!r}: {expected}")
    labels = cast(list[Hashable], list(clusters))
    if len(labels) != items:
        raise ValueError(
            f"clusters has {len(labels)} entries for {items} items; pass one document id per item"
        )
    numbers: dict[Hashable, int] = {}
    try:
        found = [numbers.setdefault(label, len(numbers)) for label in labels]
    except TypeError as error:
        raise ValueError(f"clusters cannot be told apart ({error}): {expected}") from error
    return np.array(found, dtype=int)
