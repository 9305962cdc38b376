"""A user's function as a loss: see `Loss.of`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model.forward import Batch, items_in, one_item, outputs
from curvprune.model.losses.loss import Loss


class LossOfOutputs(Loss):
    """A function of (outputs, batch), with curvature by differentiation."""

    def __init__(
        self,
        function: Callable[..., Any],
        which: str | Callable[[nn.Module, Batch], Tensor],
        *,
        name: str,
        measure: str,
    ) -> None:
        self.function, self.which = function, which
        self.name, self.measure = name, measure

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.which == "model":
            return super().outputs(model, batch)
        found: Any
        if callable(self.which):
            found = self.which(model, batch)
        else:
            found = getattr(outputs(model, batch), self.which, None)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"loss {self.name}: outputs={self.which!r} gave {type(found).__name__} of "
                f"{type(model).__name__}; expected a tensor whose first dimension counts items"
            )
        if found.ndim == 0 or len(found) != items_in(batch):
            raise ValueError(
                f"loss {self.name}: outputs of shape {tuple(found.shape)} for a batch of "
                f"{items_in(batch)} items; expected the first dimension to count items"
            )
        return found

    def loss_of(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
        found = self.function(outputs, batch)
        if _is_one_number(found):
            losses = self._one_by_one(outputs, batch)
            return losses.sum(), len(losses)
        total, count = _summed(found, len(outputs), self.name)
        return total, count

    def item_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        found = self.function(outputs, batch)
        if isinstance(found, tuple):
            return super().item_losses(outputs, batch)
        if _is_one_number(found):
            return self._one_by_one(outputs, batch)
        _summed(found, len(outputs), self.name)
        return found.flatten(1).sum(1) if found.ndim > 1 else found

    def place_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        found = self.function(outputs, batch)
        if isinstance(found, tuple) or _is_one_number(found):
            return super().place_losses(outputs, batch)
        _summed(found, len(outputs), self.name)
        return found.flatten()

    def _one_by_one(self, outputs: Tensor, batch: Batch) -> Tensor:
        singles = []
        for i in range(len(outputs)):
            singles.append(self.function(outputs[i : i + 1], one_item(batch, i)))
        losses = torch.stack(singles)
        _mean_of(self.function(outputs, batch), losses, self.name)
        return losses


class LossOfModel(Loss):
    """A function of (model, batch) of which nothing else is known.

    Its "outputs" are loss and count of each item, ``(items, 2)``. Where the function returns no
    more than a number for the batch, every item is given the same part of it: only their sum means
    something then, and who needs single items passes batches of one.
    """

    curvature = "none"

    def __init__(self, function: Callable[..., Any], *, name: str, measure: str) -> None:
        self.function, self.name, self.measure = function, name, measure
        self.is_mean: bool | None = None  # of one number for a batch; unknown before the first

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        items = items_in(batch)
        found = self.function(model, batch)
        if isinstance(found, Tensor) and found.ndim > 0 and len(found) == items:
            losses = found.flatten(1).sum(1) if found.ndim > 1 else found
            counts = torch.full_like(losses, found.numel() / items)
            return torch.stack([losses, counts], 1)
        total, count = self._of_batch(found, model, batch)
        return torch.stack([total, total.new_tensor(count)]).expand(items, 2) / items

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        return self._of_batch(self.function(model, batch), model, batch)

    def _of_batch(self, found: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        items = items_in(batch)
        if not _is_one_number(found) or items == 1:
            return _summed(found, items, self.name)
        # Whether one number is a mean or a sum, only the items themselves can say.
        if self.is_mean is None:
            with torch.no_grad():
                singles = [self.loss(model, one_item(batch, i))[0] for i in range(items)]
                self.is_mean = _mean_of(found, torch.stack(singles), self.name)
        return found * items if self.is_mean else found, items

    def loss_of(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
        return outputs[:, 0].sum(), float(outputs[:, 1].sum())

    def item_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs[:, 0]

    def counts(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs[:, 1].detach().double()


def _is_one_number(found: Any) -> bool:
    return isinstance(found, Tensor) and found.ndim == 0


def _mean_of(whole: Tensor, losses: Tensor, name: str) -> bool:
    """Whether the number for a batch is the mean of its items' own losses; else it is their sum.
    Raises ``ValueError`` if it is neither."""
    sums, value = float(losses.detach().sum()), float(whole.detach())
    near = 1e-3 * max(abs(sums), float(losses.detach().abs().max()), 1e-12)
    if abs(value * len(losses) - sums) <= near:
        return True
    if abs(value - sums) <= near:
        return False
    raise ValueError(
        f"loss {name}: {value:.6g} for a batch of {len(losses)} items whose own losses sum to "
        f"{sums:.6g}: neither sum nor mean, so items depend on each other or are weighed; "
        "return one number per item, shape (items,), or (sum, count)"
    )


def _summed(found: Any, items: int, name: str) -> tuple[Tensor, float]:
    """``(sum, count)`` of what a function returned for a batch."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor):
        return found[0].reshape(()), float(found[1])
    if isinstance(found, Tensor) and found.ndim > 0 and len(found) == items:
        return found.sum(), found.numel()
    if _is_one_number(found) and items == 1:
        return found, 1.0
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise ValueError(
        f"loss {name} returned {shape} for a batch of {items} items; expected one number per item "
        f"({items},), a pair (sum, count), or one number for the batch"
    )
