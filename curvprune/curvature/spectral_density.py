"""The distribution of eigenvalues by stochastic Lanczos quadrature.

Source: Golub & Meurant 2010, "Matrices, moments and quadrature", §6; Ghorbani, Krishnan & Xiao
2019, Alg. 1; Ubaru, Chen & Saad 2017, "Fast estimation of tr f(A) via stochastic Lanczos
quadrature".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.estimates import Estimate
from curvprune.curvature.lanczos import Basis, lanczos_step
from curvprune.curvature.moment_bounds import Bounds, Moments
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import gaussian
from curvprune.curvature.working_precision import negligible


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectralDensity:
    """The distribution of eigenvalues, from stochastic Lanczos quadrature.

    A mean over the spectrum is estimated by the mean over runs. Its error has two parts.

    - The *starts*: for a start that is uniform on the sphere, ``Σ v_i² f(λ_i)`` has the variance
      ``2/(n+2) · (mean f² − (mean f)²)``. That is known, so that two runs will do.
    - The *quadrature*: the moments that a run knows leave the share below a threshold open between
      two bounds (`curvprune.curvature.moment_bounds`). The value is their middle, and a bracket of
      width w counts as a standard error of ``w/√12``: two of them reach over all of it.

    Attributes:
        nodes: Gauss nodes of each run. A run that ended early repeats its last node with weight 0.
        weights: Gauss weights; each run's sum to 1.
        grid: where ``density`` is given.
        density: share of eigenvalues per length of the eigenvalue axis, smoothed; its integral
            is 1.
        num_products: operator–vector products spent.
        dim: number n of eigenvalues.
        exact: the nodes are all the eigenvalues, and no error is left.
    """

    nodes: Float[Tensor, "runs steps"]
    weights: Float[Tensor, "runs steps"]
    grid: Float[Tensor, " points"]
    density: Float[Tensor, " points"]
    num_products: int
    dim: int
    exact: bool = False

    def mass(self, lower: float, upper: float, *, atol: float = 0.02) -> Estimate:
        """Share of the eigenvalues in ``[lower, upper]``, with the errors of starts and quadrature.

        ``converged``: the standard error is at most ``atol``, an absolute share. More ``steps``
        narrow the bracket, more ``runs`` the spread of the starts.
        """
        bounds = [moments.within(lower, upper) for moments in self._moments()]
        value, bracket = _middle(bounds)
        # The starts count as nR/2 draws; two more of each kind (Agresti and Coull), so that a share
        # near 0 or 1 is not without error.
        draws = self.dim * len(self.nodes) / 2
        share = (value * draws + 2) / (draws + 4)
        stderr = math.hypot(bracket, self._spread(share, share))
        return self._estimate(value, stderr, stderr <= atol)

    def trace(self, dim: int, *, rtol: float = 0.05) -> Estimate:
        """``dim · Σ weight · node``, tr A of an operator of that dimension.

        The quadrature is exact for it; the error is that of the starts. ``converged``: within
        ``rtol · |tr A|``.
        """
        first = float((self.weights * self.nodes).sum(1).mean())
        second = float((self.weights * self.nodes**2).sum(1).mean())
        stderr = dim * self._spread(first, second)
        return self._estimate(dim * first, stderr, stderr <= rtol * abs(dim * first))

    def effective_rank(self, dim: int, *, rtol: float = 0.1) -> Estimate:
        """``(Σ|λ|)² / Σλ²``, the number of directions that carry the curvature.

        It is r for r equal eigenvalues and zeros, and 0 for the zero operator. Estimated as a ratio
        of means over runs, ``dim · (mean Σ w|θ|)² / mean Σ wθ²``. ``converged``: within ``rtol`` of
        the value.
        """
        # 1. The two means, and the bracket of the first, which has a kink at zero.
        size, bracket = _middle([moments.mean_size() for moments in self._moments()])
        square = float((self.weights * self.nodes**2).sum(1).mean())
        if not square > 0:
            return self._estimate(0.0, 0.0, True)
        value = dim * size**2 / square
        # 2. The ratio's relative change is 2 δ|θ| / size − δθ² / square, to first order.
        influence = 2 * self.nodes.abs() / size - self.nodes**2 / square
        first = float((self.weights * influence).sum(1).mean())
        second = float((self.weights * influence**2).sum(1).mean())
        relative = math.hypot(self._spread(first, second), 2 * bracket / size)
        return self._estimate(value, value * relative, relative <= rtol)

    def _moments(self) -> list[Moments]:
        found = []
        for nodes, weights in zip(self.nodes.numpy(), self.weights.numpy(), strict=True):
            # A run that met an invariant subspace knows its measure; so does one of all steps.
            steps = int((weights > 0).sum())
            complete = self.exact or steps < len(weights) or steps >= self.dim
            found.append(Moments(nodes, weights, complete=complete))
        return found

    def _spread(self, first: float, second: float) -> float:
        """Standard error over starts of a mean, from the means of f and f²."""
        if self.exact:
            return 0.0
        variance = 2 / (self.dim + 2) * (second - first**2) / len(self.nodes)
        return math.sqrt(max(0.0, variance))

    def _estimate(self, value: float, stderr: float, converged: bool) -> Estimate:
        return Estimate(
            value=value,
            stderr=stderr,
            num_items=0 if self.exact else len(self.nodes),
            num_products=self.num_products,
            converged=converged,
        )


def _middle(bounds: Sequence[Bounds]) -> tuple[float, float]:
    """The middle of the mean bounds, and the standard error that their distance counts as."""
    low = math.fsum(b.low for b in bounds) / len(bounds)
    high = math.fsum(b.high for b in bounds) / len(bounds)
    return (low + high) / 2, (high - low) / math.sqrt(12)


def exact_density(
    values: np.ndarray, products: int, *, points: int = 1024, sigma: float = 0.01
) -> SpectralDensity:
    """The distribution of eigenvalues that are all known."""
    n = len(values)
    nodes, weights = np.sort(values)[None], np.full((1, n), 1 / n)
    grid, smooth = smoothed(nodes, weights, points, sigma)
    return SpectralDensity(
        nodes=torch.from_numpy(nodes),
        weights=torch.from_numpy(weights),
        grid=torch.from_numpy(grid),
        density=torch.from_numpy(smooth),
        num_products=products,
        dim=n,
        exact=True,
    )


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
