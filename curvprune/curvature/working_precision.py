"""What is rounding error and what is not; orthonormal columns that are so to working precision."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from curvprune.curvature.operators import Operator


def rounding(op: Operator) -> float:
    """Relative size below which a number may be rounding error of a product."""
    return torch.finfo(op.dtype).eps * max(32.0, math.sqrt(op.space.dim))


def negligible(op: Operator) -> float:
    """Relative size of a remainder that ends a Krylov space.

    A small remainder before the end magnifies rounding errors, so this lies above them. To leave
    out such a coupling moves a Ritz value by the coupling's square.
    """
    return max(rounding(op), torch.finfo(op.dtype).eps ** 0.7)


def check_finite(finite: bool) -> None:
    """Raises ``FloatingPointError`` unless the numbers of a product are finite."""
    if not finite:
        raise FloatingPointError(
            "a product of the operator is not finite; run the model in float32 or bfloat16"
        )


def norm(x: Tensor) -> float:
    """Euclidean norm."""
    return float(torch.linalg.vector_norm(x))


def in_float64(x: Tensor) -> Tensor:
    """A small matrix, for the CPU."""
    return x.to(device="cpu", dtype=torch.float64)


def as_vectors(x: np.ndarray, op: Operator) -> Tensor:
    """Coefficients from NumPy, as the operator's vectors have them."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(device=op.device, dtype=op.dtype)


def complement(basis: Tensor, columns: Tensor, floor: float) -> Tensor:
    """Orthonormal columns that span the part of ``columns`` outside ``basis``.

    Directions shorter than ``floor`` are rounding error and are left out.
    """
    columns = columns[:, : basis.shape[0] - basis.shape[1]]
    # 1. Project twice: once leaves rounding errors of the size of what was taken away.
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
    # 2. Orthonormalise what is left, without what is nothing.
    q, r = torch.linalg.qr(columns)
    q = q[:, r.diagonal().abs() > floor]
    # 3. What survives a cancellation may have lost its orthogonality: project once more, and keep
    #    only what that does not shorten.
    q, r = torch.linalg.qr(q - basis @ (basis.mT @ q))
    return q[:, r.diagonal().abs() > 0.5]
