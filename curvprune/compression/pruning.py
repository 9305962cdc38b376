"""Which weights to keep and what they become: ``min tr((X - T)^T H (X - T))`` over ``X`` with so
many zeros.

The support comes from ADMM on the split into a dense ``Y`` and a sparse ``D`` (ALPS, arXiv
2406.07831). Unlike a sweep, which decides column by column, every decision sees what all other
weights can make up for, and can be taken back. The kept weights are then refitted by conjugate
gradients. Weights are transposed, ``(in, out)``, and scaled by ``sqrt(H_jj)``, so that all
variables have the same curvature.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

# SmolLM2-135M at 50 %, output error of eight layers over that of the SparseGPT sweep: .75 with a
# penalty of 0.5 and 4 steps, .84 and .79 with 0.3 and 0.8, .71 with 6 steps, .65 with thirty and
# six growing penalties; on other text than calibrated on, nothing is gained after the fourth.
# Refitting the sweep's own support gives .79.
PENALTY = 0.5
STEPS = 4
REFITS = 3
SAMPLE = (
    1 << 15
)  # weights from which a threshold between two steps is estimated; the last one is exact


def prune(
    target: Tensor, H: Tensor, *, sparsity: float | None = None, nm: tuple[int, int] | None = None
) -> Tensor:
    """Sparse ``(in, out)`` weights that stand in for ``target``.

    Exactly ``round(sparsity * in * out)`` of them are left out, or all but N of every M consecutive
    inputs.

    Args:
        target: ``(in, out)``.
        H: ``(in, in)`` positive semidefinite with a positive diagonal.

    Cost:
        ``in^3`` and ``9 in^2 * out`` multiply-adds.
    """
    length = H.diagonal().sqrt()[:, None]
    H = H / length / length.T
    Z = target * length
    gradient = H @ Z
    damped = H.clone()
    damped.diagonal().add_(PENALTY)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    for step in range(STEPS):
        # The kept part of Z is D; the other, after the first step, is the scaled dual.
        keep = _kept(Z, sparsity, nm, exact=False)
        dual = Z.masked_fill(keep, 0)
        D = Z - dual
        if step == 0:
            dual.zero_()
        Z = dual.add_(_product(inverse, gradient.add(D.sub_(dual), alpha=PENALTY)))
    keep = _kept(Z, sparsity, nm, exact=True)
    return _refitted(Z.mul_(keep), gradient, H, keep).div_(length)


def _refitted(X: Tensor, gradient: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """Conjugate gradients towards ``H X = gradient`` on the support, each column with steps of its
    own."""
    residual = (gradient - H @ X).mul_(keep)
    direction, square = residual.clone(), residual.square().sum(dim=0)
    tiny = torch.finfo(X.dtype).tiny
    for step in range(REFITS):
        moved = _product(H, direction).mul_(keep)
        size = square / (direction * moved).sum(dim=0).clamp_min_(tiny)
        X.addcmul_(direction, size)
        if step + 1 < REFITS:
            residual.addcmul_(moved, size, value=-1)
            before, square = square, residual.square().sum(dim=0)
            direction.mul_(square / before.clamp_min(tiny)).add_(residual)
    return X


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``; on the CPU from bfloat16 factors, twice as fast: steps need a direction, errors are
    measured in full."""
    if a.device.type == "cpu" and a.dtype == torch.float32:
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype)
    return a @ b


def _kept(Z: Tensor, sparsity: float | None, nm: tuple[int, int] | None, *, exact: bool) -> Tensor:
    size = Z.abs()
    if nm is not None:
        return _pattern(size, nm)
    assert sparsity is not None
    size, drop = size.flatten(), round(sparsity * size.numel())
    if exact:
        keep = torch.ones_like(size, dtype=torch.bool)
        keep[size.topk(drop, largest=False, sorted=False).indices] = False
        return keep.view_as(Z)
    sample = size[
        :: max(1, len(size) // SAMPLE) | 1
    ]  # an odd step: it does not stay in a few columns
    return (size > sample.kthvalue(max(1, round(sparsity * len(sample)))).values).view_as(Z)


def _pattern(size: Tensor, nm: tuple[int, int]) -> Tensor:
    """The N largest of every M consecutive rows of ``(in, out)``, the first ones of equals."""
    kept, of = nm
    groups = size.view(-1, of, size.shape[1])
    rank = torch.zeros_like(groups, dtype=torch.int16)
    for i, j in combinations(range(of), 2):  # for small M much faster than sorting
        later = groups[:, j] > groups[:, i]
        rank[:, i] += later
        rank[:, j] += ~later
    return (rank < kept).view_as(size)
