"""Plans for prices that do not add up: what the changes of two layers do to each other counts too.

The value of a plan x (a 0/1 vector over all rows, one row per layer) is ``pᵀx + ½ Σ (gᵀx)²`` over
draws g, the products of two rows of one layer left out. No integer program that is quick has such
an objective, so it is replaced by its gradient and `curvprune.planning.integer_program.cheapest` solved again
around what came out (Frank and Wolfe 1956); of all plans on the way the best one by the true value
is taken, the one by prices that add up included. No torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from curvprune.planning.integer_program import Choice, Infeasible, Row, cheapest

ROUNDS = 12  # the last ones change nothing on ResNet-20 and a vision transformer
HALVINGS = (
    8  # of the interval of sizes in which the smallest plan of a value is looked for, at most
)
NEAR = 0.01  # ... and no closer than this share of the size
SAVED = 0.9  # at most this share of the prices' sum, as `Ledger.predict` has it


@dataclass(frozen=True, slots=True)
class Quadratic:
    """Prices of rows and what pairs of them add.

    Args:
        rows: every layer's options, with prices that add up.
        draws: the pairs' share, of which the products of two columns, halved and summed over the
            draws, are what two rows of different layers do to each other, in the unit of the
            prices.
    """

    rows: tuple[Row, ...]
    draws: Float[np.ndarray, "draws rows"]

    def value(self, choices: Mapping[str, str]) -> float:
        """What a plan costs. Cost: draws × layers."""
        return self._value(self._vector(choices))

    def cheapest(self, **within: Any) -> dict[str, str]:
        """A plan with a low value among those within the limits, which are arguments of
        `curvprune.planning.integer_program.cheapest`. Never worse than the plan for prices that add up, but not
        proved to be the best.

        Cost: some ten knapsacks. Raises `Infeasible` as `knapsack.cheapest` does.
        """
        choices = cheapest(self.rows, **within)
        point = x = self._vector(choices)
        best, least = choices, self._value(x)
        for step in range(ROUNDS):
            slopes = self._prices() + self._pairs(point)
            moved = [
                Choice(layer=row.layer, option=row.option, bytes=row.bytes, price=float(slope))
                for row, slope in zip(self.rows, slopes, strict=True)
            ]
            choices = cheapest(moved, **within)
            x = self._vector(choices)
            value = self._value(x)
            if value < least:
                best, least = choices, value
            if np.array_equal(x, point):
                break
            point = point + (x - point) * (2 / (step + 3))
        return best

    def smaller(
        self, choices: Mapping[str, str], *, fixed_bytes: int = 0, **within: Any
    ) -> dict[str, str]:
        """The smallest plan found that is no larger than ``choices`` and whose value is no higher;
        ``choices`` itself where there is none. Sizes are halved between it and the smallest there
        is. Cost: some fifty knapsacks.

        Args:
            within: limits besides the bytes, as for `cheapest`, and layers that share an option.
        """
        stored = {(row.layer, row.option): row.bytes for row in self.rows}
        limits = {key: value for key, value in within.items() if key != "max_bytes"}

        def size(plan: Mapping[str, str]) -> int:
            return fixed_bytes + sum(stored[pair] for pair in plan.items())

        best, most = dict(choices), self.value(choices)
        low = fixed_bytes + sum(
            min(row.bytes for row in options) for options in self._by_layer().values()
        )
        high = size(best)
        for _ in range(HALVINGS):
            try:
                found = self.cheapest(max_bytes=high, fixed_bytes=fixed_bytes, **limits)
            except Infeasible:
                found = None
            if found is not None and self.value(found) <= most and size(found) <= size(best):
                best = found
            else:
                low = high
            high = (low + size(best)) // 2
            if size(best) - high < NEAR * size(best):
                break
        return best

    def _value(self, x: Float[np.ndarray, " rows"]) -> float:
        alone = float(self._prices() @ x)
        return alone + max(0.5 * float(x @ self._pairs(x)), -SAVED * alone)

    def _pairs(self, x: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
        """The gradient of the pairs' part at a point, a plan or between plans."""
        layers = self._layers()
        order = np.argsort(layers, kind="stable")
        starts = np.searchsorted(layers[order], np.arange(layers.max() + 1))
        own = np.add.reduceat((self.draws * x)[:, order], starts, axis=1)  # draws × layers
        return np.einsum("dr,dr->r", self.draws, own.sum(1, keepdims=True) - own[:, layers])

    def _prices(self) -> Float[np.ndarray, " rows"]:
        return np.array([row.price for row in self.rows])

    def _layers(self) -> np.ndarray:
        names = {name: i for i, name in enumerate(self._by_layer())}
        return np.array([names[row.layer] for row in self.rows])

    def _by_layer(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.layer, []).append(row)
        return found

    def _vector(self, choices: Mapping[str, str]) -> Float[np.ndarray, " rows"]:
        return np.array([float(choices[row.layer] == row.option) for row in self.rows])


def scaled(quadratic: Quadratic, factors: Mapping[str, float]) -> Quadratic:
    """With the price of every option multiplied by its factor, as if its changes were longer by the
    factor's root."""
    of = np.array([factors.get(row.option, 1.0) for row in quadratic.rows])
    rows: Iterable[Row] = (
        Choice(layer=row.layer, option=row.option, bytes=row.bytes, price=row.price * float(factor))
        for row, factor in zip(quadratic.rows, of, strict=True)
    )
    return Quadratic(rows=tuple(rows), draws=quadratic.draws * np.sqrt(of))
