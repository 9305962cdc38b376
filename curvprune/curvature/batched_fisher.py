"""Trace and diagonal of every layer's Fisher matrix from the factors of whole mini-batches.

One backward pass per drawn label gives all layers' output gradients; per-item gradients are
contractions of these with the inputs (`curvprune.curvature.capture`), so that no item needs a pass
of its own.

Source: Dangel, Kunstner & Hennig 2020 (BackPACK), §2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compat import full_float32
from curvprune.curvature.capture import Capture, backward, capture, wide
from curvprune.curvature.draws import ONE_LABEL, Draws
from curvprune.curvature.gradient_check import check_even
from curvprune.distributed import all_sum, gather, my_share
from curvprune.model import Batch, Layer, Loss


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherMoments:
    """First-order curvature of the layers: sums over items, to be divided by the number of
    positions.

    Attributes:
        count: positions of each item, ``(items,)``.
        traces: layer → ``‖g‖²`` of each item, mean over labels (or sum over exact columns).
        diagonal: layer → diagonal per position, ``(out, in)``; empty if it was not asked for.
    """

    count: Float[Tensor, " items"]
    traces: dict[str, Float[Tensor, " items"]]
    diagonal: dict[str, Float[Tensor, "out in"]]


class MomentSums:
    """`FisherMoments` in the making, mini-batch by mini-batch."""

    def __init__(self, layers: Mapping[str, Layer], diagonal: bool) -> None:
        self.layers = layers
        self.counts: list[Tensor] = []
        self.traces: dict[str, list[Tensor]] = {n: [] for n in layers}
        self.diagonal: dict[str, Tensor] = {}
        if diagonal:
            for name, layer in layers.items():
                weight = layer.weight
                zeros = torch.zeros(layer.shape, dtype=wide(weight), device=weight.device)
                self.diagonal[name] = zeros

    def squares(
        self, taken: Capture, name: str, g: Sequence[Tensor], scale: float
    ) -> Float[Tensor, " items"]:
        """``scale · Σ ‖gᵦ‖²`` over one or several backward passes, for each item; the diagonal
        takes in its part."""
        per_item = []
        for items in taken.chunks(name, len(g)):
            if taken.one_place(name):
                # ‖g xᵀ‖² = ‖g‖² ‖x‖², and the squares of its entries are products of squares.
                x = taken.rows(name, items)[0, :, 0].to(wide(g[0])).square()
                rows = [taken.gradients(name, c, items)[0, :, 0].square() for c in g]
                outer = torch.stack(rows).sum(0)
                per_item.append(outer.sum(1).double() * x.sum(1).double())
                if self.diagonal:
                    self.diagonal[name].addmm_(outer.t(), x, alpha=scale)
                continue
            squares = taken.matrices(name, g, items).square_()
            # sum() adds in a tree, which float32 needs here; norm() runs along and is off by 1e-4.
            per_item.append(squares.flatten(1).sum(1).double())
            if self.diagonal:
                self.diagonal[name].add_(squares.sum((0, 1)), alpha=scale)
        return scale * torch.cat(per_item)

    def result(self) -> FisherMoments:
        # A process without a mini-batch of its own has nothing to add.
        none = [torch.zeros(0, dtype=torch.float64)]
        count = gather(torch.cat(self.counts or none))
        total = float(count.sum())
        traces = {n: gather(torch.cat(t or none)) for n, t in self.traces.items()}
        for name, trace in traces.items():
            finite = torch.isfinite(trace)
            if not bool(finite.all()):
                raise FloatingPointError(
                    f"layer {name}: the gradient of item {int((~finite).nonzero()[0])} is not "
                    "finite; run the model in float32 or bfloat16"
                )
        return FisherMoments(
            count=count,
            traces=traces,
            diagonal={n: all_sum(d) / total for n, d in self.diagonal.items()},
        )


@full_float32()
def fisher_moments(
    model: nn.Module,
    objective: Loss,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    draws: Draws | None = ONE_LABEL,
    diagonal: bool = True,
    first: Capture | None = None,
) -> FisherMoments:
    """Trace and diagonal of the true Fisher for factored layers, from labels drawn from the model.

    Cost: one forward and ``draws.labels`` backward passes over the data for all layers at once,
    about one gradient together.

    Args:
        draws: the labels; ``None`` takes the data's own, for the empirical Fisher (per item).
        first: the first batch's forward pass, if it has been made.

    Raises:
        Uneven: a batch whose items call a layer otherwise than those of the others, by name.
        FloatingPointError: a non-finite gradient, naming the layer and the item.
    """
    sums = MomentSums(layers, diagonal)
    passes = 1 if draws is None else draws.labels
    for number, batch in my_share(list(enumerate(batches))):
        # 1. Forward pass.
        generator = None if draws is None else draws.generator(number)
        if first is not None and number == 0:
            taken = first
        else:
            taken = capture(model, objective, batch, layers)
        first = None
        check_even(taken, list(layers))
        with torch.enable_grad():
            sums.counts.append(objective.counts(taken.outputs.detach(), batch))
            device = taken.outputs.device
            totals = {
                n: torch.zeros(taken.items, dtype=torch.float64, device=device) for n in layers
            }
            # 2. One backward pass per label, for all layers.
            for s in range(passes):
                if generator is None:
                    loss = objective.loss_of(taken.outputs, batch)[0]
                else:
                    loss = objective.scores(taken.outputs, batch, generator).sum()
                gradients = backward(taken, list(layers), loss, retain=s + 1 < passes)
                # 3. Squares of every item's gradient, mean over labels.
                for name, g in zip(layers, gradients, strict=True):
                    totals[name] += sums.squares(taken, name, [g], 1 / passes)
        for name, trace in totals.items():
            sums.traces[name].append(trace)
    return sums.result()
