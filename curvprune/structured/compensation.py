"""Which hidden units to remove, and what the layers that read them become: the algebra, on plain
matrices.

A *consumer* is a weight ``W[out, in]`` with the second moment ``A = E[x xᵀ]`` of its inputs.
Removing a unit zeroes the columns that it feeds; the columns that stay take over what they can.
Where the consumer has a bias (or a BatchNorm that holds one), a constant 1 stands last among the
inputs, so that the mean of what was removed goes into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumer:
    """One weight that reads the units of a cut.

    Attributes:
        weight: ``W[out, in]``.
        second: ``E[x xᵀ]``; one row and column more than ``in`` if a constant 1 is appended.
        columns: the inputs that each unit feeds.
        rows: how much an error of each output costs (mean squared gradient); makes several
            consumers comparable.
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


def steadied(
    second: Float[Tensor, "n n"], inputs: int, damping: float, *, name: str
) -> tuple[Float[Tensor, "n n"], str | None]:
    """A second moment that can be inverted once it is `damped`, and what to tell of it.

    Where it cannot be as it is, λ grows tenfold until its Cholesky factor exists. What is added to
    the diagonal acts as a larger λ in `removal_order` and in `compensate`.

    Raises:
        ValueError: a second moment that is not finite; names the consumer.
    """
    A = second.double()
    mean = float(A.diagonal()[:inputs].mean())
    if not bool(A.isfinite().all()):
        raise _unfit(name)
    # 1. As asked, then ten times as much; inputs that are all zero have no scale of their own.
    ridge = torch.zeros(len(A), dtype=A.dtype, device=A.device)
    tried = damping
    while torch.linalg.cholesky_ex(damped(A + torch.diag(ridge), inputs, damping))[1]:
        tried = max(10 * tried, 1e-6)
        ridge[:inputs] = (tried - damping) * mean if mean > 0 else 1.0
    if tried == damping or mean <= 0:
        return A + torch.diag(ridge), None
    # 2. What it took.
    return A + torch.diag(ridge), (
        f"layer {name}: the second moment of its inputs is singular; damping {tried:.1g} of its "
        f"mean diagonal in place of {damping:g}"
    )


class _State:
    """One consumer while units go: the inverse of its second moment, and the Gram matrix of its
    weight."""

    def __init__(self, consumer: Consumer, damping: float) -> None:
        inputs = consumer.weight.shape[1]
        H = damped(consumer.second.double(), inputs, damping)
        self.columns = consumer.columns
        self.inverse = _inverse(H, consumer.name)
        scaled = consumer.rows.double().sqrt()[:, None] * consumer.weight.double()
        self.gram = H.new_zeros(H.shape)
        self.gram[:inputs, :inputs] = scaled.T @ scaled

        # Units that were never active go first, and for free.
        self.dead = (consumer.second.diagonal()[consumer.columns] == 0).all(1)

    def costs(self, left: Int[Tensor, " left"]) -> Float[Tensor, " left"]:
        """What each of these units costs, everything else compensated."""
        S = self.columns[left]
        rows, columns = S[:, :, None], S[:, None, :]
        solved = torch.linalg.solve(self.inverse[rows, columns], self.gram[rows, columns])
        return solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, units: Int[Tensor, " gone"]) -> None:
        """What the inverse and the Gram matrix are once these units are gone."""
        S = self.columns[units].flatten()
        inverse, gram = self.inverse, self.gram
        B = torch.linalg.solve(inverse[S][:, S], inverse[S])
        inverse -= inverse[:, S] @ B
        step = gram[:, S] @ B
        gram += B.T @ gram[S][:, S] @ B - step - step.T
        # What is removed is exactly uncoupled: rounding must not bring it back.
        inverse[S], inverse[:, S], gram[S], gram[:, S] = 0.0, 0.0, 0.0, 0.0


@torch.no_grad()
def removal_order(
    consumers: Sequence[Consumer],
    *,
    until: int,
    damping: float = 0.01,
    at_once: int = 1,
    removed: Sequence[int] = (),
) -> list[int]:
    """Units in the order in which to remove them, cheapest first, until ``until`` are left.

    The cost of a unit with columns S, given all removed before and everything else compensated, is
    ``Σ_consumers Σ_r rows_r W_rS ([H⁻¹]_SS)⁻¹ W_rSᵀ`` with ``H = A + λI``. After each removal ``W``
    and ``H⁻¹`` are those of the units that are left, so a unit that became indispensable is seen to
    be so. Units that are zero on all calibration items go first. The order does not depend on
    ``until``: one call gives nested choices for all widths.

    Cost: ``in³`` per consumer, then ``2·in²·k`` per unit removed.

    Args:
        at_once: units removed between two updates; more are faster and less exact.
        removed: units that are already gone.

    Raises:
        ValueError: a second moment stays singular; names the consumer.

    Source: ZipLM (arXiv 2302.04089), SlimGPT (2412.18110).
    """
    # 1. Before anything goes.
    units = len(consumers[0].columns)
    states = [_State(consumer, damping) for consumer in consumers]
    device = states[0].inverse.device
    alive = torch.ones(units, dtype=torch.bool, device=device)

    def remove(chosen: Tensor) -> None:
        for state in states:
            state.remove(chosen)
        alive[chosen] = False

    if len(removed):
        remove(torch.tensor(list(removed), device=device))
    dead = torch.stack([state.dead for state in states]).all(0)
    order: list[int] = []
    while int(alive.sum()) > until:
        # 2. What each unit that is left would cost, over all consumers.
        left = alive.nonzero()[:, 0]
        cost = torch.zeros(len(left), dtype=torch.float64, device=device)
        for state in states:
            cost += state.costs(left)
        cost[dead[left]] = -1.0
        # 3. The cheapest go.
        count = min(at_once, len(left) - until)
        chosen = left[cost.topk(count, largest=False).indices]
        remove(chosen)
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
    # 1. The weight, the moments and what is kept, with the constant.
    out, inputs = weight.shape
    W = torch.zeros(out, len(second), dtype=torch.float64, device=weight.device)
    W[:, :inputs] = weight.double()
    A = second.double()
    K = keep if len(second) == inputs else torch.cat([keep, keep.new_tensor([inputs])])
    # 2. How the output of the weight goes together with the inputs that are kept.
    target = A if drift is None else A + share * drift.double()
    wanted = W @ target[:, K] - W[:, K] @ A[K][:, K]
    # 3. The normal equations.
    factor = _cholesky(damped(A, inputs, damping)[K][:, K], name)
    result = torch.zeros_like(W)
    result[:, K] = W[:, K] + torch.cholesky_solve(wanted.T, factor).T
    constant = result[:, inputs] if len(second) > inputs else result.new_zeros(out)
    return result[:, :inputs].to(weight.dtype), constant.to(weight.dtype)


def _cholesky(H: Tensor, name: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(H)
    if int(info) or not bool(factor.isfinite().all()):
        raise _unfit(name)
    return factor


def _unfit(name: str) -> ValueError:
    return ValueError(
        f"layer {name}: the second moment of its inputs is singular or not finite; calibrate "
        "with more or other data, raise damping, or leave the layer out"
    )


def _inverse(H: Tensor, name: str) -> Tensor:
    return torch.cholesky_inverse(_cholesky(H, name))
