"""Ritz pairs: the eigenpairs of a small projected matrix, how far off they may be, and which of
them are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curvprune.curvature.estimates import EigenPairs

Ends = Literal["LM", "LA", "SA", "BE"]
Which = Literal["LM", "LA", "SA", "BE", "SM"]

STEPS = 6  # products before an eigenpair is believed


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which eigenvalues are asked for, and how accurately.

    Attributes:
        k: how many of each end.
        which: ``LM`` largest magnitude, ``LA`` largest, ``SA`` smallest, ``BE`` both ends, ``SM``
            smallest magnitude.
        tol: relative error allowed to each.
        rounding: size, relative to the largest, below which an error is rounding of a product.
    """

    k: int
    which: Which
    tol: float
    rounding: float

    @property
    def count(self) -> int:
        """How many in all."""
        return 2 * self.k if self.which == "BE" else self.k

    def sides(self, values: np.ndarray) -> list[np.ndarray]:
        """Scores, larger is more wanted: one array for each end."""
        scores = {
            "LM": [np.abs(values)],
            "LA": [values],
            "SA": [-values],
            "BE": [values, -values],
            "SM": [-np.abs(values)],
        }
        return scores[self.which]

    @property
    def inside(self) -> bool:
        """Wanted inside the spectrum, where no Ritz value bounds what is not yet spanned."""
        return self.which == "SM"

    def best(self, values: np.ndarray) -> np.ndarray:
        """Indices of the k most wanted of each end; no index twice."""
        chosen: list[int] = []
        for scores in self.sides(values):
            # Near the middle of a short spectrum, both ends may want the same value.
            order = [int(i) for i in np.argsort(-scores, kind="stable") if int(i) not in chosen]
            chosen += order[: self.k]
        return np.array(chosen, dtype=np.int64)

    def found(self, values: np.ndarray) -> np.ndarray:
        """As :meth:`best`, or empty while there are fewer values than that."""
        return self.best(values) if len(values) >= self.count else np.zeros(0, dtype=np.int64)

    def by_interest(self, values: np.ndarray) -> np.ndarray:
        """All indices, the most wanted first, the ends in turn."""
        orders = [np.argsort(-scores, kind="stable") for scores in self.sides(values)]
        in_turn = np.stack(orders, 1).ravel().tolist()
        # A dict keeps the first place of each index.
        return np.array(list(dict.fromkeys(in_turn)), dtype=np.int64)

    def allowed(self, values: np.ndarray) -> np.ndarray:
        """Error allowed to each value: relative to it, or what rounding makes of the largest."""
        return np.maximum(self.tol * np.abs(values), self.rounding * np.abs(values).max())


@dataclass(frozen=True, kw_only=True, slots=True)
class Ritz:
    """Ritz values with the norms of their residuals and their estimated errors, ``[size]`` each."""

    values: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, residuals: np.ndarray) -> Ritz:
        """With the errors by Kato and Temple."""
        return cls(values=values, residuals=residuals, errors=kato_temple(values, residuals))

    def accurate(self, wanted: Wanted, chosen: np.ndarray) -> bool:
        """Whether there are chosen values, and all of them have small errors."""
        small = self.errors <= wanted.allowed(self.values)
        return len(chosen) > 0 and bool(small[chosen].all())

    def pairs(
        self, chosen: np.ndarray, vectors: Tensor, products: int, converged: bool
    ) -> EigenPairs:
        """The chosen values with their vectors, which are made unit vectors."""

        def tensor(x: np.ndarray) -> Tensor:
            own = torch.from_numpy(np.ascontiguousarray(x[chosen]))
            return own.to(device=vectors.device, dtype=vectors.dtype)

        return EigenPairs(
            values=tensor(self.values),
            vectors=vectors / torch.linalg.vector_norm(vectors, dim=0),
            residuals=tensor(self.residuals),
            errors=tensor(self.errors),
            num_products=products,
            converged=converged,
        )


def kato_temple(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """``min(r, r²/gap)``; without a neighbour the bound is r."""
    if len(values) < 2:
        return residuals.copy()
    # A neighbour is only known to within its own residual: it counts at the near end of that.
    gaps = np.abs(values[:, None] - values[None, :]) - residuals[None, :]
    np.fill_diagonal(gaps, np.inf)
    gap = gaps.min(1)
    # No gap, no bound from it: then the residual itself.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, np.minimum(residuals, residuals**2 / gap), residuals)


class Settling:
    """How far the wanted values still have to go, by their last two steps.

    At the edge of a dense spectrum ``r²/gap`` is too good: the values must also have stopped
    moving.
    """

    def __init__(self) -> None:
        self._values = self._step = self._step_before = np.zeros(0)

    def see(self, values: np.ndarray) -> None:
        """The values after one more product."""
        self._step_before = self._step
        if len(values) == len(self._values):
            self._step = np.abs(values - self._values)
        else:
            self._step = np.full(len(values), np.inf)
        self._values = values

    def still_to_go(self) -> np.ndarray:
        """The sum of the steps to come if they go on shrinking by the ratio of the last two
        (Aitken), at most the last step."""
        step, before = self._step, self._step_before
        if len(step) != len(before):
            return step
        # d, d·q, d·q², …: after a step d·q = step, what is left adds up to step² / (d − step).
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(before > 2 * step, np.minimum(step, step**2 / (before - step)), step)


def nothing_missing(ritz: Ritz, wanted: Wanted, chosen: np.ndarray, active: int) -> bool:
    """Whether no eigenvalue of what is not yet spanned can exceed the chosen ones.

    None of them exceeds the best Ritz value of the running vectors (from ``active`` on): these
    started at random in what the others leave. So nothing is missing once that best has converged
    and is no better than the last one chosen, at each end.
    """
    allowed = wanted.allowed(ritz.values)
    for side, scores in enumerate(wanted.sides(ritz.values)):
        best = active + int(np.argmax(scores[active:]))
        last = chosen[(side + 1) * wanted.k - 1]
        level = max(allowed[best], allowed[last])
        if ritz.errors[best] > level or scores[best] > scores[last] + level:
            return False
    return True
