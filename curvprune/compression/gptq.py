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

import torch
from torch import Tensor

# Columns whose error is handed on at once, by one matrix product: to all later columns after a
# panel, within the panel after a strip. Column by column only the rest of a strip is touched.
PANEL = 128
STRIP = 32


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
    """Inverse of a lower triangular matrix, by halves.

    A solve with the identity takes twice as long.
    """
    if len(L) <= PANEL:
        identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
        return torch.linalg.solve_triangular(L, identity, upper=False)
    half = len(L) // 2
    inverse = torch.zeros_like(L)
    inverse[:half, :half] = _inverse(L[:half, :half])
    inverse[half:, half:] = _inverse(L[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (L[half:, :half] @ inverse[:half, :half])
    return inverse


def column_order(diagonal: Tensor) -> Tensor:
    """Columns by descending second moment: later columns absorb the error of those fixed first."""
    return torch.argsort(diagonal, descending=True, stable=True)


def damped(A: Tensor, damping: float) -> Tensor:
    """``A + lambda I`` with lambda = ``damping * mean(diag A)``.

    Its diagonal is positive even where an input is dead, that is, always zero.
    """
    diagonal = A.diagonal()
    # A dead input is decoupled from the others. Without damping any positive entry will do.
    of_dead = 0.0 if damping else 1e-6
    H = A.clone()
    H.diagonal().add_(diagonal.mean() * damping).add_((diagonal == 0) * diagonal.mean() * of_dead)
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
    tried: list[float] = []
    used = float(damping)
    while True:
        H = damped(reordered, used)
        L, info = torch.linalg.cholesky_ex(H)
        pivots = L.diagonal().square()
        # A pivot that is all rounding error would make noise of every column before it.
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
    notes: list[str] = []
    if tried:
        notes.append(
            f"layer {layer}: damping raised from {damping:g} to {used:g}: too few different inputs"
        )
    return Factor(order=order, L=L, damping=used, notes=tuple(notes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one option in a sweep."""

    weight: Tensor  # (in, rows) original column order
    scale: Tensor  # (groups, rows) compute dtype
    low: Tensor  # (groups, rows) smallest code minus zero
    high: Tensor  # (groups, rows)
    # Inputs of a group, fewer in the last where it does not divide them; None: one group.
    group_size: int | None = None
    keep: Tensor | None = None  # (in, rows) bool: the others become zero


def sweep_columns(rows: Sequence[Rows], factor: Factor) -> list[Tensor]:
    """Round all columns of all rows.

    Returns:
        per option the integers ``code - zero``, ``(in, rows)``, in the original column order.
    """
    order, U = factor.order, factor.U
    width = len(order)
    # 1. Stack the rows of all options, with the columns in the order of the sweep.
    W = torch.cat([r.weight for r in rows], dim=1)[order]
    result = torch.empty_like(W)
    errors = W.new_empty(min(PANEL, width), W.shape[1])
    sparse = any(r.keep is not None for r in rows)
    factors = U.diagonal().reciprocal().tolist()
    rounded = W.new_empty(W.shape[1])

    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        n = stop - start
        w, e, values = W[start:stop], errors[:n], result[start:stop]
        u = U[start:stop, start:stop]
        columns = order[start:stop]
        scale, inverse, low, high = _expand(rows, columns)
        keep = torch.cat([_mask(r, columns, w.dtype) for r in rows], dim=1) if sparse else None
        for left in range(0, n, STRIP):
            right = min(left + STRIP, n)
            for j in range(left, right):
                x, q, err = w[j], values[j], e[j]
                # 2. Bring column j up to date with the errors of its strip.
                if j > left:
                    x.addmv_(e[left:j].T, u[left:j, j], alpha=-1)
                # 3. Round it: q_j, zero where it was pruned.
                torch.mul(x, inverse[j], out=rounded)
                torch.clamp(rounded.round_(), low[j], high[j], out=q)
                if keep is not None:
                    q.mul_(keep[j])
                # 4. Its error, e = (w_j - q_j) / U_jj.
                torch.addcmul(x, q, scale[j], value=-1, out=err)
                err.mul_(factors[start + j])
            # 5. The columns after it absorb the errors, e U[j, j+1:]: first those of the panel,
            if right < n:
                w[right:].addmm_(u[left:right, right:].T, e[left:right], alpha=-1)
        # and then all others.
        if stop < width:
            W[stop:].addmm_(U[start:stop, stop:].T, e, alpha=-1)

    # 6. Back to the original order, and to each option what is its own.
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=order.device)
    counts = [r.weight.shape[1] for r in rows]
    return list(result[back].split(counts, dim=1))


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
