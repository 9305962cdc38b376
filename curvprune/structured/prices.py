"""What widths cost: the predicted rise of the loss, along the compensated change of every width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from curvprune.curvature import Change, ratio_estimate
from curvprune.model import Layer, Loss, Split, to_device
from curvprune.pricing import Ledger, Row
from curvprune.structured.gradients import draws, output_gradients
from curvprune.structured.solving import CutSolution, reading_layers
from curvprune.structured.work import CutWork

PRICED_BY = "Fisher along the compensated change"


def price_widths(
    model: nn.Module,
    objective: Loss,
    split: Split,
    solved: Mapping[str, CutSolution],
    work: CutWork,
    *,
    labels: int,
    seed: int,
) -> Ledger:
    """½ δᵀFδ of every width of every cut, δ the compensated change.

    A cut that several layers read has one δ, over all of them: their products with the gradient are
    summed before they are squared.

    Cost: one forward and ``labels`` backward passes over the split's items.
    """
    sums, counts = _measure(model, objective, split, solved, labels=labels, seed=seed)
    itemsize = next(model.parameters()).element_size()
    rows, columns = [], []
    for name, solution in solved.items():
        # 1. All units stay: this costs nothing.
        full = solution.cut.units
        own = work.bytes_of(name, full, itemsize)
        rows.append(Row(layer=name, option=str(full), bytes=own, price=0.0, stderr=0.0))
        columns.append(np.zeros(len(counts)))
        # 2. Every smaller width.
        for k, left in enumerate(solution.widths[1:]):
            estimate = ratio_estimate(sums[name][:, k], counts)
            rows.append(
                Row(
                    layer=name,
                    option=str(left),
                    bytes=work.bytes_of(name, left, itemsize),
                    price=estimate.value,
                    stderr=estimate.stderr,
                )
            )
            columns.append(sums[name][:, k].numpy())
    return Ledger(
        rows=tuple(rows),
        sums=np.stack(columns, axis=1),
        count=counts.numpy(),
        measure=objective.measure,
        labels=labels,
        curvature=PRICED_BY,
    )


def _measure(
    model: nn.Module,
    objective: Loss,
    split: Split,
    solved: Mapping[str, CutSolution],
    *,
    labels: int,
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Cut → ½ ⟨g, δ⟩² of every item and width, the mean over ``labels`` draws; positions of every
    item."""
    device = next(model.parameters()).device
    readers = reading_layers(model, {n: s.cut for n, s in solved.items()})
    items = split.items
    counts = torch.zeros(len(items), dtype=torch.float64)
    sums, along = _zeros(solved, len(items))
    changes = _changes_of_layers(solved)

    stacked = {n: layer for n, layer in readers.items() if layer.kind == "experts"}

    def take(name: str, layer: Layer, x: Tensor | None, gradient: Tensor) -> None:
        if layer.kind == "experts":
            return  # by the gradients of their weights, see below
        assert x is not None
        G = gradient.T @ x
        # With the gradient of the bias, for changes that have one.
        with_bias = torch.cat([G, gradient.sum(0)[:, None]], 1)
        for cut, k, change in changes.get(name, ()):
            full = with_bias if len(change.values) == with_bias.numel() else G
            along[cut][k] += change.dot(full.reshape(-1)).double().cpu()

    def take_experts() -> None:
        for name, layer in stacked.items():
            if layer.weight.grad is None:
                continue
            G = layer.as_matrix(layer.weight.grad).reshape(-1)
            for cut, k, change in changes.get(name, ()):
                along[cut][k] += change.dot(G).double().cpu()
            layer.weight.grad = None

    with output_gradients(model, readers, take, inputs=True), _with_gradients(stacked):
        for i, item in enumerate(items):
            generator = draws(seed, i)
            batch = to_device(item, device)
            outputs = objective.outputs(model, batch)
            counts[i] = float(objective.counts(outputs.detach(), batch).sum())
            # The draws of an item share its forward pass.
            for s in range(labels):
                for value in along.values():
                    value.zero_()
                drawn = objective.draw(outputs, batch, generator).sum()
                drawn.backward(retain_graph=s + 1 < labels)
                take_experts()
                for name, products in along.items():
                    sums[name][i] += 0.5 * products.square() / labels
    return sums, counts


def _zeros(
    solved: Mapping[str, CutSolution], items: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums by item and width, and products by width, of every cut."""
    sums, along = {}, {}
    for name, solution in solved.items():
        width = len(next(iter(solution.changes.values())))
        sums[name] = torch.zeros(items, width, dtype=torch.float64)
        along[name] = torch.zeros(width, dtype=torch.float64)
    return sums, along


def _changes_of_layers(
    solved: Mapping[str, CutSolution],
) -> dict[str, list[tuple[str, int, Change]]]:
    """Layer → its changes, each with its cut and the number of the width."""
    found: dict[str, list[tuple[str, int, Change]]] = {}
    for cut, solution in solved.items():
        for name, changes in solution.changes.items():
            found.setdefault(name, []).extend((cut, k, c) for k, c in enumerate(changes))
    return found


@contextmanager
def _with_gradients(layers: Mapping[str, Layer]) -> Iterator[None]:
    """These weights collect gradients of their own; what the user had there comes back."""
    before = {name: layer.weight.grad for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.weight.grad = None
            layer.weight.requires_grad_(True)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.grad = before[name]
