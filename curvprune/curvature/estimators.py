"""Trace, diagonal, extreme eigenpairs and spectral density of any symmetric operator, from products
alone.

Every estimate says how far off it may be and whether it met what was asked. Products are the
expensive part (passes over the data). So Lanczos tests convergence after each of them, and a sketch
that grows keeps those it has. All randomness is drawn on the CPU from the caller's generator: the
same seed gives the same probes on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from curvprune.curvature.estimates import DiagonalEstimate, EigenPairs, Estimate
from curvprune.curvature.hutchinson import (
    exact_diagonal,
    exact_trace,
    hutchinson_diagonal,
    hutchinson_trace,
)
from curvprune.curvature.lanczos import Lanczos, lanczos
from curvprune.curvature.leave_one_out import xdiag, xtrace
from curvprune.curvature.lobpcg import Lobpcg, lobpcg
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import check_generator
from curvprune.curvature.ritz import Wanted, Which
from curvprune.curvature.sketches import hutch_plus_plus
from curvprune.curvature.spectral_density import SpectralDensity, lanczos_quadrature, smoothed
from curvprune.curvature.working_precision import norm, rounding

TraceMethod = Literal["hutch++", "hutchinson", "xtrace"]
DiagonalMethod = Literal["hutchinson", "xdiag"]

LANCZOS = Lanczos()


def trace(
    op: Operator,
    *,
    method: TraceMethod = "hutch++",
    rtol: float = 0.05,
    max_products: int = 300,
    generator: torch.Generator,
) -> Estimate:
    """tr A from products, to a standard error of ``rtol · |tr A|``, in the operator's measure.

    - ``hutchinson``: mean of ``zᵀAz`` over Rademacher z. Variance ``2 Σ_{i≠j} A_ij²``: exact for a
      diagonal A.
    - ``hutch++``: exact on the range Q of a sketch, Hutchinson on what is left, ``tr QᵀAQ + mean
      gᵀ(I−QQᵀ)A(I−QQᵀ)g``. The standard error is the second part's. The sketch stops growing when
      probes would lower the error faster.
    - ``xtrace``: leave-one-out over the sketch's own columns, with residuals normalised on the
      sphere. Best for fast decay. The standard error is the leave-one-out one, whose samples share
      most of their sketch. Measured, it is too small by up to a third (two standard errors covered
      80 to 93 % of 300 seeds).

    Products go in growing rounds, and a larger sketch keeps those of the smaller one. ``converged``
    asks for at least 8 samples, and for the 90 % upper bound of the standard error (χ²) to be
    within the tolerance: a few probes that agree by luck do not end the search. Where n products
    are about what the next round would take, and fit into ``max_products``, the diagonal is read
    off exactly: standard error 0.

    Memory: some probes at once for Hutchinson; Hutch++ and XTrace keep a sketch of at most
    ``max_products / 2`` vectors.

    Raises:
        ValueError: ``rtol`` ≤ 0, an unknown method, fewer products than two samples need, a
            generator not on the CPU.

    Source: Hutchinson 1989; Meyer, Musco, Musco & Woodruff 2021, "Hutch++", Alg. 1; Epperly, Tropp
    & Webber 2024, "XTrace: making the most of every sample in stochastic trace estimation".
    """
    _check_choice("method", method, get_args(TraceMethod))
    # Products that the method needs at least, and those of its first round.
    needed, first_round = {"hutchinson": (2, 8), "hutch++": (6, 24), "xtrace": (4, 16)}[method]
    _check_budget(op, rtol, max_products, method, needed, generator)
    # So small a space is read off in less than one round.
    if op.space.dim <= min(first_round, max_products):
        return exact_trace(op, 0)
    run = {"hutchinson": hutchinson_trace, "hutch++": hutch_plus_plus, "xtrace": xtrace}[method]
    return run(op, rtol, max_products, generator)


def diagonal(
    op: Operator,
    *,
    method: DiagonalMethod = "hutchinson",
    rtol: float = 0.1,
    max_products: int = 300,
    generator: torch.Generator,
) -> DiagonalEstimate:
    """diag A from products, until ``‖stderr‖ ≤ rtol · ‖values‖``, in the operator's measure.

    - ``hutchinson``: mean of ``z ⊙ Az`` over Rademacher z; entry i has variance ``Σ_{j≠i} A_ij²``.
      Memory: three vectors and some probes at once.
    - ``xdiag``: leave-one-out over a sketch, for fast decay; half the products build the sketch.
      Memory: two sketches and their signs.

    Rounds, ``converged`` and the exact way out are those of :func:`trace`.

    Raises:
        ValueError: as :func:`trace`.

    Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix"; Epperly,
    Tropp & Webber 2024, "XTrace" (XDiag).
    """
    _check_choice("method", method, get_args(DiagonalMethod))
    # As for the trace.
    needed, first_round = {"hutchinson": (2, 8), "xdiag": (4, 16)}[method]
    _check_budget(op, rtol, max_products, method, needed, generator)
    if op.space.dim <= min(first_round, max_products):
        return exact_diagonal(op, 0)
    run = {"hutchinson": hutchinson_diagonal, "xdiag": xdiag}[method]
    return run(op, rtol, max_products, generator)


def eigenpairs(
    op: Operator,
    k: int = 1,
    *,
    which: Which = "LM",
    method: Lanczos | Lobpcg = LANCZOS,
    tol: float = 1e-2,
    max_products: int = 200,
    generator: torch.Generator,
) -> EigenPairs:
    """Extreme eigenpairs, until every eigenvalue's estimated error is within ``tol · |λ|``.

    ``which``: ``LM`` largest magnitude, ``LA`` largest, ``SA`` smallest, ``BE`` k largest and k
    smallest, ``SM`` smallest magnitude. The last lie inside an indefinite spectrum, where Lanczos
    converges late: often only once it has made a product for every dimension. ``converged`` then
    says that each value is accurate; where the space is not exhausted, one nearer to zero may still
    be missing.

    The error of a value is estimated as ``min(r, r²/gap)``: r is its residual, gap the distance to
    the nearest other Ritz value, which counts at its value ± its own residual. An error at rounding
    level of the largest value is always accepted. A result is believed after at least 6 products,
    and once the values have less to go, by their last two steps, than the tolerance; or where the
    space is exhausted sooner. The errors say how close each value is to an eigenvalue. That none is
    skipped rests on the start's share in every wanted eigenvector.

    Args:
        method: :class:`Lanczos` (a basis that may be bounded, a start), or :class:`Lobpcg` where
            multiplicities matter.

    Raises:
        ValueError: k outside 1…n (n/2 for ``BE``), ``tol`` ≤ 0, an unknown name, ``max_products``
            or ``max_basis`` too small for k, a zero ``start``, a dtype other than float32 and
            float64; ``SM`` of an indefinite operator by LOBPCG.
        FloatingPointError: a product with non-finite numbers.

    Source: Golub & Van Loan 2013, §10.1–10.3; Wu & Simon 2000, "Thick-restart Lanczos method for
    large symmetric eigenvalue problems"; Parlett 1998, "The symmetric eigenvalue problem" ("twice
    is enough", Kato–Temple bounds); Knyazev 2001, "Toward the optimal preconditioned eigensolver".
    """
    # 1. What is asked for must make sense, and fit into the products that may be spent.
    _check_choice("which", which, get_args(Which))
    if not isinstance(method, (Lanczos, Lobpcg)):
        raise ValueError(f"method={method!r}; expected Lanczos(...) or Lobpcg(...)")
    check_generator(generator)
    _check_dtype(op)
    which = _searched(op, which, method)
    wanted = Wanted(k=k, which=which, tol=tol, rounding=rounding(op))
    n, total = op.space.dim, wanted.count
    if not 1 <= total <= n or k < 1:
        raise ValueError(f"k={k} with which={which!r} asks for {total} of {n} eigenpairs")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    # Vectors that the method starts with, at one product each.
    name, width = "lanczos", total
    if isinstance(method, Lobpcg):
        name = "lobpcg"
        if which == "LM":  # the largest magnitudes may lie at either end: k vectors look at each
            width = min(2 * k, n)
    if max_products < width:
        raise ValueError(
            f"max_products={max_products} is too small for a {name} run on {width} vectors"
        )
    if method.start is not None:
        op.check(method.start)
        if not 0 < norm(method.start) < math.inf:
            raise ValueError("start must be a finite vector that is not zero")

    # 2. LOBPCG has a size of its own; a Lanczos basis must hold the pairs and a few vectors more.
    if isinstance(method, Lobpcg):
        return lobpcg(
            op,
            wanted,
            width,
            max_products=max_products,
            generator=generator,
            start=method.start,
        )
    least = min(n, total + 3)
    if method.max_basis is not None and method.max_basis < least:
        raise ValueError(
            f"max_basis={method.max_basis} is too small for {total} eigenpairs; "
            f"pass at least {least}"
        )
    return lanczos(
        op,
        wanted,
        max_products=max_products,
        max_basis=min(method.max_basis or n, max_products, n),
        generator=generator,
        method=method,
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
    reorthogonalisation. The eigenvalues of its tridiagonal matrix are Gauss nodes, the squared
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
    check_generator(generator)
    _check_dtype(op)
    if runs < 1 or steps < 1 or points < 2 or not sigma > 0:
        raise ValueError(
            f"runs and steps must be ≥ 1, points ≥ 2, sigma > 0; got {runs}, {steps}, {points}, "
            f"{sigma}"
        )
    # Quadrature gives point masses; only the grid for plots is smoothed.
    nodes, weights, products = lanczos_quadrature(op, runs, min(steps, op.space.dim), generator)
    grid, smooth = smoothed(nodes, weights, points, sigma)
    return SpectralDensity(
        nodes=torch.from_numpy(nodes),
        weights=torch.from_numpy(weights),
        grid=torch.from_numpy(grid),
        density=torch.from_numpy(smooth),
        num_products=products,
        dim=op.space.dim,
    )


def _check_choice(what: str, given: str, valid: Sequence[str]) -> None:
    if given not in valid:
        raise ValueError(f"{what}={given!r}; expected one of {', '.join(map(repr, valid))}")


def _searched(op: Operator, which: Which, method: Lanczos | Lobpcg) -> Which:
    """The end to look at. Raises ``ValueError`` where the method cannot."""
    if which != "SM":
        return which
    if op.psd:  # where nothing is negative, the smallest are the nearest to zero
        return "SA"
    if isinstance(method, Lobpcg):
        raise ValueError(
            "which='SM' lies inside the spectrum of an indefinite operator, where LOBPCG finds "
            "nothing; use method=Lanczos()"
        )
    return which


def _check_dtype(op: Operator) -> None:
    # Half precision loses orthogonality, and with it all that is concluded from the basis.
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Lanczos bases need float32 or float64, the operator has {op.dtype}")


def _check_budget(
    op: Operator,
    rtol: float,
    max_products: int,
    method: str,
    needed: int,
    generator: torch.Generator,
) -> None:
    check_generator(generator)
    _check_dtype(op)
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    if op.space.dim < 1:
        raise ValueError("the operator's space has dimension 0")
    # A space smaller than that is read off exactly.
    least = min(needed, op.space.dim)
    if max_products < least:
        raise ValueError(
            f"max_products={max_products} is too small: {method} needs at least {least}"
        )
