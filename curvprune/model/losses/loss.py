"""What a loss is: how outputs are had from a model, what they cost, and their curvature.

Every loss is a pair ``(sum, count)``. Whoever needs a mean divides in one place, so that ragged
batches, padding and ignored labels cannot bias it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.model.forward import Batch, in_double, items_in, one_item, outputs
from curvprune.model.losses.output_hessian import MAX_WIDTH, OutputHessian, square_root

# A position counts so many nats where a changed model returns no finite numbers: out of any
# budget's reach.
BROKEN = 1000.0
MAX_COLUMNS = 1024  # of a root of the Hessian at the outputs, each of which costs a backward pass


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemResults:
    """Per item: summed loss, number of positions, number of positions predicted right (nan where a
    loss has no notion of right)."""

    loss: Float[Tensor, " items"]
    count: Float[Tensor, " items"]
    correct: Float[Tensor, " items"]

    @property
    def mean_loss(self) -> float:
        """Loss per position."""
        return float(self.loss.sum() / self.count.sum())

    @property
    def accuracy(self) -> float:
        return float(self.correct.sum() / self.count.sum())

    def finite(self, worst: float = BROKEN) -> ItemResults:
        """The same, with ``worst`` a position, and none right, where the loss is no finite
        number."""
        good = self.loss.isfinite()
        loss = torch.where(good, self.loss, worst * self.count)
        return ItemResults(loss=loss, count=self.count, correct=self.correct.where(good, 0.0))


class Loss:
    """What a model is to predict, and how badly it does.

    A subclass must give `loss_of`. The rest follows by differentiation: items are taken one by one,
    and the curvature at the outputs is the second derivative of `loss_of` there. Subclasses that
    know their curvature in closed form (`curvprune.model.losses.positions`) overwrite it.

    The loss of an item must not depend on the other items of its batch.

    Attributes:
        name: the word that recipes and ``loss=`` use.
        measure: what one loss is counted in, e.g. ``"nats/token"``.
        curvature: how the curvature at the outputs is known: ``"closed form"``,
            ``"differentiation"`` or ``"none"``; records say so.
        labelled: it compares with labels of the data.
        distribution: outputs determine a distribution of the target, so that two models have a
            divergence without labels.
        has_accuracy: predictions are right or wrong.
    """

    name: str = "loss"
    measure: str = "loss/item"
    curvature: str = "differentiation"
    labelled: bool = True
    distribution: bool = False
    has_accuracy: bool = False

    @staticmethod
    def of(
        function: Callable[..., Any],
        *,
        outputs: str | Callable[[nn.Module, Batch], Tensor] | None = None,
        name: str | None = None,
        measure: str = "loss/item",
    ) -> Loss:
        """Any differentiable function as a loss. Its curvature is had by differentiation, and
        records name it so.

        Args:
            function: with ``outputs``, a function of (outputs, batch); without, of (model, batch).
                It returns one number per item, a tensor whose first dimension counts items (each
                entry is a position), a pair (sum, count), or one number for the batch: the mean or
                the sum over items, each item counting once.
            outputs: what the loss is a function of: ``"model"`` for what the model returns (a
                tensor, or the field ``logits``), another string for the field of that name, or a
                function of (model, batch) to a tensor whose first dimension counts items. ``None``:
                unknown. There are Hessian products and the empirical Fisher then, but no
                Gauss–Newton matrix, no Fisher and no prices by it.
            name, measure: for messages and records.

        Cost: beside the model's, a call of ``function`` for each item where it returns one number,
        and up to 128 products with its second derivative for each batch.

        Raises ``ValueError``, when evaluated, for a result of another form, or a number that is
        neither mean nor sum of the items' own.

        Example:
            >>> import torch, curvprune as cp
            >>> model = torch.nn.Linear(6, 3, bias=False)
            >>> x, y = torch.randn(40, 6), torch.randn(40, 3)
            >>> def squares(outputs, batch):
            ...     return (outputs - batch[1]).square().sum(1)
            >>> loss = cp.Loss.of(squares, outputs="model")
            >>> H = cp.hessian(model, [(x, y)], loss=loss).to_dense()
            >>> bool(torch.isclose(H.trace(), 6 * x.square().sum(1).mean(), rtol=1e-4))
            True
        """
        from curvprune.model.losses.any_function import LossOfModel, LossOfOutputs

        title = name or str(getattr(function, "__name__", type(function).__name__))
        if outputs is None:
            return LossOfModel(function, name=title, measure=measure)
        return LossOfOutputs(function, outputs, name=title, measure=measure)

    # ---------------------------------------------------------------------------- what it costs

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model (one forward pass) and return the outputs that the loss is a function of,
        the first dimension counting items."""
        # transformers' outputs have the field, other models return the tensor, some in a tuple.
        output = outputs(model, batch)
        found = getattr(output, "logits", output)
        if isinstance(found, (tuple, list)):
            found = found[0]
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{type(model).__name__} returned {type(output).__name__}: expected a tensor or "
                "an output with .logits, or, of a model without any, objective=LabelFree(model, "
                "of=...) with a function to some, or a loss of its own: cp.Loss.of(function, "
                "outputs=...)"
            )
        return found

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        """``(sum, count)`` of the loss over the positions that count; differentiable. One forward
        pass."""
        return self.loss_of(self.outputs(model, batch), batch)

    def loss_of(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """`loss` from outputs that are already there."""
        raise NotImplementedError

    def item_losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " items"]:
        """Summed loss of every item; differentiable."""
        sums = []
        for i in range(len(outputs)):
            sums.append(self.loss_of(outputs[i : i + 1], one_item(batch, i))[0])
        return torch.stack(sums)

    def place_losses(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " n"]:
        """Loss of every place that counts (an image, a token, a pixel), over all its outputs;
        differentiable.

        Raises ``ValueError`` where a loss is only known for whole items of several positions.
        """
        if bool((self.counts(outputs.detach(), batch) > 1).any()):
            raise ValueError(
                f"loss {self.name} is known for whole items only, and they have several positions; "
                "take per='item', or pass a loss that returns one number for each position"
            )
        return self.item_losses(outputs, batch)

    def counts(self, outputs: Tensor, batch: Batch) -> Float[Tensor, " items"]:
        """Positions of every item, in float64. They need not be whole where targets are
        weighed."""
        counts = []
        with torch.no_grad():
            for i in range(len(outputs)):
                counts.append(self.loss_of(outputs[i : i + 1], one_item(batch, i))[1])
        return torch.tensor(counts, dtype=torch.float64, device=outputs.device)

    @torch.no_grad()
    def item_results(self, model: nn.Module, batch: Batch) -> ItemResults:
        """Loss, positions and hits of every item of the batch. One forward pass."""
        if self.curvature == "none":
            return self._results_one_by_one(model, batch)
        found = self.outputs(model, batch)
        loss = self.item_losses(found, batch).double()
        return ItemResults(
            loss=loss, count=self.counts(found, batch), correct=torch.full_like(loss, torch.nan)
        )

    def _results_one_by_one(self, model: nn.Module, batch: Batch) -> ItemResults:
        results = [self.loss(model, one_item(batch, i)) for i in range(items_in(batch))]
        loss = torch.stack([total.double() for total, _ in results])
        count = loss.new_tensor([count for _, count in results])
        return ItemResults(loss=loss, count=count, correct=torch.full_like(loss, torch.nan))

    # ------------------------------------------------------------------ curvature at the outputs

    def hessian_at(self, outputs: Tensor, batch: Batch) -> OutputHessian:
        """The Hessian of the summed loss at the outputs, by its products.

        Raises ``ValueError`` where the loss is not known as a function of outputs.
        """
        if self.curvature == "none":
            raise ValueError(
                f"loss {self.name} is known as a function of the model alone, so it has no "
                "curvature at outputs: no Gauss–Newton matrix, no Fisher, no prices by it. Pass "
                "cp.Loss.of(function, outputs=...), or ask for matrix='hessian' (prices: "
                "curvature='hessian') or 'empirical-fisher'"
            )
        return OutputHessian(lambda z: self.loss_of(z, batch)[0], outputs)

    def draw(
        self, outputs: Tensor, batch: Batch, generator: torch.Generator
    ) -> Float[Tensor, " items"]:
        """For each item a number whose gradient at its outputs is a random vector, of mean zero and
        with the Hessian of the item's loss there as its covariance.

        Squares of what it back-propagates estimate the Gauss–Newton matrix without bias, which for
        a likelihood is the true Fisher. The numbers themselves mean nothing.

        Raises ``ValueError`` where that Hessian is not positive semidefinite.
        """
        precise = outputs.detach() if outputs.dtype == torch.float64 else outputs.detach().float()
        return _along(outputs, self.hessian_at(precise, batch).draw(generator))

    def scores(
        self, outputs: Tensor, batch: Batch, generator: torch.Generator
    ) -> Float[Tensor, " items"]:
        """`draw`, but the vector is the gradient of ``−log p(ŷ)`` for targets ŷ sampled from the
        model itself, where the loss is a likelihood."""
        return self.draw(outputs, batch, generator)

    def item_hessians(self, outputs: Tensor, batch: Batch) -> Float[Tensor, "items k k"]:
        """The Hessian of each item's loss at its outputs, ``k`` numbers in all, in float64."""
        return self.hessian_at(outputs.double(), in_double(batch)).of_items()

    def root_columns(
        self, outputs: Tensor, batch: Batch, generator: torch.Generator
    ) -> Iterator[Float[Tensor, "*outputs"]]:
        """Vectors laid out as the outputs, whose outer products, item by item, sum to the Hessian
        of each item's loss at its outputs.

        Where an item has several positions and more than `MAX_WIDTH` outputs, all positions share
        the columns, each with random signs of its own. Products between positions then vanish in
        expectation only; those within a position are exact.

        Raises ``ValueError`` where the Hessian is not positive semidefinite, or where it needs more
        than `MAX_COLUMNS` columns.
        """
        width = outputs[0].numel()
        if width > MAX_WIDTH:
            raise ValueError(
                f"loss {self.name}: {width} outputs an item; its curvature is not known in closed "
                f"form, so columns of it are had up to {MAX_WIDTH}; take fisher='mc' instead"
            )
        roots = square_root(self.item_hessians(outputs.detach(), batch)).to(outputs.dtype)
        for column in roots.unbind(-1):
            yield column.view_as(outputs)

    def rises(self, before: Tensor, after: Tensor, batch: Batch) -> Float[Tensor, " items"]:
        """What a change of the outputs costs each item beyond the slope: ``ℓ(after) − ℓ(before) −
        ⟨∇ℓ(before), after − before⟩``, in float64.

        Of second order it is ``½ Δᵀ H Δ``. For a likelihood in canonical form it is the KL
        divergence, whatever the labels.
        """
        if self.curvature == "none":
            self.hessian_at(before, batch)  # says why there is none
        batch = in_double(batch)
        start = before.detach().double()
        losses, slope = self._slope_at(start, batch)
        with torch.no_grad():
            risen = self.item_losses(after.detach().double(), batch) - losses
            step = (slope * (after.double() - start)).flatten(1).sum(1)
        return (risen - step).detach()

    def rise_slope(self, before: Tensor, after: Tensor, batch: Batch) -> Float[Tensor, "*outputs"]:
        """The gradient of the summed `rises` with respect to ``after``: ``∇ℓ(after) − ∇ℓ(before)``,
        at least in float32. Labels of a likelihood in canonical form cancel out."""
        if self.curvature == "none":
            self.hessian_at(before, batch)  # says why there is none
        ours = self._slope_at(_at_least_float(after), batch)[1]
        theirs = self._slope_at(_at_least_float(before), batch)[1]
        return ours.sub_(theirs)

    def _slope_at(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of all items at some outputs, and the gradient of their sum."""
        start = outputs.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.item_losses(start, batch)
            slope = torch.autograd.grad(losses.sum(), start)[0]
        return losses, slope


def _at_least_float(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _along(outputs: Tensor, vectors: Tensor) -> Float[Tensor, " items"]:
    """``⟨outputs, v⟩`` of every item, with v as its gradient."""
    # An output of −∞ has no part in v, and −∞ · 0 would be nan.
    products = torch.where(vectors != 0, outputs, 0.0) * vectors
    return products.flatten(1).sum(1)
