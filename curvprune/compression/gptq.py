"""The column sweep that rounds (GPTQ, arXiv 2210.17323), pruned weights or not.

With ``H = A + lambda I`` and ``H^-1 = U^T U`` (``U`` upper triangular), columns are fixed one after
another: column ``j`` becomes ``q_j`` and the columns after it absorb the error, ``W[:, j+1:] -= e
U[j, j+1:]`` with ``e = (w_j - q_j) / U_jj``. The output error it reaches is ``tr(d H d^T) = sum
e^2``. Rows are independent given ``U``, so rows of several options are stacked and swept together.

Weights are kept transposed, ``(in, rows)``: a column of the layer is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128
SUB_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The damped second moment, factorised, and how that was reached."""

    order: Tensor  # (in,) int64
    L: Tensor  # (in, in) lower triangular, L L^T = (A + lambda I) in the reversed order
    damping: float  # lambda / mean(diag A) really used
    notes: tuple[str, ...]

    @cached_property
    def U(self) -> Tensor:
        """Upper triangular with ``U^T U = (A[order][:, order] + lambda I)^-1``.

        ``H = R R^T`` with ``R`` upper is the Cholesky factor of ``H`` with rows and columns
        reversed; ``U = R^-1``.
        """
        return _inverse(self.L).flip(0, 1).contiguous()


def _inverse(L: Tensor) -> Tensor:
    """Inverse of a lower triangular matrix, by halves: a solve with the identity takes twice as
    long."""
    half = len(L) // 2
    if len(L) <= BLOCK:
        return torch.linalg.solve_triangular(
            L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False
        )
    inverse = torch.zeros_like(L)
    inverse[:half, :half], inverse[half:, half:] = (
        _inverse(L[:half, :half]),
        _inverse(L[half:, half:]),
    )
    inverse[half:, :half] = -inverse[half:, half:] @ (L[half:, :half] @ inverse[:half, :half])
    return inverse


def column_order(diagonal: Tensor) -> Tensor:
    """Columns by descending second moment: those fixed first leave the others to absorb their
    error."""
    return torch.argsort(diagonal, descending=True, stable=True)


def damped(A: Tensor, damping: float) -> Tensor:
    """``A + lambda I``, lambda = ``damping * mean(diag A)``; the diagonal is positive even where an
    input is dead."""
    diagonal = A.diagonal()
    H = A.clone()
    # A dead input is decoupled from the others: any positive entry serves when no damping provides
    # one.
    H.diagonal().add_(diagonal.mean() * damping).add_(
        (diagonal == 0) * diagonal.mean() * (0.0 if damping else 1e-6)
    )
    return H


def factor(A: Tensor, order: Tensor, *, layer: str, damping: float) -> Factor:
    """Factorise the damped second moment.

    When ``H`` is not numerically positive definite the damping grows tenfold, up to 1, and a note
    says so.

    Args:
        A: ``(in, in)`` symmetric, float32 or float64.
        order: ``(in,)`` the columns in the order of the sweep.

    Raises:
        ValueError: ``H`` is not positive definite even with ``damping=1``.
    """
    reverse = order.flip(0)
    reordered = A[reverse][:, reverse]
    tried, used = [], float(damping)
    while True:
        H = damped(reordered, used)
        L, info = torch.linalg.cholesky_ex(H)
        pivots = L.diagonal().square()
        solid = pivots > 10 * torch.finfo(A.dtype).eps * H.diagonal()
        if int(info) == 0 and bool(solid.all()):
            break
        tried.append(used)
        if used >= 1.0:
            raise ValueError(
                f"layer {layer}: the second moment of its inputs is not positive definite, tried "
                f"damping {tried}; calibrate with more or other data, or leave the layer out"
            )
        used = min(1.0, max(10 * used, 1e-4))
    notes = (
        (f"layer {layer}: damping raised from {damping:g} to {used:g}: too few different inputs",)
        if tried
        else ()
    )
    return Factor(order=order, L=L, damping=used, notes=notes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one option in a sweep."""

    weight: Tensor  # (in, rows) original column order
    scale: Tensor  # (groups, rows) compute dtype
    low: Tensor  # (groups, rows) smallest code minus zero
    high: Tensor  # (groups, rows)
    group_size: int | None = (
        None  # inputs of a group, fewer in the last where it does not divide; None: one group
    )
    keep: Tensor | None = None  # (in, rows) bool: the others become zero


def sweep_columns(rows: Sequence[Rows], factor: Factor) -> list[Tensor]:
    """Round all columns of all rows; returns per option, in the original column order, integers
    ``code - zero`` ``(in, rows)``."""
    order, U = factor.order, factor.U
    width = len(order)
    edges = [0]
    for one in rows:
        edges.append(edges[-1] + one.weight.shape[1])
    parts = [slice(*edge) for edge in pairwise(edges)]

    W = torch.cat([r.weight for r in rows], dim=1)[order]
    result = torch.empty_like(W)
    errors = W.new_empty(min(BLOCK, width), W.shape[1])
    sparse = any(r.keep is not None for r in rows)
    factors = U.diagonal().reciprocal().tolist()
    buffer = W.new_empty(W.shape[1])

    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        n = stop - start
        w, e, values = W[start:stop], errors[:n], result[start:stop]
        u = U[start:stop, start:stop]
        columns = order[start:stop]
        scale, inverse, low, high = _expand(rows, columns)
        keep = torch.cat([_mask(r, columns, w.dtype) for r in rows], dim=1) if sparse else None
        for left in range(0, n, SUB_BLOCK):
            right = min(left + SUB_BLOCK, n)
            for j in range(left, right):
                x, q, err = w[j], values[j], e[j]
                if j > left:
                    x.addmv_(e[left:j].T, u[left:j, j], alpha=-1)
                torch.mul(x, inverse[j], out=buffer)
                torch.clamp(buffer.round_(), low[j], high[j], out=q)
                if keep is not None:
                    q.mul_(keep[j])
                torch.addcmul(x, q, scale[j], value=-1, out=err)
                err.mul_(factors[start + j])
            if right < n:
                w[right:].addmm_(u[left:right, right:].T, e[left:right], alpha=-1)
        if stop < width:
            W[stop:].addmm_(U[start:stop, stop:].T, e, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    result = result[back]
    return [result[:, part] for part in parts]


def _expand(rows: Sequence[Rows], columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, inverse scale, lowest and highest integer at ``columns``: ``(columns, rows)``."""
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for r in rows:
        group = columns // (r.group_size or len(r.weight))
        pieces.append((r.scale[group], r.low[group], r.high[group]))
    scale, low, high = (torch.cat(piece, dim=1) for piece in zip(*pieces, strict=True))
    return scale, scale.reciprocal(), low, high


def _mask(r: Rows, columns: Tensor, dtype: torch.dtype) -> Tensor:
    if r.keep is None:
        return torch.ones(len(columns), r.weight.shape[1], dtype=dtype, device=columns.device)
    return r.keep[columns].to(dtype)
