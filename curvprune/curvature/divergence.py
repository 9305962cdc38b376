"""The slope of a compressed model's divergence along changes of its weights, item by item.

Let ``f`` be the outputs of the compressed model at a position, ``f₀`` those of the uncompressed one
and ``ℓ`` the loss. What the changed outputs cost beyond the slope of the loss is

    D(f₀, f) = ℓ(f) − ℓ(f₀) − ⟨∇ℓ(f₀), f − f₀⟩,    with the gradient    ∇ℓ(f) − ∇ℓ(f₀).

For a softmax it is the KL divergence of the two predictions, with the gradient q − p: labels cancel
out, so there is no noise of sampled or of the data's own labels.

Source: Bregman 1967; for exponential families it is the KL divergence (Banerjee et al. 2005,
"Clustering with Bregman divergences", §4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.curvature.draws import Draws
from curvprune.curvature.sampled_fisher import (
    Change,
    Checkpoint,
    differentiating,
    gradients_go_to,
)
from curvprune.distributed import all_sum, gather, my_share, shared
from curvprune.model import Batch, Layer, Loss, evaluating, to_device

# Positions that say which outputs count: those of the first items, if all were as long as the first
# one. So each of several processes knows whether its items are among them.
DRAWN = 2048
FROM_THE_START = Checkpoint()


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergencePass:
    """What the pass found; every number is an item's sum over its positions.

    Attributes:
        count: positions of each item.
        divergence: what the compressed model costs each item beyond the slope of the loss.
        rises: what it costs each item by the loss itself: of a likelihood, by its labels.
        slopes: layer → ``⟨∇D, δ⟩`` of every change.
        rows: layer → how much the loss bends along each of its outputs, by the first items of
            about `DRAWN` positions: the sum of ``‖g_i‖²``, with g_i what a draw leaves at row i of
            the weight (`curvprune.curvature.fisher_pass`).
    """

    count: Float[Tensor, " items"]
    divergence: Float[Tensor, " items"]
    rises: Float[Tensor, " items"]
    slopes: dict[str, Float[Tensor, "items changes"]]
    rows: dict[str, Float[Tensor, " out"]]


def divergence_pass(
    models: tuple[nn.Module, nn.Module],
    objective: Loss,
    items: Sequence[Batch],
    layers: Mapping[str, Layer],
    changes: Mapping[str, Sequence[Change]],
    *,
    seed: int = 0,
    checkpoint: Checkpoint = FROM_THE_START,
) -> DivergencePass:
    """Run the pass over ``(uncompressed, compressed)``.

    Args:
        items: batches of one item.
        layers: those of the compressed model.
        changes: layer → changes of its weight.
        seed: of the draws for `DivergencePass.rows`.
        checkpoint: for long passes, see `Checkpoint`.

    Cost: two forward passes and one backward pass per item (two for the first of about `DRAWN`
    positions), one dot product per change and item.
    Memory: one weight gradient at a time. Several processes share the items.

    Raises:
        ValueError: the loss is not known at outputs.
        FloatingPointError: the compressed model's outputs or a gradient are no finite numbers; of
            several processes all raise it.
    """
    uncompressed, compressed = models
    # 1. Totals, empty or from where an earlier pass was interrupted.
    device = next(compressed.parameters()).device
    totals = checkpoint.resume or _empty_totals(layers, changes, len(items))
    totals = {key: value.to(device) for key, value in totals.items()}
    after_item = checkpoint.after_item or (lambda done, totals: None)
    sums = _Slopes(layers, changes, totals, Draws(labels=1, seed=seed))

    # 2. This process's items, one after the other.
    broken: FloatingPointError | None = None
    with (
        differentiating(compressed, layers),
        evaluating(uncompressed),
        gradients_go_to(layers, sums.hook),
    ):
        done = int(totals["done"])
        mine = my_share(range(len(items)))
        left = mine[done:] if done < len(items) else ()
        if left:
            sums.drawn_from = _drawn_items(uncompressed, objective, to_device(items[0], device))
        for i in left:
            batch = to_device(items[i], device)
            with torch.no_grad():
                before = objective.outputs(uncompressed, batch)
            try:
                sums.take_item(compressed, objective, i, batch, before)
            except FloatingPointError as error:
                broken = error
                break
            totals["done"] += 1
            after_item(int(totals["done"]), totals)
    _raise_together(broken, sums.item)

    # 3. The other processes' items.
    if shared() and int(totals["done"]) < len(items):
        for key in sorted(totals.keys() - {"done"}):
            all_sum(totals[key])
        totals["done"].fill_(len(items))
        after_item(len(items), totals)
    return DivergencePass(
        count=totals["count"].cpu(),
        divergence=totals["divergence"].cpu(),
        rises=totals["rise"].cpu(),
        slopes={name: totals[f"slope/{name}"].cpu() for name in layers},
        rows={name: totals[f"rows/{name}"].cpu() for name in layers},
    )


@torch.no_grad()
def _drawn_items(model: nn.Module, objective: Loss, first: Batch) -> int:
    """How many items `DivergencePass.rows` are by. Cost: a forward pass of the first one."""
    positions = float(objective.counts(objective.outputs(model, first), first).sum())
    return math.ceil(DRAWN / max(1.0, positions))


@torch.no_grad()
def _rise(objective: Loss, before: Tensor, after: Tensor, batch: Batch) -> float:
    """How much more the second outputs lose than the first."""
    first = objective.item_losses(before, batch).double()
    second = objective.item_losses(after, batch).double()
    return float((second - first).sum())


def _raise_together(broken: FloatingPointError | None, item: int) -> None:
    """What one of several processes has found ends the pass in all: none waits for its sums."""
    if not shared():
        if broken is not None:
            raise broken
        return
    none = 2**62
    first = int(gather(torch.tensor([none if broken is None else item])).min())
    if first == none:
        return
    if broken is not None and item == first:
        raise broken
    raise FloatingPointError(
        f"item {first}: the compressed model's outputs or gradients are no finite numbers"
    )


def _empty_totals(
    layers: Mapping[str, Layer], changes: Mapping[str, Sequence[Change]], items: int
) -> dict[str, Tensor]:
    totals = {
        "done": torch.zeros((), dtype=torch.int64),
        "count": torch.zeros(items, dtype=torch.float64),
        "divergence": torch.zeros(items, dtype=torch.float64),
        "rise": torch.zeros(items, dtype=torch.float64),
    }
    for name in layers:
        number = len(changes.get(name, ()))
        totals[f"slope/{name}"] = torch.zeros(items, number, dtype=torch.float64)
        totals[f"rows/{name}"] = torch.zeros(layers[name].shape[0], dtype=torch.float64)
    return totals


class _Slopes:
    """Takes in each weight's gradient as soon as it is complete, and lets it go."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        changes: Mapping[str, Sequence[Change]],
        totals: dict[str, Tensor],
        draws: Draws,
    ) -> None:
        self.layers, self.changes, self.totals = layers, changes, totals
        self.draws, self.item, self.drawn = draws, 0, False
        self.drawn_from = 0  # items that are also gone back from with random signs

    def take_item(
        self, model: nn.Module, objective: Loss, item: int, batch: Batch, before: Tensor
    ) -> None:
        """Forward and backward pass of one item."""
        self.item = item
        found = objective.outputs(model, batch)
        after = found.detach()
        self.totals["count"][item] = float(objective.counts(after, batch).sum())
        divergence = float(objective.rises(before, after, batch).sum())
        if not divergence < float("inf"):
            raise FloatingPointError(
                f"item {item}: the compressed model's outputs are no finite numbers"
            )
        self.totals["divergence"][item] = divergence
        self.totals["rise"][item] = _rise(objective, before, after, batch)
        if not found.requires_grad:  # no layer is on the way to the loss
            return
        # 1. Back from the divergence.
        draws = item < self.drawn_from
        slope = objective.rise_slope(before, after, batch).to(found.dtype)
        self.drawn = False
        found.backward(slope, retain_graph=draws)
        # 2. Of some items also back from random signs: which outputs the loss bends along.
        if draws:
            self.drawn = True
            objective.draw(found, batch, self.draws.generator(item)).sum().backward()

    def hook(self, name: str) -> Callable[[Tensor], None]:
        layer = self.layers[name]

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = layer.as_matrix(parameter.grad)
            gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
            if self.drawn:
                self.totals[f"rows/{name}"] += gradient.double().square().sum(1)
                parameter.grad = None
                return
            flat = gradient.reshape(-1)
            for k, change in enumerate(self.changes.get(name, ())):
                slope = change.dot(flat).double()
                if not bool(slope.isfinite()):
                    raise FloatingPointError(
                        f"layer {name}: the gradient of item {self.item} is not finite; run the "
                        "model in float32 or bfloat16"
                    )
                self.totals[f"slope/{name}"][self.item, k] = slope
            parameter.grad = None

        return take
