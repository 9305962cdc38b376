"""Lanczos with full reorthogonalisation and thick restart.

Source: Golub & Van Loan 2013, §10.1–10.3; Wu & Simon 2000, "Thick-restart Lanczos method for large
symmetric eigenvalue problems"; Parlett 1998, "The symmetric eigenvalue problem".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.estimates import EigenPairs
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import LARGEST, gaussian
from curvprune.curvature.ritz import STEPS, Ritz, Settling, Wanted, nothing_missing
from curvprune.curvature.working_precision import as_vectors, check_finite, negligible, norm

CHUNK = 16  # basis vectors allocated at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanczos:
    """One product a step, full reorthogonalisation, convergence tested after each product.

    At ``max_basis`` vectors it restarts with the best Ritz vectors (thick restart). At an invariant
    subspace it goes on with a random vector orthogonal to it, until no eigenvalue of the rest can
    be missing. Before that, a single starting vector sees one copy of a repeated eigenvalue; where
    multiplicities matter, use :class:`Lobpcg`.

    Memory: a basis of ``max_basis`` vectors, and k vectors at the end.

    Attributes:
        max_basis: vectors kept; as many as ``max_products`` if None.
        start: first vector, used as it is; random if None.
        least: products before a result is believed; fewer will do where the start is nearly the
            eigenvector.
    """

    max_basis: int | None = None
    start: Float[Tensor, " n"] | None = None
    least: int = STEPS


class Basis:
    """Orthonormal vectors as rows of chunks, so that the basis grows without being copied."""

    def __init__(self, op: Operator, chunk: int) -> None:
        self.op, self.chunk, self.size = op, chunk, 0
        self.chunks: list[Tensor] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Tensor:
        return self.chunks[i // self.chunk][i % self.chunk]

    def clear(self) -> None:
        """No vectors; their memory is kept for the next."""
        self.size = 0

    def append(self, v: Tensor) -> None:
        if self.size == self.chunk * len(self.chunks):
            self.chunks.append(torch.empty(self.chunk, len(v), dtype=v.dtype, device=v.device))
        self.chunks[self.size // self.chunk][self.size % self.chunk] = v
        self.size += 1

    def dot(self, w: Tensor) -> Tensor:
        """``Vᵀw``, ``[size]``."""
        return torch.cat([chunk @ w for chunk in self._filled()])

    def subtract_(self, w: Tensor, coefficients: Tensor) -> None:
        """``w −= V · coefficients``, in place."""
        parts = coefficients.split(self.chunk)
        for chunk, part in zip(self._filled(), parts, strict=True):
            w.addmv_(chunk.mT, part, alpha=-1)

    def combine(self, s: np.ndarray) -> Tensor:
        """``V s``: the linear combinations ``(n, k)`` given by the columns of ``s [size, k]``."""
        result = torch.zeros(
            self.op.space.dim, s.shape[1], dtype=self.op.dtype, device=self.op.device
        )
        parts = as_vectors(s, self.op).split(self.chunk)
        for chunk, part in zip(self._filled(), parts, strict=True):
            result.addmm_(chunk.mT, part)
        return result

    def rotate_(self, s: np.ndarray) -> None:
        """``V ← V s``, in place."""
        coefficients = as_vectors(s.T, self.op)
        # A stripe of coordinates at a time, so that no second basis is needed.
        stripe = max(1, LARGEST // 8 // max(1, self.size))
        for start in range(0, self.op.space.dim, stripe):
            old = torch.cat([chunk[:, start : start + stripe] for chunk in self._filled()])
            new = coefficients @ old
            for i, chunk in enumerate(self.chunks):
                part = new[i * self.chunk : (i + 1) * self.chunk]
                chunk[: len(part), start : start + stripe] = part
        self.size = s.shape[1]

    def _filled(self) -> list[Tensor]:
        filled = []
        for i, chunk in enumerate(self.chunks):
            if i * self.chunk < self.size:
                filled.append(chunk[: self.size - i * self.chunk])
        return filled


def lanczos_step(op: Operator, basis: Basis, t: np.ndarray, j: int) -> tuple[Tensor, float, float]:
    """One product with basis vector j, the last one. Fills ``t[j, j]``.

    Args:
        t: the projected matrix; row j must hold the couplings to earlier vectors.

    Returns:
        The remainder orthogonal to the basis, its norm β, and the size of A as seen so far.
    """
    # 1. w = A vⱼ
    w = op @ basis[j]
    scale = norm(w)
    check_finite(math.isfinite(scale))

    # 2. The three-term recurrence (more terms in the row after a restart).
    for i in np.flatnonzero(t[j, :j]):
        w = w - float(t[j, i]) * basis[int(i)]
    t[j, j] = float(torch.dot(basis[j], w))
    w = w - float(t[j, j]) * basis[j]  # a new tensor: what the operator returned may be its own

    # 3. Full reorthogonalisation; twice is enough (Kahan–Parlett): a vector that the first made
    #    much shorter has kept its rounding errors.
    before = norm(w)
    basis.subtract_(w, basis.dot(w))
    beta = norm(w)
    if beta < before / math.sqrt(2):
        basis.subtract_(w, basis.dot(w))
        beta = norm(w)
    return w, beta, max(scale, float(np.abs(t).max()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What is known after one more product.

    Attributes:
        remainder: what the product has outside the basis; ``beta`` is its norm.
        ritz: the locked values, then those of the running vectors.
        coordinates: of the Ritz vectors in the basis, ``[basis, values]``.
        last: last coordinate of each running Ritz vector.
        locked: how many values are locked.
        complete: the basis spans the whole space.
        invariant: the basis spans an invariant subspace.
    """

    remainder: Tensor
    beta: float
    ritz: Ritz
    coordinates: np.ndarray
    last: np.ndarray
    locked: int
    complete: bool
    invariant: bool


class _Run:
    """A Lanczos run: the basis V, the projected matrix ``T = VᵀAV`` and what of it is locked.

    The first ``active`` vectors span an invariant subspace. Its Ritz pairs are exact: they are
    locked, with their coordinates in these vectors. T is block diagonal there. The running vectors
    after them make a tridiagonal T, with a full row behind the vectors of a restart.
    """

    def __init__(self, op: Operator, wanted: Wanted, max_basis: int, method: Lanczos) -> None:
        self.op, self.wanted, self.max_basis = op, wanted, max_basis
        self.least = method.least
        self.basis = Basis(op, chunk=min(CHUNK, max_basis))
        self.t = np.zeros((max_basis + 1, max_basis + 1))
        self.active = 0
        self.locked = Ritz.of(np.zeros(0), np.zeros(0))
        self.locked_coordinates = np.zeros((0, 0))
        self.products = 0
        self.settling = Settling()
        # A given start may lie in an invariant subspace that misses the wanted end; a random one
        # does not.
        self.unproven = method.start is not None

    def step(self) -> _Step:
        """One product, and the Ritz pairs of the basis."""
        active, j = self.active, len(self.basis) - 1
        w, beta, scale = lanczos_step(self.op, self.basis, self.t, j)
        self.products += 1
        complete = j + 1 == self.op.space.dim
        if complete:
            beta = 0.0  # nothing is left outside, the remainder is rounding error

        # Rayleigh–Ritz in the running vectors; β times the last coordinate is a residual's norm.
        values, s = np.linalg.eigh(self.t[active : j + 1, active : j + 1])
        ritz = Ritz.of(
            np.concatenate([self.locked.values, values]),
            np.concatenate([self.locked.residuals, beta * np.abs(s[-1])]),
        )
        locked = len(self.locked.values)
        coordinates = np.zeros((j + 1, len(ritz.values)))
        coordinates[:active, :locked] = self.locked_coordinates
        coordinates[active:, locked:] = s
        largest = max(scale, float(np.abs(ritz.values).max()))
        return _Step(
            remainder=w,
            beta=beta,
            ritz=ritz,
            coordinates=coordinates,
            last=s[-1],
            locked=locked,
            complete=complete,
            invariant=complete or beta <= negligible(self.op) * largest,
        )

    def converged(self, step: _Step, chosen: np.ndarray) -> bool:
        """Whether the chosen pairs are accurate, have stopped moving, and miss nothing."""
        ritz, wanted = step.ritz, self.wanted
        self.settling.see(ritz.values[chosen])
        if not ritz.accurate(wanted, chosen):
            return False
        if step.complete:
            return True
        if step.invariant:
            believed = not self.unproven
        else:
            still = self.settling.still_to_go() <= wanted.allowed(ritz.values)[chosen]
            believed = self.products >= self.least and bool(still.all())
        if step.invariant or self.active:
            if wanted.inside:
                return False
            return believed and nothing_missing(ritz, wanted, chosen, self.active)
        return believed

    def lock(self, step: _Step) -> None:
        """All Ritz pairs of an invariant subspace are exact."""
        self.locked, self.locked_coordinates = step.ritz, step.coordinates
        self.active = len(self.basis)
        self.unproven = False

    def restart(self, step: _Step) -> None:
        """The basis becomes the most wanted Ritz vectors; T gets their values and couplings."""
        values = step.ritz.values
        # 1. Choose: the wanted pairs come first, then their neighbours, which speed up convergence.
        #    There must be room for a few steps.
        half = min((self.max_basis + 1) // 2, self.max_basis - 2)
        keep = max(half, min(self.wanted.count + 1, self.max_basis - 2))
        by_interest = self.wanted.by_interest(values)
        order = by_interest[:keep].copy()
        if not step.invariant and not (order >= step.locked).any():
            # The running vectors must go on from somewhere: their best one takes the last place.
            order[-1] = by_interest[by_interest >= step.locked][0]
        order = np.sort(order)  # locked ones first

        # 2. Rotate the basis.
        self.basis.rotate_(step.coordinates[:, order])
        size = len(order)
        self.active = size if step.invariant else int((order < step.locked).sum())
        held = order[: self.active]
        self.locked = Ritz.of(values[held], step.ritz.residuals[held])
        self.locked_coordinates = np.eye(self.active)

        # 3. T is diagonal in Ritz vectors; each couples to the next vector with its residual.
        self.t[:] = 0
        self.t[range(size), range(size)] = values[order]
        if not step.invariant:
            couplings = step.beta * step.last[order[self.active :] - step.locked]
            self.t[size, self.active : size] = couplings
            self.t[self.active : size, size] = couplings


def lanczos(
    op: Operator,
    wanted: Wanted,
    *,
    max_products: int,
    max_basis: int,
    generator: torch.Generator,
    method: Lanczos,
) -> EigenPairs:
    """See :func:`curvprune.curvature.eigenpairs` and :class:`Lanczos`."""
    run = _Run(op, wanted, max_basis, method)
    # 1. The first vector.
    start = method.start
    first = start if start is not None else gaussian(op, 1, generator)[:, 0]
    run.basis.append(first / torch.linalg.vector_norm(first))
    while True:
        # 2. One product, and the Ritz pairs that it gives.
        step = run.step()
        chosen = wanted.found(step.ritz.values)
        met = run.converged(step, chosen)

        # 3. Done, or nothing left to do.
        if met or step.complete or run.products == max_products:
            vectors = run.basis.combine(step.coordinates[:, chosen])
            return step.ritz.pairs(chosen, vectors, run.products, met or step.complete)

        # 4. An invariant subspace is finished: the rest of the space has the rest of the spectrum.
        if step.invariant:
            run.lock(step)

        # 5. A full basis shrinks to its best vectors; otherwise T gets its next couplings.
        j = len(run.basis) - 1
        if j + 1 == max_basis:
            run.restart(step)
        elif not step.invariant:
            run.t[j, j + 1] = run.t[j + 1, j] = step.beta

        # 6. The next vector: the remainder, or a random one where nothing remains.
        if step.invariant:
            run.basis.append(_fresh_direction(op, run.basis, generator))
        else:
            run.basis.append(step.remainder / step.beta)


def _fresh_direction(op: Operator, basis: Basis, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the basis, which must not be complete."""
    while True:
        v = gaussian(op, 1, generator)[:, 0]
        v = v / torch.linalg.vector_norm(v)
        # Little may be left of v, mostly rounding error at first: project until it is orthogonal.
        for _ in range(3 if len(basis) else 0):
            basis.subtract_(v, basis.dot(v))
            v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        if norm(v) > 0.5 and _orthogonal(v, basis):
            return v


def _orthogonal(v: Tensor, basis: Basis) -> bool:
    if not len(basis):
        return True
    return float(basis.dot(v).abs().max()) < math.sqrt(torch.finfo(v.dtype).eps)
