"""``A⁻¹b`` from products alone.

Source: Hestenes & Stiefel 1952; Golub & Van Loan 2013, §11.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from curvprune.curvature.operators import Operator


def conjugate_gradients(op: Operator, b: Tensor, *, tol: float, max_products: int) -> Tensor:
    """Solve ``A x = b`` for each column, ``(n, k)``, until ``‖b − A x‖ ≤ tol · ‖b‖``.

    Args:
        max_products: for each column.

    Raises:
        ValueError: A curves down along some direction, so that it is not positive definite; or the
            residual is still too large.
        FloatingPointError: a product with non-finite numbers.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, squares = r.clone(), (r * r).sum(0)
    # No residual falls below the rounding of a product.
    wanted = max(tol, 8 * torch.finfo(b.dtype).eps) ** 2 * squares
    for _ in range(max_products):
        # 1. The columns that are not there yet.
        open_ = torch.nonzero(squares > wanted).flatten()
        if not len(open_):
            return x
        direction = p[:, open_]
        image = op @ direction
        if not bool(image.isfinite().all()):
            raise FloatingPointError(
                "a product of the operator is not finite; run the model in float32 or bfloat16"
            )
        # 2. The curvature along each direction must be positive.
        curvature, length = (direction * image).sum(0), (direction * direction).sum(0)
        lowest = float((curvature / length).min())
        if not lowest > 0:
            raise ValueError(
                f"inverse: the operator with its damping curves down ({lowest:.3g} along some "
                f"direction), so conjugate gradients cannot invert it; raise damping by more than "
                f"{-lowest:.3g}, to above −λmin (curvprune.eigenpairs(op, which='SA'))"
            )
        # 3. To the minimum along the direction; the next one is conjugate to it.
        step = squares[open_] / curvature
        x[:, open_] += step * direction
        r[:, open_] -= step * image
        fresh = (r[:, open_] * r[:, open_]).sum(0)
        p[:, open_] = r[:, open_] + (fresh / squares[open_]) * direction
        squares[open_] = fresh
    left = squares > wanted
    if bool(left.any()):
        worst = float((squares / (b * b).sum(0))[left].max().sqrt())
        raise ValueError(
            f"inverse: after {max_products} products the relative residual is {worst:.2g}, where "
            f"tol={tol:g} was asked; raise max_products or damping"
        )
    return x
