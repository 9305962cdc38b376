"""XTrace and XDiag: every column of a sketch in turn is the probe of what the others leave over.

Source: Epperly, Tropp & Webber 2024, "XTrace: making the most of every sample in stochastic trace
estimation".
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvprune.curvature.estimates import (
    ENOUGH,
    DiagonalEstimate,
    Estimate,
    accurate,
    mean_and_stderr,
)
from curvprune.curvature.hutchinson import exact_diagonal, exact_trace
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import gaussian, moved, signs
from curvprune.curvature.sketches import Sketch
from curvprune.curvature.working_precision import in_float64, norm, rounding


def xtrace(op: Operator, rtol: float, max_products: int, generator: torch.Generator) -> Estimate:
    """See :func:`curvprune.curvature.trace`."""
    n, sketch = op.space.dim, Sketch(op)
    omegas = torch.zeros(n, 0, dtype=op.dtype, device=op.device)
    r = w = torch.zeros(0, 0, dtype=torch.float64)  # Qᵀ A Ω and Qᵀ Ω
    norms = torch.zeros(0, dtype=torch.float64)  # ‖ω‖²
    add = ENOUGH
    while True:
        # 1. New columns of the sketch, and what the small matrices need of them.
        add = min(add, (max_products - sketch.products) // 2)
        old = sketch.size
        omega = gaussian(op, add, generator)
        y, az = sketch.grow(omega)
        new = sketch.q[:, old:]
        r = _grown(r, in_float64(az.mT @ omegas), in_float64(sketch.q.mT @ y))
        w = _grown(w, in_float64(new.mT @ omegas), in_float64(sketch.q.mT @ omega))
        norms = torch.cat([norms, (omega**2).sum(0, dtype=torch.float64).cpu()])
        omegas = torch.cat([omegas, omega], 1)
        m = omegas.shape[1]

        # 2. The mean of the leave-one-out estimates, and whether its error bar will do.
        samples = _xtrace_samples(r, w, sketch.h, norms, n, rounding(op))
        value, stderr = mean_and_stderr(samples)
        met = accurate(stderr, value, m, rtol)

        # 3. The size of the next round. Where it would span the space, n products give the exact
        #    value.
        add = max(4, m // 2)
        left = max_products - sketch.products
        finished = met or left < 2
        if _spans(sketch, add, left):
            if not finished and n <= left:
                return exact_trace(op, sketch.products)
            add = min(add, n - 1 - m)
        if finished or add < 1:
            return Estimate(
                value=value, stderr=stderr, num_items=m, num_products=sketch.products, converged=met
            )


def xdiag(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> DiagonalEstimate:
    """See :func:`curvprune.curvature.diagonal`."""
    n, sketch = op.space.dim, Sketch(op)
    omegas = torch.zeros(n, 0, dtype=torch.int8)
    az = torch.zeros(n, 0, dtype=op.dtype, device=op.device)  # A Q
    r = torch.zeros(0, 0, dtype=torch.float64)  # Qᵀ A Ω
    add = ENOUGH
    while True:
        # 1. New columns of the sketch. Old columns of A Ω have nothing in new directions of Q.
        add = min(add, (max_products - sketch.products) // 2)
        omega = signs(op, add, generator)
        y, new = sketch.grow(moved(op, omega))
        below = torch.zeros(new.shape[1], omegas.shape[1], dtype=torch.float64)
        r = _grown(r, below, in_float64(sketch.q.mT @ y))
        omegas, az = torch.cat([omegas, omega], 1), torch.cat([az, new], 1)
        m = omegas.shape[1]

        # 2. The mean of the leave-one-out estimates, and whether its error bars will do.
        values, stderr = _xdiag_values(sketch.q, az, _leave_one_out(r, rounding(op)), r, omegas)
        met = accurate(norm(stderr), norm(values), m, rtol)

        # 3. The size of the next round. Where it would span the space, n products give the exact
        #    values.
        add = max(4, m // 2)
        left = max_products - sketch.products
        finished = met or left < 2
        if _spans(sketch, add, left):
            if not finished and n <= left:
                return exact_diagonal(op, sketch.products)
            add = min(add, n - 1 - m)
        if finished or add < 1:
            return DiagonalEstimate(
                values=values, stderr=stderr, num_products=sketch.products, converged=met
            )


def _spans(sketch: Sketch, add: int, left: int) -> bool:
    """Whether ``add`` further columns (two products each, of ``left``) would be about all there
    are."""
    return 2 * min(add, left // 2) + sketch.size >= sketch.op.space.dim


def _grown(old: Tensor, below: Tensor, right: Tensor) -> Tensor:
    """``[[old, ·], [below, ·]]`` with ``right`` as the new columns."""
    return torch.cat([torch.cat([old, below]), right], 1)


def _leave_one_out(r: Tensor, rounding: float) -> Tensor:
    """``S [q, m]``: the direction of the sketch that each of its columns alone contributes.

    ``R [q, m]`` holds the sketch's coordinates in Q. Column i of S is the unit vector of span(R)
    orthogonal to all other columns of R. It is zero where column i lies in the span of the others
    (a rank-deficient sketch).
    """
    q, m = r.shape
    if q == 0:
        return r
    # 1. Columns of the same length: that of a probe says nothing about its direction.
    lengths = torch.linalg.vector_norm(r, dim=0)
    scaled = r / torch.where(lengths > 0, lengths, 1.0)

    # 2. Row i of the inverse is orthogonal to all columns but i.
    if q == m:
        inverse = torch.linalg.inv(scaled)
    else:
        u, sigma, vt = torch.linalg.svd(scaled, full_matrices=False)
        kept = sigma > rounding * sigma[0]
        inverse = vt[kept].mT @ (u[:, kept] / sigma[kept]).mT
        # Only a column with no part in the null space is independent of the others.
        alone = (vt[kept] ** 2).sum(0) > 1 - 1e-6
        inverse = inverse * alone.unsqueeze(1)

    # 3. Unit vectors.
    lengths = torch.linalg.vector_norm(inverse, dim=1, keepdim=True)
    return (inverse / torch.where(lengths > 0, lengths, 1.0)).mT


def _xtrace_samples(
    r: Tensor, w: Tensor, h: Tensor, norms: Tensor, n: int, rounding: float
) -> Tensor:
    """The m leave-one-out estimates ``tr Q_iᵀAQ_i + c_i vᵀAv``, ``v = (I − Q_i Q_iᵀ) ω_i``, from
    small matrices."""
    s = _leave_one_out(r, rounding)
    along = (s * w).sum(0)
    u = w - s * along  # coordinates of Q_i Q_iᵀ ω_i
    energy = (w * r).sum(0) - 2 * (u * r).sum(0) + (u * (h @ u)).sum(0)  # vᵀAv
    length = norms - (w**2).sum(0) + along**2  # ‖v‖²
    # v is uniform on directions of a space of this dimension: fixing its length takes the length's
    # variance out.
    free = n - len(h) + (s**2).sum(0)
    rest = torch.where((free > 0.5) & (length > rounding * norms), free * energy / length, 0.0)
    return h.trace() - (s * (h @ s)).sum(0) + rest


def _xdiag_values(
    q: Tensor, az: Tensor, s: Tensor, r: Tensor, omegas: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and standard error of ``diag(Q_i Q_iᵀ A) + ω_i ⊙ (I − Q_i Q_iᵀ) A ω_i`` over the m
    left-out columns."""
    # Q_i Q_iᵀ = QQᵀ − s_i s_iᵀ: all estimates have diag(QQᵀA) in common.
    common = (q * az).sum(1)
    mean, spread = torch.zeros_like(common), torch.zeros_like(common)
    m = omegas.shape[1]
    along = (s * r).sum(0)
    for i in range(m):
        direction = s[:, i].to(device=q.device, dtype=q.dtype)
        left_out = q @ direction
        sign = omegas[:, i].to(device=q.device, dtype=q.dtype)
        sample = left_out * (sign * float(along[i]) - az @ direction)
        # Welford
        delta = sample - mean
        mean = mean + delta / (i + 1)
        spread = spread + delta * (sample - mean)
    return common + mean, (spread.clamp_min(0) / (m * (m - 1))).sqrt()
