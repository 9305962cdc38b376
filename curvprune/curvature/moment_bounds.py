"""What the moments of a measure say about its shares: bounds that no more products would break.

A Lanczos run of k steps knows the first moments of its start's spectral measure, not the measure.
Every quadrature rule with the same moments is a possible measure. Among those with a node at t, one
has the least mass below t and the most up to t that any of them has (Chebyshev, Markov, Stieltjes).

Source: Golub & Meurant 2010, "Matrices, moments and quadrature", §6 (Gauss–Radau rules); Krein &
Nudelman 1977, "The Markov moment problem" (canonical representations).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh_tridiagonal, solve_banded

LEAST_WEIGHT = 1e-26  # lighter nodes are rounding error of a tridiagonal matrix
RULES = 33  # that stand for all with a node near a point


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The least and the most that something can be."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A quadrature rule: nodes, ascending, and their weights, which sum to 1."""

    nodes: np.ndarray
    weights: np.ndarray


class Moments:
    """The moments of one start's spectral measure, as the Jacobi matrix of its Gauss rule.

    Args:
        nodes, weights: the Gauss rule of a Lanczos run.
        complete: the run spans its Krylov space, so that the rule is the measure itself.
    """

    def __init__(self, nodes: np.ndarray, weights: np.ndarray, *, complete: bool) -> None:
        heavy = weights > LEAST_WEIGHT
        order = np.argsort(nodes[heavy], kind="stable")
        nodes, weights = nodes[heavy][order], weights[heavy][order]
        self.gauss = Rule(nodes=nodes, weights=weights / weights.sum())
        self.complete = complete
        self.diagonal, self.off = _jacobi(self.gauss)

    def up_to(self, t: float) -> Bounds:
        """Bounds of the mass: ``low`` below t, ``high`` up to and with t."""
        if not math.isfinite(t):
            mass = float(t > 0)
            return Bounds(low=mass, high=mass)
        if self.complete:
            return _mass(self.gauss, t)
        rule = self._with_node(t)
        # The node at t is found to rounding error: it is the nearest one.
        at = int(np.argmin(np.abs(rule.nodes - t)))
        below = float(rule.weights[:at].sum())
        return Bounds(low=below, high=min(1.0, below + float(rule.weights[at])))

    def within(self, lower: float, upper: float) -> Bounds:
        """Bounds of the mass in ``[lower, upper]``."""
        if self.complete:
            first = _mass(self.gauss, lower).low if math.isfinite(lower) else 0.0
            last = _mass(self.gauss, upper).high if math.isfinite(upper) else 1.0
            return Bounds(low=last - first, high=last - first)
        first_mass, last_mass = self.up_to(lower), self.up_to(upper)
        return Bounds(
            low=max(0.0, last_mass.low - first_mass.high),
            high=min(1.0, last_mass.high - first_mass.low),
        )

    def mean_size(self) -> Bounds:
        """Bounds of ``∫ |θ|``, whose kink at 0 a rule sees only as well as its nodes lie there."""
        sizes = [float(rule.weights @ np.abs(rule.nodes)) for rule in self._near(0.0)]
        return Bounds(low=min(sizes), high=max(sizes))

    def _near(self, point: float) -> Iterator[Rule]:
        """Rules with a node between the two Gauss nodes around a point: all that the moments leave
        open there."""
        yield self.gauss
        nodes = self.gauss.nodes
        after = int(np.searchsorted(nodes, point))
        if self.complete or not 0 < after < len(nodes):
            return
        for share in np.linspace(0, 1, RULES + 2)[1:-1]:
            yield self._with_node(nodes[after - 1] + share * (nodes[after] - nodes[after - 1]))
        yield self._with_node(point)

    def _with_node(self, t: float) -> Rule:
        """The Gauss–Radau rule with a node at t, by another last entry of the Jacobi matrix."""
        if len(self.diagonal) == 1:
            return Rule(nodes=np.array([t]), weights=np.ones(1))
        # 1. (T' − t I) δ = β² e for the matrix without its last row; the new entry is t + δ_last.
        size = len(self.diagonal) - 1
        bands = np.zeros((3, size))
        bands[0, 1:] = bands[2, :-1] = self.off[: size - 1]
        right = np.zeros(size)
        right[-1] = self.off[-1] ** 2
        scale = float(np.abs(self.diagonal).max() + np.abs(self.off).max())
        last = math.inf
        shift = t
        while not abs(last) < 1e12 * scale:
            # A node of the shorter rule has no rule of this length: step aside by rounding error.
            bands[1] = self.diagonal[:size] - shift
            try:
                last = shift + float(solve_banded((1, 1), bands, right)[-1])
            except np.linalg.LinAlgError:
                last = math.inf
            shift += 1e-13 * scale
        # 2. Golub–Welsch.
        diagonal = np.append(self.diagonal[:size], last)
        nodes, vectors = eigh_tridiagonal(diagonal, self.off)
        return Rule(nodes=nodes, weights=vectors[0] ** 2)


def _mass(rule: Rule, t: float) -> Bounds:
    return Bounds(
        low=float(rule.weights[rule.nodes < t].sum()),
        high=float(rule.weights[rule.nodes <= t].sum()),
    )


def _jacobi(rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and off-diagonal of the Jacobi matrix: Lanczos on the nodes, started at the roots
    of the weights."""
    k = len(rule.nodes)
    basis = np.zeros((k, k))
    basis[0] = np.sqrt(rule.weights)
    diagonal, off = np.zeros(k), np.zeros(max(0, k - 1))
    for j in range(k):
        w = rule.nodes * basis[j]
        diagonal[j] = basis[j] @ w
        # Twice is enough.
        for _ in range(2):
            w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
        length = float(np.linalg.norm(w))
        if j + 1 == k:
            break
        if length <= 1e-300:
            return diagonal[: j + 1], off[:j]
        off[j] = length
        basis[j + 1] = w / length
    return diagonal, off
