"""Plans for prices that do not add up: what the changes of two layers do to each other counts too.

The value of a plan x (a 0/1 vector over all rows, one row per layer) is ``pᵀx + ½ Σ (gᵀx)²`` over
draws g, the products of two rows of one layer left out. No integer program that is quick has such
an objective. So it is replaced by its gradient, and `cheapest` is solved again around what came out
(Frank and Wolfe 1956). Of all plans on the way the best one by the true value is taken, the one by
prices that add up included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from curvprune.planning.budget import UNLIMITED, Within
from curvprune.planning.infeasible import Infeasible
from curvprune.planning.integer_program import cheapest
from curvprune.planning.priced import Choice, Priced

ROUNDS = 12  # the last ones change nothing on ResNet-20 and a vision transformer
HALVINGS = 8  # of the sizes in which the smallest plan of a value is looked for, at most
NEAR = 0.01  # ... and no closer than this share of the size
SAVED = 0.9  # at most this share of the prices' sum, as `Ledger.predict` has it


@dataclass(frozen=True, slots=True)
class Quadratic:
    """Prices of rows and what pairs of them add.

    Args:
        rows: every layer's options, with prices that add up.
        draws: the pairs' share. The products of two of its columns, halved and summed over the
            draws, are what two rows of different layers do to each other, in the unit of the
            prices.
    """

    rows: tuple[Priced, ...]
    draws: Float[np.ndarray, "draws rows"]

    def value(self, choices: Mapping[str, str]) -> float:
        """What a plan costs. Cost: draws × layers."""
        return self._value(self._vector(choices))

    def cheapest(self, within: Within = UNLIMITED) -> dict[str, str]:
        """A plan with a low value among those within the limits. Never worse than the plan for
        prices that add up, but not proved to be the best.

        Cost: some ten knapsacks. Raises `Infeasible` as `curvprune.planning.cheapest` does.
        """
        # 1. The plan for prices that add up.
        choices = cheapest(self.rows, within)
        point = x = self._vector(choices)
        best, least = choices, self._value(x)
        for step in range(ROUNDS):
            # 2. The plan for the gradient at this point.
            slopes = self._prices() + self._pairs(point)
            choices = cheapest(self._priced_at(slopes), within)
            x = self._vector(choices)
            value = self._value(x)
            if value < least:
                best, least = choices, value
            if np.array_equal(x, point):
                break
            # 3. Part of the way to it.
            point = point + (x - point) * (2 / (step + 3))
        return best

    def smaller(self, choices: Mapping[str, str], within: Within = UNLIMITED) -> dict[str, str]:
        """The smallest plan found that is no larger than ``choices`` and whose value is no higher;
        ``choices`` itself where there is none. Sizes are halved between it and the smallest there
        is. Cost: some fifty knapsacks.

        Args:
            within: what plans must keep to, but for its ``max_bytes``.
        """
        stored = {(row.layer, row.option): row.bytes for row in self.rows}

        def size(plan: Mapping[str, str]) -> int:
            return within.fixed_bytes + sum(stored[pair] for pair in plan.items())

        # Half the way down from the best plan while plans are found that cost no more; where none
        # is, half the way back up.
        best, most = dict(choices), self.value(choices)
        low = within.fixed_bytes + sum(self._least_bytes().values())
        high = size(best)
        for _ in range(HALVINGS):
            try:
                found = self.cheapest(replace(within, max_bytes=high))
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
        # A row meets what all layers do together, less what its own layer does.
        return np.einsum("dr,dr->r", self.draws, own.sum(1, keepdims=True) - own[:, layers])

    def _prices(self) -> Float[np.ndarray, " rows"]:
        return np.array([row.price for row in self.rows])

    def _priced_at(self, slopes: Float[np.ndarray, " rows"]) -> list[Choice]:
        """The rows with other prices."""
        return [
            Choice(layer=row.layer, option=row.option, bytes=row.bytes, price=float(slope))
            for row, slope in zip(self.rows, slopes, strict=True)
        ]

    def _layers(self) -> Int[np.ndarray, " rows"]:
        """The number of each row's layer, in the order in which layers first appear."""
        numbers: dict[str, int] = {}
        for row in self.rows:
            numbers.setdefault(row.layer, len(numbers))
        return np.array([numbers[row.layer] for row in self.rows])

    def _least_bytes(self) -> dict[str, int]:
        """Bytes of every layer's smallest option."""
        least: dict[str, int] = {}
        for row in self.rows:
            least[row.layer] = min(row.bytes, least.get(row.layer, row.bytes))
        return least

    def _vector(self, choices: Mapping[str, str]) -> Float[np.ndarray, " rows"]:
        return np.array([float(choices[row.layer] == row.option) for row in self.rows])


def scaled(quadratic: Quadratic, factors: Mapping[str, float]) -> Quadratic:
    """With the price of every option multiplied by its factor, as if its changes were longer by the
    factor's root."""
    of = np.array([factors.get(row.option, 1.0) for row in quadratic.rows])
    rows = [
        Choice(layer=row.layer, option=row.option, bytes=row.bytes, price=row.price * float(factor))
        for row, factor in zip(quadratic.rows, of, strict=True)
    ]
    return Quadratic(rows=tuple(rows), draws=quadratic.draws * np.sqrt(of))
