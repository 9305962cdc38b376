"""Whether the calls of a layer say all about its weight, seen on data.

A weight may also be used outside of its module, in a function, by a view or with another
derivative, and then ``Gᵀ X`` of the calls is not its gradient. So both are computed once, back from
random numbers at the model's outputs, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.compat import full_float32
from curvprune.curvature.capture import Call, Capture, capture, wide
from curvprune.curvature.kronecker_parts import SCALE, slope_of
from curvprune.curvature.unused import requiring
from curvprune.model import Batch, Layer, Loss

GRADIENTS = 1 << 28  # numbers of the gradients that are computed together: 1 GB
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the gradient, beside rounding

OTHER = "the gradient of its weight is another than its calls say: it is used outside of them"
DEPENDS = "how often it is called depends on the items"


def why_calls_do_not_do(
    model: nn.Module, objective: Loss, batch: Batch, layers: Mapping[str, Layer]
) -> dict[str, str]:
    """Layers whose weight's gradient is not the sum of ``Gᵀ X`` over their calls, and why.

    Args:
        batch: a small one; two items will do.
        layers: whose output is their weight times their input, or norms' scales. Those that are
            never called are not judged.

    Cost: a forward and a backward pass; more backward passes where the weights have more than
    `GRADIENTS` numbers.
    """
    taken = capture(model, objective, batch, layers, weights=True)
    reasons: dict[str, str] = {}
    if not taken.outputs.requires_grad:
        return reasons
    # 1. Random numbers at the outputs.
    generator = torch.Generator().manual_seed(0)
    outputs = taken.outputs
    seed = torch.randn(outputs.shape, generator=generator).to(outputs.device, outputs.dtype)
    # 2. What arrives at the calls and at the weights.
    called = [name for name in layers if taken.calls[name]]
    for names in _groups(layers, called):
        edges = [call.edge for name in names for call in taken.calls[name]]
        weights: list[Tensor] = [layers[name].weight for name in names]
        ends: list[Any] = [*edges, *weights]
        with requiring(weights), full_float32():
            found = torch.autograd.grad(outputs, ends, seed, retain_graph=True, allow_unused=True)
        arrived, own = iter(found[: len(edges)]), found[len(edges) :]
        # 3. The same twice?
        for name, gradient in zip(names, own, strict=True):
            made = [(call, next(arrived)) for call in taken.calls[name]]
            if reason := _difference(taken, layers[name], made, gradient):
                reasons[name] = reason
    return reasons


def _groups(layers: Mapping[str, Layer], names: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    room = GRADIENTS
    for name in names:
        if group and layers[name].numel > room:
            yield group
            group, room = [], GRADIENTS
        group.append(name)
        room -= layers[name].numel
    if group:
        yield group


def _difference(
    taken: Capture,
    layer: Layer,
    made: Sequence[tuple[Call, Tensor | None]],
    gradient: Tensor | None,
) -> str:
    """Why a weight's gradient is not what its calls make of it; empty if it is."""
    weight = layer.weight.detach()
    total = torch.zeros(layer.shape, dtype=wide(weight), device=weight.device)
    expected = total.clone()
    if gradient is not None:
        expected = layer.as_matrix(gradient.to_dense() if gradient.is_sparse else gradient)
    # 1. Σ Gᵀ X over the calls, and how large its summands are.
    summands = 0.0
    coarsest = torch.finfo(weight.dtype).eps
    for call, g in made:
        if g is None:
            continue
        for t in (g, call.x):
            if t.is_floating_point():
                coarsest = max(coarsest, torch.finfo(t.dtype).eps)
        try:
            part, size = _of_call(taken, layer, call, g)
        except (ValueError, RuntimeError) as error:
            return f"its input has no rows for its outputs ({str(error).splitlines()[0]})"
        total += part
        summands += size
    # 2. Equal but for rounding.
    close = max(CLOSE[total.dtype], 4 * coarsest)
    norm = torch.linalg.vector_norm
    allowed = close * float(norm(total)) + 4 * coarsest * summands
    return OTHER if float(norm(total - expected.to(total.dtype))) > allowed else ""


def _of_call(taken: Capture, layer: Layer, call: Call, g: Tensor) -> tuple[Tensor, float]:
    """``Gᵀ X`` of one call and ``‖G‖ ‖X‖``."""
    g = g.to(wide(g))
    norm = torch.linalg.vector_norm
    if layer.kind == SCALE:
        slopes, axis = slope_of(call)
        products = slopes.to(g.dtype) * g
        moved = products.flatten(axis) if axis < 0 else products.movedim(axis, -1)
        part = moved.reshape(-1, layer.shape[0]).sum(0).unsqueeze(1)
        return part, float(norm(slopes.float()) * norm(g))
    # All rows as those of one item.
    alone = replace(taken, items=1, calls={layer.name: [call]})
    part = alone.matrices(layer.name, [g], slice(None))[0, 0]
    size = call.x.numel() ** 0.5
    if layer.kind != "embedding":
        size = float(norm(alone.rows(layer.name).float()))
    return part, size * float(norm(g))


# ------------------------------------------------------------------------ batch by batch


class Uneven(ValueError):
    """Layers whose calls of one batch are not like those of the first.

    Attributes:
        reasons: layer → what is other.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        name, reason = next(iter(reasons.items()))
        super().__init__(f"layer {name}: {reason}; leave it out")
        self.reasons = dict(reasons)


def check_even(taken: Capture, names: Sequence[str]) -> None:
    """Raises `Uneven` unless each of these layers is called once, with rows for every item."""
    reasons = {}
    for name in names:
        calls, layer = taken.calls[name], taken.layers[name]
        width = layer.shape[1 if layer.kind == "embedding" else 0]
        if len(calls) != 1 or taken.uses[name] != 1:
            reasons[name] = DEPENDS
        elif len(calls[0].x) % taken.items or calls[0].shape.numel() % (taken.items * width):
            reasons[name] = "the first dimension of its input does not count items"
    if reasons:
        raise Uneven(reasons)
