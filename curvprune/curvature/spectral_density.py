"""The distribution of eigenvalues by stochastic Lanczos quadrature.

Source: Golub & Meurant 2010, "Matrices, moments and quadrature", §6; Ghorbani, Krishnan & Xiao
2019, Alg. 1; Ubaru, Chen & Saad 2017, "Fast estimation of tr f(A) via stochastic Lanczos
quadrature".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.estimates import Estimate, mean_and_stderr
from curvprune.curvature.lanczos import Basis, lanczos_step
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import gaussian
from curvprune.curvature.working_precision import negligible


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectralDensity:
    """The distribution of eigenvalues, from stochastic Lanczos quadrature.

    Attributes:
        nodes: Gauss nodes of each run. A run that ended early repeats its last node with weight 0.
        weights: Gauss weights; each run's sum to 1.
        grid: where ``density`` is given.
        density: share of eigenvalues per length of the eigenvalue axis, smoothed; its integral
            is 1.
        num_products: operator–vector products spent.
    """

    nodes: Float[Tensor, "runs steps"]
    weights: Float[Tensor, "runs steps"]
    grid: Float[Tensor, " points"]
    density: Float[Tensor, " points"]
    num_products: int

    def mass(self, lower: float, upper: float) -> Estimate:
        """Share of the eigenvalues in ``[lower, upper]``: mean and standard error over runs.

        The error bar covers the random starts, not the quadrature. A node stands for all
        eigenvalues around it, so where the nodes fall decides about a boundary inside a cluster.
        """
        inside = (self.nodes >= lower) & (self.nodes <= upper)
        return self._over_runs((self.weights * inside).sum(1))

    def trace(self, dim: int) -> Estimate:
        """``dim · Σ weight · node``, tr A of an operator of that dimension: mean and standard error
        over runs."""
        return self._over_runs(dim * (self.weights * self.nodes).sum(1))

    def effective_rank(self, dim: int) -> Estimate:
        """``(Σ|λ|)² / Σλ²``, the number of directions that carry the curvature.

        It is r for r equal eigenvalues and zeros, and 0 for the zero operator. Estimated as a ratio
        of means over runs, ``dim · (mean Σ w|θ|)² / mean Σ wθ²``, with its jackknife standard error
        over runs.
        """
        runs = len(self.nodes)
        first = (self.weights * self.nodes.abs()).sum(1)
        second = (self.weights * self.nodes**2).sum(1)

        def ratio(a: Tensor, b: Tensor) -> Tensor:
            return dim * a**2 / b.clamp_min(torch.finfo(torch.float64).tiny)

        value, stderr = float(ratio(first.mean(), second.mean())), math.inf
        if runs > 1:
            # Jackknife: the ratio without each run in turn.
            others = runs - 1
            without = ratio((first.sum() - first) / others, (second.sum() - second) / others)
            stderr = float((others * without.var(correction=0)).sqrt())
        return Estimate(value=value, stderr=stderr, num_items=runs, num_products=self.num_products)

    def _over_runs(self, samples: Tensor) -> Estimate:
        value, stderr = mean_and_stderr(samples)
        runs = len(samples)
        return Estimate(value=value, stderr=stderr, num_items=runs, num_products=self.num_products)


def lanczos_quadrature(
    op: Operator, runs: int, steps: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """Gauss nodes and weights ``[runs, steps]`` of the spectrum, and the products spent."""
    nodes, weights = np.zeros((runs, steps)), np.zeros((runs, steps))
    basis = Basis(op, chunk=steps)
    products = 0
    for run in range(runs):
        # 1. A start that is uniform on the sphere.
        basis.clear()
        v = gaussian(op, 1, generator)[:, 0]
        basis.append(v / torch.linalg.vector_norm(v))

        # 2. Lanczos steps, until the Krylov space is exhausted.
        t = np.zeros((steps, steps))
        for j in range(steps):
            w, beta, scale = lanczos_step(op, basis, t, j)
            products += 1
            if j + 1 == steps or beta <= negligible(op) * scale:
                break
            t[j, j + 1] = t[j + 1, j] = beta
            basis.append(w / beta)

        # 3. Golub–Welsch: nodes are the eigenvalues of T, weights the squared first components.
        size = len(basis)
        theta, s = np.linalg.eigh(t[:size, :size])
        nodes[run] = theta[-1]
        nodes[run, :size], weights[run, :size] = theta, s[0] ** 2
    return nodes, weights, products


def smoothed(
    nodes: np.ndarray, weights: np.ndarray, points: int, sigma: float
) -> tuple[np.ndarray, np.ndarray]:
    """A grid and the density on it: a Gaussian of width ``sigma ·`` (range of the nodes) at every
    node, averaged over the runs."""
    low, high = float(nodes.min()), float(nodes.max())
    # One distinct eigenvalue has no range: its bell is as wide as sigma says of the value itself.
    width = sigma * ((high - low) or abs(high) or 1.0)
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    density = np.zeros(points)
    for node, weight in zip(nodes.ravel(), weights.ravel(), strict=True):
        density += weight * np.exp(-0.5 * ((grid - node) / width) ** 2)
    return grid, density / (len(nodes) * width * math.sqrt(2 * math.pi))
