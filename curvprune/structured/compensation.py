"""Which hidden units to remove, and what the layers that read them become: the algebra, on plain
matrices.

A *reader* is a weight ``W[out, in]`` with the second moment ``A = E[x xᵀ]`` of its inputs. Removing
a unit zeroes the columns that it feeds; the columns that stay take over what they can. Where the
reader has a bias (or a BatchNorm that holds one), a constant 1 stands last among the inputs, so
that the mean of what was removed goes into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """One weight that reads the units of a cut.

    Attributes:
        weight: ``W[out, in]``.
        second: ``E[x xᵀ]``; one row and column more than ``in`` if a constant 1 is appended.
        columns: the inputs that each unit feeds.
        rows: how much an error of each output costs (mean squared gradient); makes several readers
            comparable.
        name: for messages.
    """

    weight: Float[Tensor, "out in"]
    second: Float[Tensor, "n n"]
    columns: Int[Tensor, "units k"]
    rows: Float[Tensor, " out"]
    name: str


def damped(second: Float[Tensor, "n n"], inputs: int, damping: float) -> Float[Tensor, "n n"]:
    """``A + λI`` with λ = ``damping`` · mean(diag A) on the inputs; the appended constant, if any,
    is not damped."""
    ridge = torch.zeros(len(second), dtype=second.dtype, device=second.device)
    ridge[:inputs] = damping * second.diagonal()[:inputs].mean()
    return second + torch.diag(ridge)


@torch.no_grad()
def removal_order(
    readers: Sequence[Reader],
    *,
    until: int,
    damping: float = 0.01,
    at_once: int = 1,
    removed: Sequence[int] = (),
) -> list[int]:
    """Units in the order in which to remove them, cheapest first, until ``until`` are left.

    The cost of a unit with columns S, given all removed before and everything else compensated, is
    ``Σ_readers Σ_r rows_r W_rS ([H⁻¹]_SS)⁻¹ W_rSᵀ`` with ``H = A + λI``. After each removal ``W``
    and ``H⁻¹`` are those of the units that are left, so a unit that became indispensable is seen to
    be so. The order does not depend on ``until``: one call gives nested choices for all widths.

    Args:
        at_once: units removed between two updates; more are faster and less exact.
        removed: units that are already gone.

    Cost: ``in³`` per reader, then ``2·in²·k`` per unit removed. Source: ZipLM (arXiv 2302.04089),
    SlimGPT (2412.18110).

    Raises ``ValueError`` naming the reader whose second moment stays singular.
    """
    units = len(readers[0].columns)
    inverses, grams = [], []
    for reader in readers:
        inputs = reader.weight.shape[1]
        H = damped(reader.second.double(), inputs, damping)
        inverses.append(_inverse(H, reader.name))
        scaled = reader.rows.double().sqrt()[:, None] * reader.weight.double()
        gram = H.new_zeros(H.shape)
        gram[:inputs, :inputs] = scaled.T @ scaled
        grams.append(gram)
    alive = torch.ones(units, dtype=torch.bool, device=inverses[0].device)

    def drop(chosen: Tensor) -> None:
        for n, reader in enumerate(readers):
            S = reader.columns[chosen].flatten()
            inverse, gram = inverses[n], grams[n]
            B = torch.linalg.solve(inverse[S][:, S], inverse[S])
            inverse -= inverse[:, S] @ B
            step = gram[:, S] @ B
            gram += B.T @ gram[S][:, S] @ B - step - step.T
            # What is removed is exactly uncoupled: rounding must not bring it back.
            inverse[S], inverse[:, S], gram[S], gram[:, S] = 0.0, 0.0, 0.0, 0.0
        alive[chosen] = False

    if len(removed):
        drop(torch.tensor(list(removed), device=alive.device))
    order: list[int] = []
    while int(alive.sum()) > until:
        left = alive.nonzero()[:, 0]
        cost = torch.zeros(len(left), dtype=torch.float64, device=alive.device)
        for reader, inverse, gram in zip(readers, inverses, grams, strict=True):
            S = reader.columns[left]
            block, weight = (
                inverse[S[:, :, None], S[:, None, :]],
                gram[S[:, :, None], S[:, None, :]],
            )
            cost += torch.linalg.solve(block, weight).diagonal(dim1=1, dim2=2).sum(1)
        count = min(at_once, len(left) - until)
        chosen = left[cost.topk(count, largest=False).indices]
        drop(chosen)
        order += chosen.tolist()
    return order


@torch.no_grad()
def compensate(
    weight: Float[Tensor, "out in"],
    second: Float[Tensor, "n n"],
    keep: Int[Tensor, " kept"],
    *,
    name: str,
    drift: Float[Tensor, "n n"] | None = None,
    share: float = 1.0,
    damping: float = 0.01,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """The weight whose only non-zero columns are ``keep`` and whose output is closest to that of
    ``weight``.

    ``min E|W x + share·W(x̃ − x) − W' x_K|² + λ|W'_K − W_K|²``, solved by

        W'_K = W_K + [ W (A + share·D)_{:K} − W_K A_KK ] (A_KK + λI)⁻¹

    with ``D = E[(x̃ − x) xᵀ]`` how far the inputs are from those of the uncompressed model. Where
    ``second`` has one row more than the weight has inputs (a constant 1), what its coefficient
    takes is returned as the second value, to be added to the bias; else zeros.

    Cost: ``kept³/3 + out·in·kept``. Raises ``ValueError`` as `removal_order`.
    """
    out, inputs = weight.shape
    W = torch.zeros(out, len(second), dtype=torch.float64, device=weight.device)
    W[:, :inputs] = weight.double()
    A = second.double()
    K = keep if len(second) == inputs else torch.cat([keep, keep.new_tensor([inputs])])
    target = A if drift is None else A + share * drift.double()
    wanted = W @ target[:, K] - W[:, K] @ A[K][:, K]
    factor = _cholesky(damped(A, inputs, damping)[K][:, K], name)
    result = torch.zeros_like(W)
    result[:, K] = W[:, K] + torch.cholesky_solve(wanted.T, factor).T
    constant = result[:, inputs] if len(second) > inputs else result.new_zeros(out)
    return result[:, :inputs].to(weight.dtype), constant.to(weight.dtype)


def _cholesky(H: Tensor, name: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(H)
    if int(info) or not bool(factor.isfinite().all()):
        raise ValueError(
            f"layer {name}: the second moment of its inputs is singular or not finite; calibrate "
            "with more or other data, raise damping, or leave the layer out"
        )
    return factor


def _inverse(H: Tensor, name: str) -> Tensor:
    return torch.cholesky_inverse(_cholesky(H, name))
