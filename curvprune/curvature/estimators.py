"""Trace, diagonal, extreme eigenpairs and spectral density of any symmetric operator, from products
alone.

Every estimate says how far off it may be and whether it met what was asked. Products are the
expensive part (passes over the data), so Lanczos tests convergence after each of them, and a sketch
that grows keeps those it has. All randomness is drawn on the CPU from the caller's generator: the
same seed gives the same probes on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import chdtri
from torch import Tensor

from curvprune.curvature.operators import Operator

TraceMethod = Literal["hutch++", "hutchinson", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]
Which = Literal["LM", "LA", "SA", "BE"]
EigenMethod = Literal["lanczos", "lobpcg"]

_ENOUGH = 8  # probes before an error bar is believed
_STEPS = 6  # products before an eigenpair is believed
_BLOCK_NUMBERS = 2**26  # of a block of probes that goes through the operator at once
_CHUNK = 16  # basis vectors allocated at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: in the operator's unit.
        stderr: standard error; 0 for an exact value.
        num_items: independent (or leave-one-out) samples behind the standard error; 0 for an exact
            value.
        num_products: operator–vector products spent.
        converged: whether the accuracy asked for was met, with enough samples to believe it.
    """

    value: float
    stderr: float
    num_items: int = 0
    num_products: int = 0
    converged: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagonalEstimate:
    """The diagonal with a standard error for each entry, ``(n,)`` each; see :class:`Estimate`."""

    values: Float[Tensor, " n"]
    stderr: Float[Tensor, " n"]
    num_products: int
    converged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class EigenPairs:
    """Extreme eigenpairs.

    Attributes:
        values: eigenvalues, the wanted end first (``BE``: k largest, descending, then k smallest,
            ascending).
        vectors: orthonormal columns.
        residuals: ``‖A v − λ v‖``; an eigenvalue lies within it.
        errors: estimated error of each value: the smaller of the residual and ``residual² / gap``
            (Kato–Temple).
        num_products: operator–vector products spent.
        converged: every error is within ``tol · |λ|`` or at rounding level.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residuals: Float[Tensor, " k"]
    errors: Float[Tensor, " k"]
    num_products: int
    converged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectralDensity:
    """The distribution of eigenvalues, from stochastic Lanczos quadrature.

    Attributes:
        nodes: Gauss nodes of each run. A run that ended early repeats its last node with weight 0.
        weights: Gauss weights; each run's sum to 1.
        grid: where ``density`` is given.
        density: share of eigenvalues per unit of the eigenvalue axis, smoothed; its integral is 1.
        num_products: operator–vector products spent.
    """

    nodes: Float[Tensor, "runs steps"]
    weights: Float[Tensor, "runs steps"]
    grid: Float[Tensor, " points"]
    density: Float[Tensor, " points"]
    num_products: int

    def mass(self, lower: float, upper: float) -> Estimate:
        """Share of the eigenvalues in ``[lower, upper]``: mean over runs and its standard error
        over runs.

        The error bar covers the random starts, not the quadrature: a node stands for all
        eigenvalues around it, so a boundary inside a cluster is decided by where the nodes fall.
        """
        inside = (self.nodes >= lower) & (self.nodes <= upper)
        return self._over_runs((self.weights * inside).sum(1))

    def trace(self, dim: int) -> Estimate:
        """``dim · Σ weight · node``, tr A of an operator of that dimension: mean over runs and its
        standard error."""
        return self._over_runs(dim * (self.weights * self.nodes).sum(1))

    def effective_rank(self, dim: int) -> Estimate:
        """``(Σ|λ|)² / Σλ²``, the number of directions that carry the curvature: r for r equal
        eigenvalues and zeros.

        A ratio of means over runs, ``dim · (mean Σ w|θ|)² / mean Σ wθ²``, with its jackknife
        standard error over runs; 0 for the zero operator.
        """
        runs = len(self.nodes)
        first, second = (
            (self.weights * self.nodes.abs()).sum(1),
            (self.weights * self.nodes**2).sum(1),
        )

        def ratio(a: Tensor, b: Tensor) -> Tensor:
            return dim * a**2 / b.clamp_min(torch.finfo(torch.float64).tiny)

        value = float(ratio(first.mean(), second.mean()))
        if runs < 2:
            return Estimate(
                value=value, stderr=math.inf, num_items=runs, num_products=self.num_products
            )
        without = ratio((first.sum() - first) / (runs - 1), (second.sum() - second) / (runs - 1))
        stderr = float(((runs - 1) * without.var(correction=0)).sqrt())
        return Estimate(value=value, stderr=stderr, num_items=runs, num_products=self.num_products)

    def _over_runs(self, samples: Tensor) -> Estimate:
        value, stderr = _mean_and_stderr(samples)
        return Estimate(
            value=value, stderr=stderr, num_items=len(samples), num_products=self.num_products
        )


def trace(
    op: Operator,
    *,
    method: TraceMethod = "hutch++",
    rtol: float = 0.05,
    max_products: int = 300,
    generator: torch.Generator,
) -> Estimate:
    """tr A from products, to a standard error of ``rtol · |tr A|``, in the operator's unit.

    - ``hutchinson``: mean of ``zᵀAz`` over Rademacher z. Variance ``2 Σ_{i≠j} A_ij²``: exact for a
    diagonal A.
    - ``hutch++``: exact on the range Q of a sketch, Hutchinson on what is left, ``tr QᵀAQ + mean
      gᵀ(I−QQᵀ)A(I−QQᵀ)g``; the standard error is the second part's. The sketch stops growing when
      probes would lower the error faster.
    - ``xtrace``: leave-one-out over the sketch's own columns, with residuals normalised on the
      sphere; the standard error is the leave-one-out one, whose samples share most of their sketch:
      measured, it is too small by up to a third (two standard errors covered 80 to 93 % of 300
      seeds). Best for fast decay.

    Products go in growing rounds, and a larger sketch keeps those of the smaller one. ``converged``
    asks for at least 8 samples and for the 90 % upper bound of the standard error (χ²) to be within
    the tolerance, so that a few probes that agree by luck do not end the search. Where n products
    are about what the next round would take, and fit into ``max_products``, the diagonal is read
    off exactly: standard error 0.

    Memory: blocks of probes for Hutchinson; Hutch++ and XTrace keep a sketch of at most
    ``max_products / 2`` vectors.

    Raises:
        ValueError: ``rtol`` ≤ 0, an unknown method, fewer products than two samples need, a
            generator not on the CPU.

    Source: Hutchinson 1989; Meyer, Musco, Musco & Woodruff 2021, "Hutch++", Alg. 1; Epperly, Tropp
    & Webber 2024,
    "XTrace: making the most of every sample in stochastic trace estimation".
    """
    _check_choice("method", method, get_args(TraceMethod))
    needed, first_round = {"hutchinson": (2, 8), "hutch++": (6, 24), "xtrace": (4, 16)}[method]
    _check_budget(op, rtol, max_products, needed, method, generator)
    if op.space.dim <= min(first_round, max_products):
        return _exact_trace(op, 0)
    run = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace}[method]
    return run(op, rtol, max_products, generator)


def diagonal(
    op: Operator,
    *,
    method: DiagonalMethod = "hutchinson",
    rtol: float = 0.1,
    max_products: int = 300,
    generator: torch.Generator,
) -> DiagonalEstimate:
    """diag A from products, until ``‖stderr‖ ≤ rtol · ‖values‖``, in the operator's unit.

    - ``hutchinson``: mean of ``z ⊙ Az`` over Rademacher z; entry i has variance ``Σ_{j≠i} A_ij²``.
      Memory: three vectors and a block of probes.
    - ``xdiag``: leave-one-out over a sketch, for fast decay; half the products build the sketch.
      Memory: two sketches and their signs.

    Rounds, ``converged`` and the exact way out are those of :func:`trace`.

    Raises:
        ValueError: as :func:`trace`.

    Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix"; Epperly,
    Tropp & Webber 2024, "XTrace" (XDiag).
    """
    _check_choice("method", method, get_args(DiagonalMethod))
    needed, first_round = {"hutchinson": (2, 8), "xdiag": (4, 16)}[method]
    _check_budget(op, rtol, max_products, needed, method, generator)
    if op.space.dim <= min(first_round, max_products):
        return _exact_diagonal_estimate(op, 0)
    run = {"hutchinson": _hutchinson_diagonal, "xdiag": _xdiag}[method]
    return run(op, rtol, max_products, generator)


def eigenpairs(
    op: Operator,
    k: int = 1,
    *,
    which: Which = "LM",
    method: EigenMethod = "lanczos",
    tol: float = 1e-2,
    max_products: int = 200,
    max_basis: int | None = None,
    generator: torch.Generator,
    start: Float[Tensor, " n"] | None = None,
) -> EigenPairs:
    """Extreme eigenpairs, until every eigenvalue's estimated error is within ``tol · |λ|``.

    ``which``: ``LM`` largest magnitude, ``LA`` largest, ``SA`` smallest, ``BE`` k largest and k
    smallest. The error of a value is estimated as ``min(r, r²/gap)`` with its residual r and the
    gap to the nearest other Ritz value, which counts at its value ± its own residual. An error at
    rounding level of the largest value is always accepted. At least 6 products are made, and what
    the values still have to go, by their last two steps, must be less than the tolerance, before a
    result is believed, unless the space is exhausted sooner. The errors say how close each value is
    to an eigenvalue; that none is skipped rests on the start's share in every wanted eigenvector.

    - ``lanczos``: one product a step, full reorthogonalisation, convergence tested after each
      product. At ``max_basis`` vectors it restarts with the best Ritz vectors (thick restart). At
      an invariant subspace it goes on with a random vector orthogonal to it, until no eigenvalue of
      the rest can be missing. Before that, a single starting vector sees one copy of a repeated
      eigenvalue; where multiplicities matter, use ``lobpcg``. Memory: a basis of ``max_basis``
      vectors, of up to ``max_products`` if None, and k vectors at the end.
    - ``lobpcg``: a block of k vectors (2k for both ends; ``LM`` looks at both), each of which costs
      one product an iteration until it has converged. Finds up to k copies of a repeated
      eigenvalue. Memory: six blocks.

    Args:
        start: first vector, used as it is; the rest of a block is random.

    Raises:
        ValueError: k outside 1…n (n/2 for ``BE``), ``tol`` ≤ 0, an unknown name, ``max_products``
            or ``max_basis`` too small for k, ``max_basis`` with ``lobpcg``, a zero ``start``, a
            dtype other than float32 and float64.
        FloatingPointError: a product with non-finite numbers.

    Source: Golub & Van Loan 2013, §10.1–10.3; Wu & Simon 2000, "Thick-restart Lanczos method for
    large symmetric eigenvalue problems"; Parlett 1998, "The symmetric eigenvalue problem" ("twice
    is enough", Kato–Temple bounds); Knyazev 2001, "Toward the optimal preconditioned eigensolver".
    """
    _check_choice("which", which, get_args(Which))
    _check_choice("method", method, get_args(EigenMethod))
    _check_generator(generator)
    _check_dtype(op)
    n, total = op.space.dim, 2 * k if which == "BE" else k
    if not 1 <= total <= n or k < 1:
        raise ValueError(f"k={k} with which={which!r} asks for {total} of {n} eigenpairs")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    block = total if which != "LM" or method == "lanczos" else min(2 * k, n)
    if max_products < block:
        raise ValueError(
            f"max_products={max_products} is too small for a {method} run on {block} vectors"
        )
    if start is not None:
        op._check(start)
        if not 0 < float(torch.linalg.vector_norm(start)) < math.inf:
            raise ValueError("start must be a finite vector that is not zero")
    if method == "lobpcg":
        if max_basis is not None:
            raise ValueError(
                "max_basis belongs to lanczos; lobpcg keeps three blocks of its block size"
            )
        return _lobpcg(op, k, block, which, tol, max_products, generator, start)
    if max_basis is not None and max_basis < min(n, total + 3):
        raise ValueError(
            f"max_basis={max_basis} is too small for {total} eigenpairs; pass at least {min(n, total + 3)}"
        )
    return _lanczos(
        op, k, which, tol, max_products, min(max_basis or n, max_products, n), generator, start
    )


def density(
    op: Operator,
    *,
    runs: int = 10,
    steps: int = 60,
    generator: torch.Generator,
    points: int = 1024,
    sigma: float = 0.01,
) -> SpectralDensity:
    """The spectral density by stochastic Lanczos quadrature.

    Each run starts from a vector uniform on the sphere and makes ``steps`` Lanczos steps with full
    reorthogonalisation; the eigenvalues of its tridiagonal matrix are Gauss nodes and the squared
    first components of the eigenvectors their weights. A run has mean ``tr f(A) / n`` for every
    polynomial f of degree below ``2·steps``. ``density`` puts a Gaussian of width ``sigma ·``
    (range of the nodes) at every node; ``nodes`` and ``weights`` are unsmoothed.

    Cost: ``runs · steps`` products (fewer where a run meets an invariant subspace). Memory:
    ``steps`` vectors.

    Raises:
        ValueError: a count below 1, ``points`` below 2, ``sigma`` ≤ 0, a dtype other than float32
            and float64.
        FloatingPointError: a product with non-finite numbers.

    Source: Golub & Meurant 2010, "Matrices, moments and quadrature", §6; Ghorbani, Krishnan & Xiao
    2019, Alg. 1; Ubaru, Chen & Saad 2017, "Fast estimation of tr f(A) via stochastic Lanczos
    quadrature".
    """
    _check_generator(generator)
    _check_dtype(op)
    if runs < 1 or steps < 1 or points < 2 or not sigma > 0:
        raise ValueError(
            f"runs and steps must be ≥ 1, points ≥ 2, sigma > 0; got {runs}, {steps}, {points}, "
            f"{sigma}"
        )
    n = op.space.dim
    steps = min(steps, n)
    nodes, weights = np.zeros((runs, steps)), np.zeros((runs, steps))
    basis = _Basis(op, chunk=steps)
    products = 0
    for run in range(runs):
        basis.clear()
        v = _gaussian(op, 1, generator)[:, 0]
        basis.append(v / torch.linalg.vector_norm(v))
        t = np.zeros((steps, steps))
        for j in range(steps):
            w, beta, scale = _lanczos_step(op, basis, t, j)
            products += 1
            if j + 1 == steps or beta <= _negligible(op) * scale:
                break
            t[j, j + 1] = t[j + 1, j] = beta
            basis.append(w / beta)
        theta, s = np.linalg.eigh(t[: j + 1, : j + 1])
        nodes[run] = theta[-1]
        nodes[run, : j + 1], weights[run, : j + 1] = theta, s[0] ** 2
    low, high = float(nodes.min()), float(nodes.max())
    # One distinct eigenvalue has no range: its bell is as wide as sigma says of the value itself.
    width = sigma * ((high - low) or abs(high) or 1.0)
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    smooth = np.zeros(points)
    for node, weight in zip(nodes.ravel(), weights.ravel(), strict=True):
        smooth += weight * np.exp(-0.5 * ((grid - node) / width) ** 2)
    return SpectralDensity(
        nodes=torch.from_numpy(nodes),
        weights=torch.from_numpy(weights),
        grid=torch.from_numpy(grid),
        density=torch.from_numpy(smooth / (runs * width * math.sqrt(2 * math.pi))),
        num_products=products,
    )


# ---------------------------------------------------------------------------------------- arguments


def _check_choice(what: str, given: str, valid: Sequence[str]) -> None:
    if given not in valid:
        raise ValueError(f"{what}={given!r}; expected one of {', '.join(map(repr, valid))}")


def _check_generator(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise ValueError(
            f"pass a CPU generator (got one on {generator.device}): its draws are the same on "
            "every device"
        )


def _check_dtype(op: Operator) -> None:
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Lanczos bases need float32 or float64, the operator has {op.dtype}")


def _check_budget(
    op: Operator,
    rtol: float,
    max_products: int,
    needed: int,
    method: str,
    generator: torch.Generator,
) -> None:
    _check_generator(generator)
    _check_dtype(op)
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if op.space.dim < 1:
        raise ValueError("the operator's space has dimension 0")
    if max_products < (least := min(needed, op.space.dim)):
        raise ValueError(
            f"max_products={max_products} is too small: {method} needs at least {least}"
        )


# ------------------------------------------------------------------------------------- random draws


def signs(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Rademacher vectors as int8 ``(n, count)`` on the CPU, eight signs a byte, one vector after
    the other: the draw does not depend on how probes are grouped into blocks."""
    n = op.space.dim
    result = torch.empty(n, count, dtype=torch.int8)
    shifts = torch.arange(8, dtype=torch.uint8)
    for column in range(count):
        drawn = torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, generator=generator)
        bits = (drawn.unsqueeze(1) >> shifts) & 1
        result[:, column] = bits.view(torch.int8).reshape(-1)[:n] * 2 - 1
    return result


def _gaussian(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Standard normal ``(n, count)``, drawn in float32 whatever the operator's dtype, one vector
    after the other."""
    columns = [
        torch.randn(op.space.dim, dtype=torch.float32, generator=generator) for _ in range(count)
    ]
    empty = torch.zeros(op.space.dim, 0)
    return (torch.stack(columns, 1) if columns else empty).to(device=op.device, dtype=op.dtype)


def _on(op: Operator, v: Tensor) -> Tensor:
    return v.to(device=op.device, dtype=op.dtype)


def _blocks(op: Operator, count: int) -> list[int]:
    """``count`` probes in blocks that fit into memory."""
    size = max(1, min(count, _BLOCK_NUMBERS // op.space.dim))
    return [min(size, count - start) for start in range(0, count, size)]


# --------------------------------------------------------------------------------------- error bars


def _mean_and_stderr(samples: Tensor) -> tuple[float, float]:
    """Infinite standard error for a single sample."""
    samples = samples.double().cpu()
    # Relative to the first sample, equal samples give an error of exactly zero.
    centred = samples - samples[0]
    value = float(samples[0] + centred.mean())
    if len(samples) < 2:
        return value, math.inf
    return value, float((centred.var() / len(samples)).sqrt())


def believable(stderr: float, count: int) -> float:
    """90 % upper confidence bound of a standard error from ``count`` samples; infinite for fewer
    than 8."""
    if count < _ENOUGH:
        return math.inf
    return stderr * math.sqrt((count - 1) / float(chdtri(count - 1, 0.9)))


def _met(stderr: float, size: float, count: int, rtol: float) -> bool:
    if not math.isfinite(size):
        raise FloatingPointError(
            "a product of the operator is not finite; run the model in float32 or bfloat16"
        )
    return count >= _ENOUGH and believable(stderr, count) <= rtol * abs(size)


def _more(stderr: float, size: float, count: int, rtol: float) -> int:
    """Samples to add: what a standard error falling with the square root asks for, from half to all
    of ``count``."""
    if count < _ENOUGH:
        return _ENOUGH - count
    ratio = believable(stderr, count) / (rtol * abs(size)) if size else math.inf
    wanted = count * min(ratio, 1e6) ** 2 - count
    return math.ceil(min(max(wanted, count / 2), count))


def _exact_diagonal(op: Operator) -> Tensor:
    n = op.space.dim
    values, start = torch.empty(n, dtype=op.dtype, device=op.device), 0
    for width in _blocks(op, n):
        block = torch.zeros(n, width, dtype=op.dtype, device=op.device)
        block[start : start + width].fill_diagonal_(1)
        values[start : start + width] = (op @ block)[start : start + width].diagonal()
        start += width
    return values


def _exact_trace(op: Operator, spent: int) -> Estimate:
    value = float(_exact_diagonal(op).double().sum())
    return Estimate(
        value=value, stderr=0.0, num_items=0, num_products=spent + op.space.dim, converged=True
    )


def _exact_diagonal_estimate(op: Operator, spent: int) -> DiagonalEstimate:
    values = _exact_diagonal(op)
    return DiagonalEstimate(
        values=values,
        stderr=torch.zeros_like(values),
        num_products=spent + op.space.dim,
        converged=True,
    )


# -------------------------------------------------------------------------------------------- trace


def _hutchinson(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> Estimate:
    n, samples, add = op.space.dim, torch.zeros(0, dtype=torch.float64), _ENOUGH
    value, stderr = 0.0, math.inf
    while True:
        add = min(add, max_products - len(samples))
        for width in _blocks(op, add):
            z = _on(op, signs(op, width, generator))
            samples = torch.cat([samples, (z * (op @ z)).sum(0, dtype=torch.float64).cpu()])
        value, stderr = _mean_and_stderr(samples)
        met = _met(stderr, value, len(samples), rtol)
        if met or len(samples) == max_products:
            count = len(samples)
            return Estimate(
                value=value, stderr=stderr, num_items=count, num_products=count, converged=met
            )
        add = _more(stderr, value, len(samples), rtol)
        if add >= n and len(samples) + n <= max_products:
            return _exact_trace(op, len(samples))


class _Sketch:
    """An orthonormal basis Q of the range of ``A Ω``, with ``H = QᵀAQ``; it grows and keeps what it
    has."""

    def __init__(self, op: Operator) -> None:
        self.op, self.products, self.scale = op, 0, 0.0
        self.q = torch.zeros(op.space.dim, 0, dtype=op.dtype, device=op.device)
        self.h = torch.zeros(0, 0, dtype=torch.float64)

    def grow(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in ``A Ω`` for new columns Ω; returns it and ``A`` times the new columns of Q."""
        y = self.op @ omega
        self.scale = max(self.scale, float(torch.linalg.vector_norm(y, dim=0).max()))
        new = _complement(self.q, y, _rounding(self.op) * self.scale)
        self.q = torch.cat([self.q, new], 1)
        w = self.op @ new if new.shape[1] else new
        self.products += omega.shape[1] + new.shape[1]
        old = len(self.h)
        h = torch.zeros(self.q.shape[1], self.q.shape[1], dtype=torch.float64)
        column = _float64(self.q.mT @ w)
        h[:old, :old] = self.h
        h[:, old:] = column
        h[old:, :] = column.mT
        h[old:, old:] = (column[old:] + column[old:].mT) / 2
        self.h = h
        return y, w


def _complement(basis: Tensor, block: Tensor, floor: float) -> Tensor:
    """Orthonormal columns that span the part of ``block`` outside ``basis``; directions shorter
    than ``floor`` are rounding error and are dropped."""
    block = block[:, : basis.shape[0] - basis.shape[1]]
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
    q, r = torch.linalg.qr(block)
    q = q[:, r.diagonal().abs() > floor]
    # What survives a cancellation may have lost its orthogonality: project once more, and drop what
    # that shortens.
    q, r = torch.linalg.qr(q - basis @ (basis.mT @ q))
    return q[:, r.diagonal().abs() > 0.5]


def _hutch_plus_plus(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> Estimate:
    n, sketch = op.space.dim, _Sketch(op)
    probes = torch.zeros(
        n, 0, dtype=torch.int8
    )  # kept, a byte a sign, because a larger Q needs Qᵀg and (AQ)ᵀg again
    # For each probe g and each column q: qᵀg and qᵀAg; and gᵀAg. They give gᵀ(I−QQᵀ)A(I−QQᵀ)g for
    # every later Q.
    along, across = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    energy = torch.zeros(0, dtype=torch.float64)

    def grow(count: int) -> None:
        nonlocal along, across
        old = sketch.q.shape[1]
        _, w = sketch.grow(_on(op, signs(op, count, generator)))
        new = sketch.q[:, old:]
        rows, start = torch.zeros(2, new.shape[1], probes.shape[1], dtype=torch.float64), 0
        for width in _blocks(op, probes.shape[1]):
            g = _on(op, probes[:, start : start + width])
            rows[0, :, start : start + width] = _float64(new.mT @ g)
            rows[1, :, start : start + width] = _float64(w.mT @ g)
            start += width
        along, across = torch.cat([along, rows[0]]), torch.cat([across, rows[1]])

    def probe(count: int) -> None:
        nonlocal probes, along, across, energy
        for width in _blocks(op, count):
            drawn = signs(op, width, generator)
            g = _on(op, drawn)
            ag = op @ g
            along = torch.cat([along, _float64(sketch.q.mT @ g)], 1)
            across = torch.cat([across, _float64(sketch.q.mT @ ag)], 1)
            energy = torch.cat([energy, (g * ag).sum(0, dtype=torch.float64).cpu()])
            probes = torch.cat([probes, drawn], 1)

    def result() -> tuple[float, float]:
        rest = energy - 2 * (along * across).sum(0) + (along * (sketch.h @ along)).sum(0)
        value, stderr = _mean_and_stderr(rest)
        return value + float(sketch.h.trace()), stderr

    def spent() -> int:
        return sketch.products + probes.shape[1]

    third = min(_ENOUGH, max_products // 3)
    grow(third)
    probe(min(_ENOUGH, max_products - spent()))
    sketching = True
    while True:
        value, stderr = result()
        met = _met(stderr, value, probes.shape[1], rtol)
        left = max_products - spent()
        if met or left < 1:
            return Estimate(
                value=value,
                stderr=stderr,
                num_items=probes.shape[1],
                num_products=spent(),
                converged=met,
            )
        columns = min(math.ceil(sketch.q.shape[1] / 2), left // 2, (n - sketch.q.shape[1]) // 2)
        add = _more(stderr, value, probes.shape[1], rtol)
        if (2 * columns if sketching and columns else add) >= n // 2 and n <= left:
            return _exact_trace(op, spent())
        if sketching and columns:
            before = stderr
            grow(columns)
            value, stderr = result()
            # The same products spent on probes would have taken the variance down by m / (m +
            # 2·columns).
            sketching = stderr**2 * (probes.shape[1] + 2 * columns) < before**2 * probes.shape[1]
            if _met(stderr, value, probes.shape[1], rtol):
                continue
            add = min(math.ceil(probes.shape[1] / 2), _more(stderr, value, probes.shape[1], rtol))
        if (left := max_products - spent()) > 0:
            probe(min(add, left))


def _leave_one_out(r: Tensor, rounding: float) -> Tensor:
    """``S [q, m]`` for coordinates ``R [q, m]`` of the sketch in Q: column i is the unit vector of
    span(R) orthogonal to all other columns of R, or zero where column i lies in the span of the
    others (a rank-deficient sketch)."""
    lengths = torch.linalg.vector_norm(r, dim=0)
    scaled = r / torch.where(lengths > 0, lengths, 1.0)
    q, m = r.shape
    if q == 0:
        return r
    if q == m:
        inverse = torch.linalg.inv(scaled)
    else:
        u, sigma, vt = torch.linalg.svd(scaled, full_matrices=False)
        kept = sigma > rounding * sigma[0]
        inverse = vt[kept].mT @ (u[:, kept] / sigma[kept]).mT
        alone = (vt[kept] ** 2).sum(0) > 1 - 1e-6
        inverse = inverse * alone.unsqueeze(1)
    lengths = torch.linalg.vector_norm(inverse, dim=1, keepdim=True)
    return (inverse / torch.where(lengths > 0, lengths, 1.0)).mT


def _xtrace(op: Operator, rtol: float, max_products: int, generator: torch.Generator) -> Estimate:
    n, sketch = op.space.dim, _Sketch(op)
    omegas = torch.zeros(n, 0, dtype=op.dtype, device=op.device)
    r = w = torch.zeros(0, 0, dtype=torch.float64)  # Qᵀ A Ω and Qᵀ Ω
    norms = torch.zeros(0, dtype=torch.float64)
    add = _ENOUGH
    while True:
        add = min(add, (max_products - sketch.products) // 2)
        old, m = sketch.q.shape[1], omegas.shape[1]
        omega = _gaussian(op, add, generator)
        y, az = sketch.grow(omega)
        new = sketch.q[:, old:]
        # Qᵀ A Ω of old columns Ω in new directions of Q: zero but for rounding, as AΩ lies in the
        # old span.
        r = _grown(r, _float64(az.mT @ omegas), _float64(sketch.q.mT @ y))
        w = _grown(w, _float64(new.mT @ omegas), _float64(sketch.q.mT @ omega))
        norms = torch.cat([norms, (omega**2).sum(0, dtype=torch.float64).cpu()])
        omegas, m = torch.cat([omegas, omega], 1), m + add
        value, stderr = _mean_and_stderr(_xtrace_samples(r, w, sketch.h, norms, n, _rounding(op)))
        met = _met(stderr, value, m, rtol)
        add = max(4, m // 2)
        left = max_products - sketch.products
        if met or left < 2:
            return Estimate(
                value=value, stderr=stderr, num_items=m, num_products=sketch.products, converged=met
            )
        if 2 * min(add, left // 2) + sketch.q.shape[1] >= n:
            if n <= left:
                return _exact_trace(op, sketch.products)
            if m + 1 >= n:
                return Estimate(
                    value=value,
                    stderr=stderr,
                    num_items=m,
                    num_products=sketch.products,
                    converged=met,
                )
            add = min(add, n - 1 - m)


def _xtrace_samples(
    r: Tensor, w: Tensor, h: Tensor, norms: Tensor, n: int, rounding: float
) -> Tensor:
    """The m leave-one-out estimates ``tr Q_iᵀAQ_i + c_i vᵀAv``, ``v = (I − Q_i Q_iᵀ) ω_i``, from
    small matrices."""
    s = _leave_one_out(r, rounding)
    along = (s * w).sum(0)
    u = w - s * along  # coordinates of Q_i Q_iᵀ ω_i
    energy = (w * r).sum(0) - 2 * (u * r).sum(0) + (u * (h @ u)).sum(0)
    length = norms - (w**2).sum(0) + along**2
    # v is uniform on directions of a space of this dimension: fixing its length takes the length's
    # variance out.
    free = n - len(h) + (s**2).sum(0)
    rest = torch.where((free > 0.5) & (length > rounding * norms), free * energy / length, 0.0)
    return h.trace() - (s * (h @ s)).sum(0) + rest


def _grown(old: Tensor, below: Tensor, right: Tensor) -> Tensor:
    """``[[old, ·], [below, ·]]`` with ``right`` as the new columns."""
    return torch.cat([torch.cat([old, below]), right], 1)


# ----------------------------------------------------------------------------------------- diagonal


def _hutchinson_diagonal(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> DiagonalEstimate:
    n, count, add = op.space.dim, 0, _ENOUGH
    mean = torch.zeros(n, dtype=op.dtype, device=op.device)
    spread = torch.zeros_like(mean)
    while True:
        for width in _blocks(op, min(add, max_products - count)):
            z = _on(op, signs(op, width, generator))
            for sample in (z * (op @ z)).unbind(1):
                # Welford: sums of squares would lose small variances of large entries
                count += 1
                delta = sample - mean
                mean = mean + delta / count if count > 1 else sample
                spread = spread + delta * (sample - mean) if count > 1 else spread
        stderr = (spread.clamp_min(0) / (count * (count - 1))).sqrt()
        error, size = _norm(stderr), _norm(mean)
        met = _met(error, size, count, rtol)
        if met or count >= max_products:
            return DiagonalEstimate(values=mean, stderr=stderr, num_products=count, converged=met)
        add = _more(error, size, count, rtol)
        if add >= n and count + n <= max_products:
            return _exact_diagonal_estimate(op, count)


def _xdiag(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> DiagonalEstimate:
    n, sketch, add = op.space.dim, _Sketch(op), _ENOUGH
    omegas = torch.zeros(n, 0, dtype=torch.int8)
    az = torch.zeros(n, 0, dtype=op.dtype, device=op.device)  # A Q
    r = torch.zeros(0, 0, dtype=torch.float64)  # Qᵀ A Ω
    while True:
        add = min(add, (max_products - sketch.products) // 2)
        omega = signs(op, add, generator)
        y, new = sketch.grow(_on(op, omega))
        below = torch.zeros(new.shape[1], omegas.shape[1], dtype=torch.float64)
        r = _grown(r, below, _float64(sketch.q.mT @ y))
        omegas, az = torch.cat([omegas, omega], 1), torch.cat([az, new], 1)
        m = omegas.shape[1]
        values, stderr = _xdiag_values(sketch.q, az, _leave_one_out(r, _rounding(op)), r, omegas)
        error, size = _norm(stderr), _norm(values)
        met = _met(error, size, m, rtol)
        left = max_products - sketch.products
        add = max(4, m // 2)
        if met or left < 2:
            return DiagonalEstimate(
                values=values, stderr=stderr, num_products=sketch.products, converged=met
            )
        if 2 * min(add, left // 2) + sketch.q.shape[1] >= n:
            if n <= left:
                return _exact_diagonal_estimate(op, sketch.products)
            if m + 1 >= n:
                return DiagonalEstimate(
                    values=values, stderr=stderr, num_products=sketch.products, converged=met
                )
            add = min(add, n - 1 - m)


def _xdiag_values(
    q: Tensor, az: Tensor, s: Tensor, r: Tensor, omegas: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard error of ``diag(Q_i Q_iᵀ A) + ω_i ⊙ (I − Q_i Q_iᵀ) A ω_i`` over the m
    left-out columns."""
    common = (q * az).sum(1)
    mean, spread = torch.zeros_like(common), torch.zeros_like(common)
    m = omegas.shape[1]
    along = (s * r).sum(0)
    for i in range(m):
        direction = s[:, i].to(device=q.device, dtype=q.dtype)
        left_out = q @ direction
        sign = omegas[:, i].to(device=q.device, dtype=q.dtype)
        sample = left_out * (sign * float(along[i]) - az @ direction)
        delta = sample - mean
        mean = mean + delta / (i + 1)
        spread = spread + delta * (sample - mean)
    return common + mean, (spread.clamp_min(0) / (m * (m - 1))).sqrt()


# ------------------------------------------------------------------------------------------ Lanczos


class _Basis:
    """Vectors as rows of chunks, so that it grows without being copied."""

    def __init__(self, op: Operator, chunk: int = _CHUNK) -> None:
        self.op, self.chunk, self.size = op, chunk, 0
        self.chunks: list[Tensor] = []

    def __len__(self) -> int:
        return self.size

    def clear(self) -> None:
        self.size = 0

    def append(self, v: Tensor) -> None:
        if self.size == self.chunk * len(self.chunks):
            self.chunks.append(torch.empty(self.chunk, len(v), dtype=v.dtype, device=v.device))
        self.chunks[self.size // self.chunk][self.size % self.chunk] = v
        self.size += 1

    def __getitem__(self, i: int) -> Tensor:
        return self.chunks[i // self.chunk][i % self.chunk]

    def _filled(self) -> list[Tensor]:
        return [
            c[: self.size - i * self.chunk]
            for i, c in enumerate(self.chunks)
            if i * self.chunk < self.size
        ]

    def dot(self, w: Tensor) -> Tensor:
        return torch.cat([c @ w for c in self._filled()])

    def subtract_(self, w: Tensor, coefficients: Tensor) -> None:
        """``w −= Σ coefficientsᵢ vᵢ``, in place."""
        for c, part in zip(self._filled(), coefficients.split(self.chunk), strict=True):
            w.addmv_(c.mT, part, alpha=-1)

    def combine(self, s: np.ndarray) -> Tensor:
        """``(n, k)``: the linear combinations given by the columns of ``s [size, k]``."""
        coefficients = torch.from_numpy(np.ascontiguousarray(s)).to(
            device=self.op.device, dtype=self.op.dtype
        )
        result = torch.zeros(
            self.op.space.dim, s.shape[1], dtype=self.op.dtype, device=self.op.device
        )
        for c, part in zip(self._filled(), coefficients.split(self.chunk), strict=True):
            result.addmm_(c.mT, part)
        return result

    def rotate_(self, s: np.ndarray) -> None:
        """Replaces the vectors by the combinations in ``s``'s columns, in place, a stripe of
        coordinates at a time."""
        coefficients = torch.from_numpy(np.ascontiguousarray(s.T)).to(
            device=self.op.device, dtype=self.op.dtype
        )
        stripe = max(1, _BLOCK_NUMBERS // 8 // max(1, self.size))
        for start in range(0, self.op.space.dim, stripe):
            old = torch.cat([c[:, start : start + stripe] for c in self._filled()])
            new = coefficients @ old
            for i, c in enumerate(self.chunks):
                part = new[i * self.chunk : (i + 1) * self.chunk]
                c[: len(part), start : start + stripe] = part
        self.size = s.shape[1]


def _lanczos_step(
    op: Operator, basis: _Basis, t: np.ndarray, j: int
) -> tuple[Tensor, float, float]:
    """One product with basis vector j, the last one. Fills ``t[j, j]``; returns the remainder
    orthogonal to the basis, its norm β, and the size of A as seen so far. Row j of ``t`` must hold
    the couplings to earlier vectors."""
    w = op @ basis[j]
    scale = float(torch.linalg.vector_norm(w))
    if not math.isfinite(scale):
        raise FloatingPointError(
            "a product of the operator is not finite; run the model in float32 or bfloat16"
        )
    for i in np.flatnonzero(t[j, :j]):
        w = w - float(t[j, i]) * basis[int(i)]
    t[j, j] = float(torch.dot(basis[j], w))
    w = w - float(t[j, j]) * basis[j]  # a new tensor: what the operator returned may be its own
    before = float(torch.linalg.vector_norm(w))
    basis.subtract_(w, basis.dot(w))
    beta = float(torch.linalg.vector_norm(w))
    if beta < before / math.sqrt(
        2
    ):  # Kahan–Parlett: a shortened vector has kept its rounding errors
        basis.subtract_(w, basis.dot(w))
        beta = float(torch.linalg.vector_norm(w))
    return w, beta, max(scale, float(np.abs(t).max()))


def _fresh_direction(op: Operator, basis: _Basis, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the basis, which must not be complete."""
    while True:
        v = _gaussian(op, 1, generator)[:, 0]
        v = v / torch.linalg.vector_norm(v)
        for _ in range(3 if len(basis) else 0):
            basis.subtract_(v, basis.dot(v))
            v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        if float(torch.linalg.vector_norm(v)) > 0.5 and (
            not len(basis) or float(basis.dot(v).abs().max()) < math.sqrt(torch.finfo(v.dtype).eps)
        ):
            return v


def _lanczos(
    op: Operator,
    k: int,
    which: Which,
    tol: float,
    max_products: int,
    max_basis: int,
    generator: torch.Generator,
    start: Tensor | None,
) -> EigenPairs:
    n = op.space.dim
    basis = _Basis(op, chunk=min(_CHUNK, max_basis))
    first = start if start is not None else _gaussian(op, 1, generator)[:, 0]
    basis.append(first / torch.linalg.vector_norm(first))
    t = np.zeros((max_basis + 1, max_basis + 1))
    # Vectors before ``active`` span an invariant subspace: its Ritz pairs are exact and T is block
    # diagonal there.
    active = 0
    locked = np.zeros(0), np.zeros((0, 0)), np.zeros(0)
    # A given start may lie in an invariant subspace that misses the wanted end; a random one does
    # not.
    unproven = start is not None
    products = 0
    before = moved = np.zeros(0)
    while True:
        j = len(basis) - 1
        w, beta, scale = _lanczos_step(op, basis, t, j)
        products += 1
        if complete := j + 1 == n:
            beta = 0.0  # nothing is left outside, the remainder is rounding error
        values, s = np.linalg.eigh(t[active : j + 1, active : j + 1])
        theta = np.concatenate([locked[0], values])
        residuals = np.concatenate([locked[2], beta * np.abs(s[-1])])
        errors = _kato_temple(theta, residuals)
        invariant = complete or beta <= _negligible(op) * max(scale, float(np.abs(theta).max()))
        wanted = _wanted(theta, k, which)
        met = len(wanted) > 0 and _all_met(theta, errors, wanted, tol, op)
        # At the edge of a dense spectrum r²/gap is too good: the values must also have stopped
        # moving.
        moved, last = _moved(theta[wanted], before), moved
        before = theta[wanted]
        if met and not complete:
            still = bool((_still_to_go(moved, last) <= _tolerance(theta, tol, op)[wanted]).all())
            met = not unproven if invariant else products >= _STEPS and still
            # No eigenvalue of what is not yet spanned exceeds the best of the running block (a
            # random start in what the locked vectors leave): nothing is missing once that best is
            # no better than the last one wanted.
            if invariant or active:
                met = met and _nothing_missing(theta, errors, wanted, active, k, which, tol, op)
        old = len(locked[0])
        ritz = np.zeros((j + 1, len(theta)))  # coordinates of the Ritz vectors in the basis
        ritz[:active, :old], ritz[active:, old:] = locked[1], s
        if met or complete or products == max_products:
            vectors = basis.combine(ritz[:, wanted])
            return _pairs(theta, residuals, errors, wanted, vectors, products, met or complete)
        if invariant:
            locked = theta, ritz, residuals
            active = j + 1
            unproven = False
        if j + 1 == max_basis:
            # Keep room for a few steps; the wanted pairs come first, then their neighbours, which
            # speed up convergence.
            keep = max(
                min((max_basis + 1) // 2, max_basis - 2), min(_count(k, which) + 1, max_basis - 2)
            )
            order = _by_interest(theta, which)[:keep]
            if not invariant and not (order >= old).any():
                # The running block must go on from somewhere: its best vector takes the last place.
                order[-1] = next(i for i in _by_interest(theta, which) if i >= old)
            order = np.sort(order)  # locked ones first
            basis.rotate_(ritz[:, order])
            size, active = len(order), len(order) if invariant else int((order < old).sum())
            t[:] = 0
            t[range(size), range(size)] = theta[order]
            locked = theta[order[:active]], np.eye(active), residuals[order[:active]]
            if not invariant:
                t[size, active:size] = t[active:size, size] = beta * s[-1, order[active:] - old]
                basis.append(w / beta)
                continue
        if invariant:
            basis.append(_fresh_direction(op, basis, generator))
        else:
            t[j, j + 1] = t[j + 1, j] = beta
            basis.append(w / beta)


def _count(k: int, which: Which) -> int:
    return 2 * k if which == "BE" else k


def _sides(theta: np.ndarray, which: Which) -> list[np.ndarray]:
    """Scores, larger is more wanted: one array for each end."""
    scores = {"LM": [np.abs(theta)], "LA": [theta], "SA": [-theta], "BE": [theta, -theta]}
    return scores[which]


def _best(theta: np.ndarray, k: int, which: Which) -> np.ndarray:
    """Indices of the k most wanted of each end; no index twice."""
    chosen: list[int] = []
    for scores in _sides(theta, which):
        order = [int(i) for i in np.argsort(-scores, kind="stable") if int(i) not in chosen]
        chosen += order[:k]
    return np.array(chosen, dtype=np.int64)


def _wanted(theta: np.ndarray, k: int, which: Which) -> np.ndarray:
    """As :func:`_best`, or empty while there are fewer Ritz values than that."""
    return _best(theta, k, which) if len(theta) >= _count(k, which) else np.zeros(0, dtype=np.int64)


def _by_interest(theta: np.ndarray, which: Which) -> np.ndarray:
    """All indices, the most wanted first, the ends in turn."""
    orders = [np.argsort(-scores, kind="stable") for scores in _sides(theta, which)]
    return np.array(
        list(dict.fromkeys(int(i) for turn in zip(*orders, strict=True) for i in turn)),
        dtype=np.int64,
    )


def _kato_temple(theta: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """``min(r, r²/gap)``; a neighbour counts at its value less its own residual; without a
    neighbour the bound is r."""
    if len(theta) < 2:
        return residuals.copy()
    gaps = np.abs(theta[:, None] - theta[None, :]) - residuals[None, :]
    np.fill_diagonal(gaps, np.inf)
    gap = gaps.min(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap > 0, np.minimum(residuals, residuals**2 / gap), residuals)


def _tolerance(theta: np.ndarray, tol: float, op: Operator) -> np.ndarray:
    """Error allowed to each value: relative to it, or what rounding makes of the largest."""
    return np.maximum(tol * np.abs(theta), _rounding(op) * np.abs(theta).max())


def _all_met(
    theta: np.ndarray, errors: np.ndarray, wanted: np.ndarray, tol: float, op: Operator
) -> bool:
    return bool((errors <= _tolerance(theta, tol, op))[wanted].all())


def _moved(values: np.ndarray, before: np.ndarray) -> np.ndarray:
    """How far each value went in the last step; infinitely far in the first."""
    return np.abs(values - before) if len(values) == len(before) else np.full(len(values), np.inf)


def _still_to_go(moved: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The sum of the steps to come if they go on shrinking by the ratio of the last two (Aitken),
    at most the last."""
    if len(moved) != len(last):
        return moved
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(last > 2 * moved, np.minimum(moved, moved**2 / (last - moved)), moved)


def _nothing_missing(
    theta: np.ndarray,
    errors: np.ndarray,
    wanted: np.ndarray,
    active: int,
    k: int,
    which: Which,
    tol: float,
    op: Operator,
) -> bool:
    """Whether the running block's best value has converged and is no better than the last wanted
    one, at each end."""
    allowed = _tolerance(theta, tol, op)
    for side, scores in enumerate(_sides(theta, which)):
        best = active + int(np.argmax(scores[active:]))
        last = wanted[(side + 1) * k - 1]
        level = max(allowed[best], allowed[last])
        if errors[best] > level or scores[best] > scores[last] + level:
            return False
    return True


def _pairs(
    theta: np.ndarray,
    residuals: np.ndarray,
    errors: np.ndarray,
    wanted: np.ndarray,
    vectors: Tensor,
    products: int,
    converged: bool,
) -> EigenPairs:
    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x[wanted])).to(
            device=vectors.device, dtype=vectors.dtype
        )

    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    return EigenPairs(
        values=tensor(theta),
        vectors=vectors,
        residuals=tensor(residuals),
        errors=tensor(errors),
        num_products=products,
        converged=converged,
    )


# ------------------------------------------------------------------------------------------- LOBPCG


def _lobpcg(
    op: Operator,
    k: int,
    block: int,
    which: Which,
    tol: float,
    max_products: int,
    generator: torch.Generator,
    start: Tensor | None,
) -> EigenPairs:
    """Rayleigh–Ritz on ``[X, P, R]`` in an orthonormal basis; its image under A is carried along,
    not recomputed."""
    n = op.space.dim
    # LM looks at both ends, then takes the largest magnitudes of what it found.
    sides: Which = "BE" if which == "LM" and block > k else which
    per_side = block // 2 if sides == "BE" else block
    x = _gaussian(op, block - (start is not None), generator)
    if start is not None:
        x = torch.cat([start.unsqueeze(1), x], 1)
    basis = _complement(x[:, :0], x / torch.linalg.vector_norm(x, dim=0), 0.0)
    image = op @ basis
    products = basis.shape[1]
    rank = products
    while True:
        theta, c, residuals = _rayleigh_ritz(basis, image)
        errors = _kato_temple(theta, residuals)
        selected = _best(theta, per_side, sides)
        wanted = _wanted(theta, k, which)
        met = len(wanted) > 0 and _all_met(theta, errors, wanted, tol, op)
        met = met and (products >= min(_STEPS, n) or basis.shape[1] == n)
        left = max_products - products
        if met or left < 1 or basis.shape[1] == n:
            chosen = wanted if len(wanted) else _best(theta, k, which)
            vectors = basis @ _as(c[:, chosen], op)
            return _pairs(
                theta, residuals, errors, chosen, vectors, products, met or basis.shape[1] == n
            )
        coefficients = c[:, selected]
        direction = coefficients.copy()
        direction[:rank] = 0  # P: what this step added to X
        if basis.shape[1] > rank:
            q, r = np.linalg.qr(direction - coefficients @ (coefficients.T @ direction))
            q = q[:, np.abs(np.diag(r)) > 1e-10]
            q, r = np.linalg.qr(q - coefficients @ (coefficients.T @ q))
            q = q[:, np.abs(np.diag(r)) > 0.5]
            mix = np.concatenate([coefficients, q], 1)
        else:
            mix = coefficients
        basis, image = basis @ _as(mix, op), image @ _as(mix, op)
        rank = len(selected)
        open_ = errors[selected] > _tolerance(theta, tol, op)[selected]
        if not open_.any():
            open_[:] = True
        columns = np.flatnonzero(open_)[:left]
        x, ax = basis[:, columns], image[:, columns]
        rest = ax - x * _as(theta[selected][columns], op)
        lengths = torch.linalg.vector_norm(rest, dim=0)
        floor = float(_rounding(op) * max(np.abs(theta).max(), torch.finfo(op.dtype).tiny))
        rest = rest[:, lengths > floor] / lengths[lengths > floor]
        new = _complement(basis, rest, _rounding(op))
        if new.shape[1] == 0:
            # Every residual is rounding error, so X spans an invariant subspace: only chance leads
            # out of it.
            new = _complement(basis, _gaussian(op, min(len(columns), left), generator), 0.0)
        added = op @ new
        products += new.shape[1]
        basis, image = torch.cat([basis, new], 1), torch.cat([image, added], 1)


def _rayleigh_ritz(basis: Tensor, image: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values, their coordinates and the norms of their residuals."""
    h = _float64(basis.mT @ image)
    if not bool(torch.isfinite(h).all()):
        raise FloatingPointError(
            "a product of the operator is not finite; run the model in float32 or bfloat16"
        )
    theta, c = np.linalg.eigh(((h + h.mT) / 2).numpy())
    residuals = np.empty(len(theta))
    for i in range(len(theta)):
        coordinates = torch.from_numpy(c[:, i].copy()).to(device=basis.device, dtype=basis.dtype)
        residuals[i] = float(
            torch.linalg.vector_norm(image @ coordinates - theta[i] * (basis @ coordinates))
        )
    return theta, c, residuals


# ------------------------------------------------------------------------------------------ numbers


def _rounding(op: Operator) -> float:
    """Relative size below which a number may be rounding error of a product."""
    return torch.finfo(op.dtype).eps * max(32.0, math.sqrt(op.space.dim))


def _negligible(op: Operator) -> float:
    """Relative size of a remainder that ends a Krylov space. Small remainders before it magnify
    rounding errors, so this lies above them; leaving such a coupling out moves a Ritz value by its
    square."""
    return max(_rounding(op), torch.finfo(op.dtype).eps ** 0.7)


def _float64(x: Tensor) -> Tensor:
    return x.to(device="cpu", dtype=torch.float64)


def _as(x: np.ndarray, op: Operator) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(device=op.device, dtype=op.dtype)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
