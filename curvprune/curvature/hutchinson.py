"""Hutchinson's estimators of trace and diagonal, and the exact way out where it is as cheap.

For Rademacher z, ``E zᵀAz = tr A`` and ``E z ⊙ Az = diag A``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvprune.curvature.estimates import (
    ENOUGH,
    DiagonalEstimate,
    Estimate,
    accurate,
    mean_and_stderr,
    samples_to_add,
)
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import moved, signs, widths
from curvprune.curvature.working_precision import norm


def hutchinson_trace(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> Estimate:
    """See :func:`curvprune.curvature.trace`."""
    n = op.space.dim
    samples = torch.zeros(0, dtype=torch.float64)
    value, stderr = 0.0, math.inf
    add = ENOUGH
    while True:
        # 1. One round of probes: zᵀAz each.
        add = min(add, max_products - len(samples))
        for width in widths(op, add):
            z = moved(op, signs(op, width, generator))
            samples = torch.cat([samples, (z * (op @ z)).sum(0, dtype=torch.float64).cpu()])
        count = len(samples)

        # 2. Their mean, and whether its error bar will do.
        value, stderr = mean_and_stderr(samples)
        met = accurate(stderr, value, count, rtol)
        if met or count == max_products:
            return Estimate(
                value=value, stderr=stderr, num_items=count, num_products=count, converged=met
            )

        # 3. The size of the next round. Where n products do, they give the exact value.
        add = samples_to_add(stderr, value, count, rtol)
        if add >= n and count + n <= max_products:
            return exact_trace(op, count)


def hutchinson_diagonal(
    op: Operator, rtol: float, max_products: int, generator: torch.Generator
) -> DiagonalEstimate:
    """See :func:`curvprune.curvature.diagonal`."""
    n, count, add = op.space.dim, 0, ENOUGH
    mean = torch.zeros(n, dtype=op.dtype, device=op.device)
    spread = torch.zeros_like(mean)
    while True:
        # 1. One round of probes: z ⊙ Az each.
        for width in widths(op, min(add, max_products - count)):
            z = moved(op, signs(op, width, generator))
            for sample in (z * (op @ z)).unbind(1):
                # Welford: sums of squares would lose small variances of large entries
                count += 1
                delta = sample - mean
                mean = mean + delta / count if count > 1 else sample
                spread = spread + delta * (sample - mean) if count > 1 else spread
        stderr = (spread.clamp_min(0) / (count * (count - 1))).sqrt()

        # 2. Whether the norm of the error bars will do.
        error, size = norm(stderr), norm(mean)
        met = accurate(error, size, count, rtol)
        if met or count >= max_products:
            return DiagonalEstimate(values=mean, stderr=stderr, num_products=count, converged=met)

        # 3. The size of the next round. Where n products do, they give the exact values.
        add = samples_to_add(error, size, count, rtol)
        if add >= n and count + n <= max_products:
            return exact_diagonal(op, count)


def exact_trace(op: Operator, spent: int) -> Estimate:
    """The trace from n products with the unit vectors, after ``spent`` others."""
    value = float(_diagonal_entries(op).double().sum())
    products = spent + op.space.dim
    return Estimate(value=value, stderr=0.0, num_items=0, num_products=products, converged=True)


def exact_diagonal(op: Operator, spent: int) -> DiagonalEstimate:
    """The diagonal from n products with the unit vectors, after ``spent`` others."""
    values = _diagonal_entries(op)
    products = spent + op.space.dim
    return DiagonalEstimate(
        values=values, stderr=torch.zeros_like(values), num_products=products, converged=True
    )


def _diagonal_entries(op: Operator) -> Tensor:
    n = op.space.dim
    values, start = torch.empty(n, dtype=op.dtype, device=op.device), 0
    for width in widths(op, n):
        columns = torch.zeros(n, width, dtype=op.dtype, device=op.device)
        columns[start : start + width].fill_diagonal_(1)
        values[start : start + width] = (op @ columns)[start : start + width].diagonal()
        start += width
    return values
