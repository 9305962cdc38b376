"""LOBPCG: Rayleigh–Ritz on the current vectors, their last step and their residuals.

Source: Knyazev 2001, "Toward the optimal preconditioned eigensolver".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.estimates import EigenPairs
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import gaussian
from curvprune.curvature.ritz import STEPS, Ritz, Wanted
from curvprune.curvature.working_precision import (
    as_vectors,
    check_finite,
    complement,
    in_float64,
    norm,
    rounding,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lobpcg:
    """A block of k vectors (2k for both ends; ``LM`` looks at both).

    Each vector costs one product an iteration until it has converged. Finds up to k copies of a
    repeated eigenvalue. Memory: six blocks.

    Attributes:
        start: first vector, used as it is; the rest of the block is random.
    """

    start: Float[Tensor, " n"] | None = None


def lobpcg(
    op: Operator,
    wanted: Wanted,
    width: int,
    *,
    max_products: int,
    generator: torch.Generator,
    start: Tensor | None,
) -> EigenPairs:
    """See :func:`curvprune.curvature.eigenpairs` and :class:`Lobpcg`.

    Works on ``[X, P, R]`` in an orthonormal basis: ``width`` vectors X, what the last step added to
    them, and their residuals. The image of the basis under A is carried along, not recomputed.
    """
    n = op.space.dim
    # LM looks at both ends, then takes the largest magnitudes of what it found.
    search = replace(wanted, k=width)
    if wanted.which == "BE" or (wanted.which == "LM" and width > wanted.k):
        search = replace(wanted, k=width // 2, which="BE")

    # 1. The first X, orthonormal, and its image.
    x = gaussian(op, width - (start is not None), generator)
    if start is not None:
        x = torch.cat([start.unsqueeze(1), x], 1)
    basis = complement(x[:, :0], x / torch.linalg.vector_norm(x, dim=0), 0.0)
    image = op @ basis
    products = rank = basis.shape[1]
    while True:
        # 2. Rayleigh–Ritz, and whether the wanted pairs will do.
        ritz, coordinates = _rayleigh_ritz(basis, image)
        chosen = wanted.found(ritz.values)
        complete = basis.shape[1] == n
        enough = complete or products >= min(STEPS, n)
        met = ritz.accurate(wanted, chosen) and enough
        left = max_products - products
        if met or complete or left < 1:
            if not len(chosen):
                chosen = wanted.best(ritz.values)
            vectors = basis @ as_vectors(coordinates[:, chosen], op)
            return ritz.pairs(chosen, vectors, products, met or complete)

        # 3. The basis becomes [X, P]: the best Ritz vectors, and what is new in them.
        selected = search.best(ritz.values)
        mix = as_vectors(_with_step(coordinates[:, selected], rank), op)
        basis, image = basis @ mix, image @ mix
        rank = len(selected)

        # 4. R: the residuals of those that have not converged.
        columns = _unfinished(ritz, wanted, selected)[:left]
        values = as_vectors(ritz.values[selected][columns], op)
        rest = image[:, columns] - basis[:, columns] * values
        largest = max(np.abs(ritz.values).max(), torch.finfo(op.dtype).tiny)
        lengths = torch.linalg.vector_norm(rest, dim=0)
        real = lengths > float(rounding(op) * largest)
        new = complement(basis, rest[:, real] / lengths[real], rounding(op))
        if new.shape[1] == 0:
            # Every residual is rounding error, so X spans an invariant subspace: only chance leads
            # out of it.
            new = complement(basis, gaussian(op, len(columns), generator), 0.0)

        # 5. The basis becomes [X, P, R], at one product for each new column.
        added = op @ new
        products += new.shape[1]
        basis, image = torch.cat([basis, new], 1), torch.cat([image, added], 1)


def _rayleigh_ritz(basis: Tensor, image: Tensor) -> tuple[Ritz, np.ndarray]:
    """The Ritz values of an orthonormal basis, and the coordinates of their vectors in it."""
    h = in_float64(basis.mT @ image)
    check_finite(bool(torch.isfinite(h).all()))
    values, coordinates = np.linalg.eigh(((h + h.mT) / 2).numpy())
    residuals = np.empty(len(values))
    # One vector at a time: all of them would be as large as the basis.
    for i in range(len(values)):
        own = torch.from_numpy(coordinates[:, i].copy())
        own = own.to(device=basis.device, dtype=basis.dtype)
        residuals[i] = norm(image @ own - values[i] * (basis @ own))
    return Ritz.of(values, residuals), coordinates


def _with_step(x: np.ndarray, rank: int) -> np.ndarray:
    """Coordinates of X, followed by those of P, the part of X outside the first ``rank`` vectors,
    orthonormal to X."""
    if len(x) == rank:
        return x
    step = x.copy()
    step[:rank] = 0
    # Twice, as one projection leaves rounding errors; directions that vanish are left out.
    q, r = np.linalg.qr(step - x @ (x.T @ step))
    q = q[:, np.abs(np.diag(r)) > 1e-10]
    q, r = np.linalg.qr(q - x @ (x.T @ q))
    q = q[:, np.abs(np.diag(r)) > 0.5]
    return np.concatenate([x, q], 1)


def _unfinished(ritz: Ritz, wanted: Wanted, selected: np.ndarray) -> np.ndarray:
    """Which of the selected pairs have not converged; all of them if none."""
    open_ = ritz.errors[selected] > wanted.allowed(ritz.values)[selected]
    return np.flatnonzero(open_ if open_.any() else np.ones_like(open_))
