"""What K-FAC adds up for one block: over rows of inputs, over rows of gradients, and over the
gradients of items in the eigenbasis of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from curvprune.curvature.capture import Call, Capture, wide
from curvprune.curvature.closed_forms import Dense, Diagonal, Ekfac, Kronecker
from curvprune.curvature.kronecker_operators import Lookup, Scattered
from curvprune.curvature.kronecker_parts import (
    KfacSettings,
    Part,
    places_in,
    slope_of,
    space_of,
)
from curvprune.curvature.operators import Operator, ParamSpace
from curvprune.distributed import all_sum

DENSE_SCALES = 1024  # parameters of a norm up to which its whole block is formed

# A call of a layer, and the gradient that has arrived at its outputs.
Arrived = tuple[Call, Tensor]


class BlockSums(ABC):
    """The sums of one block.

    Args:
        part: whose block it is.
        settings: what the sums are of.
        space: the block's parameters.
        measure: what its quadratic form is counted in.
    """

    def __init__(
        self, part: Part, settings: KfacSettings, space: ParamSpace, *, measure: str
    ) -> None:
        self.part, self.settings, self.space, self.measure = part, settings, space, measure
        self.dtype, self.device = wide(part.layer.weight), part.layer.weight.device
        self.forward_only = settings.fisher == "forward-only"
        self.rows = 0.0
        self.reached = self.forward_only
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Zeros to add to."""

    @abstractmethod
    def add_inputs(self, taken: Capture) -> None:
        """The inputs of one mini-batch."""

    @abstractmethod
    def add_gradients(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        """What one backward pass has brought to the part's calls, one or more."""

    @abstractmethod
    def add_squares(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        """The same once more, in EKFAC's basis."""

    @abstractmethod
    def means(self, rows: float, divisor: float) -> None:
        """From sums to means: of inputs over rows, of gradients over ``divisor``."""

    @abstractmethod
    def fit(self, divisor: float) -> None:
        """EKFAC's eigenvalues from their sums."""

    @abstractmethod
    def operator(self) -> Operator:
        """The block."""

    def own(self, arrived: Sequence[Arrived]) -> list[Arrived]:
        """What has arrived at calls that the part takes part in."""
        return [(call, g) for call, g in arrived if self.part.takes_part(call)]

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def take_means(self, positions: float, reason: str) -> str:
        """`means` over all processes. Returns why the layer has no factors, if it has none:
        ``reason``, where this process has found one, or that nothing has reached it."""
        facts = [self.rows, float(self.reached), float(bool(reason))]
        rows, reached, refused = all_sum(torch.tensor(facts, dtype=torch.float64)).tolist()
        if refused:
            return reason or "its calls on other items have no factors"
        if not rows:
            return "it was not called on these items"
        if not reached:
            return "it received no gradient: it is not on the way to the loss"
        self.means(rows, self.divisor(positions))
        return ""

    def divisor(self, positions: float) -> float:
        """What sums over backward passes are divided by."""
        return positions * (self.settings.labels if self.settings.fisher == "mc" else 1)


class MatrixSums(BlockSums):
    """``G ⊗ A`` of a weight, with its bias or without, or of a bias: of every group."""

    def begin(self) -> None:
        out, width = self.part.shape
        groups = self.part.groups
        self.a, self.g = self.zeros(groups, width, width), self.zeros(groups, out, out)
        self.fitted: Tensor | None = None
        if self.forward_only:
            self.g += torch.eye(out, dtype=self.dtype, device=self.device)

    def _rows(self, taken: Capture, calls: Sequence[Call], items: slice) -> Tensor:
        rows = [self.part.inputs(taken, call, items).to(self.dtype) for call in calls]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    def _out(self, taken: Capture, arrived: Sequence[Arrived], items: slice) -> Tensor:
        rows = [self.part.gradients(taken, g, items).to(self.dtype) for _, g in arrived]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    def add_inputs(self, taken: Capture) -> None:
        calls = self.part.calls(taken)
        for items in taken.chunks(self.part.layer.name) if calls else ():
            x = self._rows(taken, calls, items)
            if self.settings.kfac_approx == "reduce":
                x = x.mean(2, keepdim=True)
            _add_products(self.a, x)
            self.rows += x.shape[1] * x.shape[2]

    def add_gradients(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        self.reached = True
        for items in taken.chunks(self.part.layer.name):
            g = self._out(taken, arrived, items)
            if self.settings.kfac_approx == "reduce":
                g = g.sum(2, keepdim=True)
            _add_products(self.g, g)

    def means(self, rows: float, divisor: float) -> None:
        self.a = all_sum(self.a) / rows
        if not self.forward_only:
            self.g = all_sum(self.g) / divisor
        if self.settings.eigenvalues:
            # EKFAC's basis; the eigenvalues are still those of the product.
            left, self.left = torch.linalg.eigh(self.g)
            right, self.right = torch.linalg.eigh(self.a)
            product = left.clamp_min(0).unsqueeze(-1) * right.clamp_min(0).unsqueeze(-2)
            self.fitted = product if self.forward_only else torch.zeros_like(product)

    def add_squares(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        assert self.fitted is not None
        for items in taken.chunks(self.part.layer.name):
            x = self._rows(taken, [call for call, _ in arrived], items)
            g = self._out(taken, arrived, items)
            # The gradient of each item is the sum over its places.
            matrices = torch.einsum("gipo,gipk->giok", g, x)
            turned = self.left.mT.unsqueeze(1) @ matrices @ self.right.unsqueeze(1)
            self.fitted += turned.square().sum(1)

    def fit(self, divisor: float) -> None:
        if not self.forward_only:
            assert self.fitted is not None
            self.fitted = all_sum(self.fitted) / divisor

    def operator(self) -> Operator:
        layer = self.part.layer
        # Entries of a transposed convolution stand in an order that is no Kronecker product's.
        in_order = layer.kind != "conv_transpose" or self.part.form != "matrix"
        alone = self.part.weight is None or self.part.bias is None
        if self.part.groups == 1 and alone and in_order:
            transposed = layer.transposed and self.part.form == "matrix"
            return self._of_group(0, self.space, transposed)
        where = places_in(self.part)
        pieces = [(where[j], self._of_group(j, None, False)) for j in range(self.part.groups)]
        return Scattered(pieces, self.space)

    def _of_group(self, j: int, space: ParamSpace | None, transposed: bool) -> Operator:
        if self.fitted is None:
            return Kronecker(
                self.g[j], self.a[j], space, measure=self.measure, transposed=transposed
            )
        return Ekfac(
            self.left[j],
            self.right[j],
            self.fitted[j],
            space,
            measure=self.measure,
            transposed=transposed,
        )


class LookupSums(BlockSums):
    """``diag(a) ⊗ G`` of a table that items look rows up in. Rows of one item are items of their
    own, as in ``"expand"``: the mean of one-hot rows has no diagonal second moment."""

    def begin(self) -> None:
        self.count, self.width = self.part.layer.shape
        self.a, self.g = self.zeros(self.count), self.zeros(self.width, self.width)
        self.fitted: Tensor | None = None
        if self.forward_only:
            self.g += torch.eye(self.width, dtype=self.dtype, device=self.device)

    def _looked_up(self, taken: Capture, call: Call) -> tuple[Tensor, Tensor]:
        """The rows looked up, ``(items, places)``, and which of them have a gradient."""
        numbers = call.x.reshape(taken.items, -1)
        padding = getattr(call.module, "padding_idx", None)
        if padding is None:
            return numbers, torch.ones_like(numbers, dtype=torch.bool)
        return numbers, numbers != padding

    def _gradients(self, taken: Capture, g: Tensor) -> Tensor:
        return g.reshape(taken.items, -1, self.width).to(self.dtype)

    def add_inputs(self, taken: Capture) -> None:
        for call in self.part.calls(taken):
            numbers, kept = self._looked_up(taken, call)
            self.a += torch.bincount(numbers[kept], minlength=self.count).to(self.dtype)
            self.rows += int(kept.sum())

    def add_gradients(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        self.reached = True
        for call, g in arrived:
            rows = self._gradients(taken, g)[self._looked_up(taken, call)[1]]
            self.g += rows.t() @ rows

    def means(self, rows: float, divisor: float) -> None:
        self.a = all_sum(self.a) / rows
        if not self.forward_only:
            self.g = all_sum(self.g) / divisor
        values, self.basis = torch.linalg.eigh(self.g)
        self.product = torch.outer(self.a, values.clamp_min(0))
        if self.settings.eigenvalues:
            self.fitted = self.product if self.forward_only else torch.zeros_like(self.product)

    def add_squares(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        assert self.fitted is not None
        # Item by item, as each has a whole table as its gradient.
        for item in range(taken.items):
            table = self.zeros(self.count, self.width)
            for call, g in arrived:
                numbers, kept = (found[item] for found in self._looked_up(taken, call))
                rows = self._gradients(taken, g)[item][kept]
                table.index_add_(0, numbers[kept], rows @ self.basis)
            self.fitted += table.square()

    def fit(self, divisor: float) -> None:
        if not self.forward_only:
            assert self.fitted is not None
            self.fitted = all_sum(self.fitted) / divisor

    def operator(self) -> Operator:
        scales = self.product if self.fitted is None else self.fitted
        return Lookup(self.basis, scales, self.space, measure=self.measure)


class ScaleSums(BlockSums):
    """The exact block of a norm's weight and bias, or its diagonal where it would be large."""

    def begin(self) -> None:
        n = self.space.dim
        self.dense = n <= DENSE_SCALES
        self.sums = self.zeros(n, n) if self.dense else self.zeros(n)

    def _rows(self, values: Tensor, axis: int) -> Tensor:
        """Values laid out as a norm's output, with its channels last."""
        moved = values.flatten(axis) if axis < 0 else values.movedim(axis, -1)
        return moved.reshape(-1, self.part.layer.shape[0]).to(self.dtype)

    def add_inputs(self, taken: Capture) -> None:
        for call in self.part.calls(taken):
            self.rows += call.shape.numel() / self.part.layer.shape[0]
            if self.forward_only:
                self._add_slopes(call)

    def _add_slopes(self, call: Call) -> None:
        """With a gradient of the identity at every row: products within a channel."""
        slopes = self._rows(*slope_of(call))
        width = slopes.shape[1]
        squares = slopes.square().sum(0)
        diagonal = self.sums.diagonal() if self.dense else self.sums
        diagonal[:width] += squares
        if self.part.bias:
            diagonal[width:] += len(slopes)
        if self.part.bias and self.dense:
            self.sums[:width, width:].diagonal().add_(slopes.sum(0))
            self.sums[width:, :width].diagonal().add_(slopes.sum(0))

    def add_gradients(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        self.reached = True
        # The gradient of each item, over all its calls and places.
        total = self.zeros(taken.items, self.space.dim)
        for call, g in arrived:
            slopes, axis = slope_of(call)
            products = [slopes.to(g.dtype) * g, g] if self.part.bias else [slopes.to(g.dtype) * g]
            rows = torch.cat([self._rows(values, axis) for values in products], 1)
            total += rows.unflatten(0, (taken.items, -1)).sum(1)
        self.sums += total.t() @ total if self.dense else total.square().sum(0)

    def add_squares(self, taken: Capture, arrived: Sequence[Arrived]) -> None:
        return None  # the block is exact already

    def means(self, rows: float, divisor: float) -> None:
        self.sums = all_sum(self.sums) / (rows if self.forward_only else divisor)

    def fit(self, divisor: float) -> None:
        return None

    def operator(self) -> Operator:
        if self.dense:
            return Dense(self.sums, self.space, measure=self.measure, psd=True)
        return Diagonal(self.sums, self.space, measure=self.measure)


KINDS: dict[str, type[BlockSums]] = {
    "matrix": MatrixSums,
    "bias": MatrixSums,
    "lookup": LookupSums,
    "scale": ScaleSums,
}


def sums_of(model: nn.Module, part: Part, settings: KfacSettings, *, measure: str) -> BlockSums:
    """Empty sums of a part."""
    return KINDS[part.form](part, settings, space_of(model, part), measure=measure)


def _add_products(sums: Tensor, rows: Tensor) -> None:
    """``Σ r rᵀ`` over the rows ``(groups, items, places, n)`` of each group."""
    if len(rows) == 1:
        flat = rows.flatten(0, 2)
        sums[0] += flat.t() @ flat
    else:
        flat = rows.flatten(1, 2)
        sums += flat.mT @ flat
