"""What is exact for which layer, read off one small forward pass and its autograd graph.

Where the path from a layer's output to the model's is piecewise linear (ReLU, pooling, BatchNorm in
evaluation mode), the layer's block of the **Hessian** equals its Gauss–Newton block wherever it
exists. The block's diagonal, trace and spectrum are then exact from first-order passes.

Source: Botev et al. 2017, "Practical Gauss-Newton optimisation for deep learning", §2 (piecewise
linear transfer functions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.compat import is_custom_function, normalises_by_batch, operation_of
from curvprune.curvature.capture import Capture, capture
from curvprune.curvature.determinism import check_deterministic, first_items
from curvprune.curvature.gradient_check import DEPENDS, why_calls_do_not_do
from curvprune.model import Batch, Layer, Loss, PositionLoss, deviations

TOGETHER = "what the model says of an item depends on the others of its batch"
MAX_COLUMNS = 128  # classes − 1 above which exact columns are not attempted


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Which layers the factors describe.

    Attributes:
        factored: layers called once, whose output is their weight times their input, whose weight
            is used nowhere else and whose rows belong to one item each.
        piecewise_linear: factored layers whose path to the outputs is piecewise linear.
        heads: piecewise linear layers whose outputs are the model's, for any number of positions
            and classes.
        reasons: layer → why it is not factored.
        altered: those of them whose output is not their weight times their input.
        exact: every item has at most one prediction, outputs ``(items, k)``, with few enough of
            them for exact Gauss–Newton columns.
        together: what the model says of an item depends on the others of its batch.
    """

    factored: tuple[str, ...]
    piecewise_linear: tuple[str, ...]
    heads: tuple[str, ...]
    reasons: dict[str, str]
    altered: tuple[str, ...]
    exact: bool
    together: bool

    def without(self, reasons: Mapping[str, str]) -> Structure:
        """The same with some layers not factored, and why."""

        def left(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(name for name in names if name not in reasons)

        return replace(
            self,
            factored=left(self.factored),
            piecewise_linear=left(self.piecewise_linear),
            heads=left(self.heads),
            reasons={**self.reasons, **reasons},
        )


def find_structure(
    model: nn.Module,
    objective: Loss,
    batch: Batch,
    layers: Mapping[str, Layer],
    taken: Capture | None = None,
) -> Structure:
    """Read the structure off a forward pass of several items (``taken``, or one of the first two)
    and one of the first.

    Raises ``ValueError`` for a model that is not deterministic, naming the module.
    """
    # 1. Two forward passes: what changes with the number of items does not belong to one item.
    if taken is None:
        batch = first_items(batch, 2)
        taken = capture(model, objective, batch, layers)
    single = capture(model, objective, first_items(batch, 1), layers)
    apart = _rows_belong(single.outputs.detach(), taken.outputs.detach())
    if not apart:
        check_deterministic(model, objective, batch)

    # 2. Layers whose gradients have factors per item.
    found = deviations(model, objective, first_items(batch, 1), layers)
    reasons = {name: deviation.what for name, deviation in found.items()}
    for name in layers:
        reason = _why_not_factored(name, single, taken) if apart else TOGETHER
        if name not in found and reason:
            reasons[name] = reason
    rest = {name: layer for name, layer in layers.items() if name not in reasons}
    if rest:
        reasons |= why_calls_do_not_do(model, objective, first_items(batch, 2), rest)
    factored = tuple(n for n in layers if n not in reasons)

    # 3. Those whose path to the outputs is piecewise linear, and those that end there.
    nonlinear = _nonlinear(taken, factored)
    piecewise_linear = tuple(n for n in factored if n not in nonlinear)
    return Structure(
        factored=factored,
        piecewise_linear=piecewise_linear,
        heads=tuple(n for n in piecewise_linear if _is_head(taken, n, objective, batch)),
        reasons=reasons,
        altered=tuple(found),
        # By shape, not by the labels of these few items: others may have more positions that count.
        exact=apart
        and objective.curvature != "none"
        and taken.outputs.ndim == 2
        and taken.outputs.shape[-1] - 1 <= MAX_COLUMNS,
        together=not apart and taken.outputs.shape[1:] == single.outputs.shape[1:],
    )


def _why_not_factored(name: str, single: Capture, several: Capture) -> str:
    """Why a layer's gradients have no factors per item; empty if they have."""
    layer, calls, uses = several.layers[name], several.calls[name], several.uses[name]
    if layer.kind == "experts":
        return "a router decides which items' rows an expert sees"
    if len(calls) != 1 or uses != 1:
        return (
            f"its weight is used {max(uses, len(calls))} times, {len(calls)} of them by calling it"
        )
    if len(single.calls[name]) != 1:
        return DEPENDS
    x = calls[0].x
    if layer.kind == "conv" and x.ndim != layer.weight.ndim:
        return "its input has no dimension for items"
    alone = single.calls[name][0].x
    if len(x) != several.items * len(alone) or not _rows_belong(alone, x):
        return "the first dimension of its input does not count items"
    renormalised = getattr(layer.module, "max_norm", None) is not None
    if renormalised or getattr(layer.module, "scale_grad_by_freq", False):
        return "an embedding with max_norm or scale_grad_by_freq is not linear"
    return ""


def _rows_belong(single: Tensor, several: Tensor) -> bool:
    """Whether the first item's rows are the same, computed alone and among others."""
    first = several[: len(single)]
    if first.shape != single.shape:
        return False
    if not single.is_floating_point():
        return bool((first == single).all())
    largest = float(single.abs().max()) if single.numel() else 0.0
    if single.dtype == torch.float64:
        return torch.allclose(first, single, rtol=1e-6, atol=1e-8 * largest + 1e-30)
    return torch.allclose(first.float(), single.float(), rtol=1e-2, atol=1e-3 * largest + 1e-8)


def _is_head(taken: Capture, name: str, objective: Loss, batch: Batch) -> bool:
    """The layer's output is what the loss judges row by row, seen through nothing but views, copies
    and casts."""
    call, outputs = taken.calls[name][0], taken.outputs
    if taken.layers[name].kind != "linear" or call.shape != outputs.shape:
        return False
    if not isinstance(objective, PositionLoss) or objective.curvature != "closed form":
        return False
    # The outputs of a position are a row of the layer's, in its order.
    where = objective.where(outputs.detach(), batch)
    row = torch.arange(outputs.shape[-1], device=where.device)
    if where.shape[-1] != len(row) or not bool((where % len(row) == row).all()):
        return False
    node: Any = outputs.grad_fn
    while node is not None and node is not call.edge.node:
        if operation_of(node) not in ("View", "UnsafeView", "Alias", "Clone", "ToCopy"):
            return False
        node = node.next_functions[0][0]
    return node is not None


# Backward nodes of functions that are piecewise linear in their inputs together ...
_PIECES = "Relu LeakyRelu Threshold Hardtanh Abs Clamp ClampMin ClampMax Maximum Minimum"
_MAXIMA = "MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D Max Amax Min Amin Max1 Min1"
_MEANS = "AvgPool2D AvgPool3D AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D Mean Sum Add Sub Neg"
_VIEWS = "View UnsafeView ReshapeAlias T Transpose Permute Squeeze Unsqueeze Expand Clone ToCopy"
_PARTS = "Cat Stack Slice Select Index Split SplitWithSizes Unbind Alias AsStrided"
_PADS = "ConstantPadNd ReflectionPad2D ReplicationPad2D UpsampleNearest2D UpsampleBilinear2D"
_MOVES = "Flip Roll Where MaskedFill Gather Repeat AccumulateGrad IndexSelect Unfold PixelShuffle"
_LINEAR = set(" ".join((_PIECES, _MAXIMA, _MEANS, _VIEWS, _PARTS, _PADS, _MOVES)).split())
# ... and of products, linear in each factor: quadratic where two factors depend on one layer.
_PRODUCTS = {"Convolution", "Addmm", "Mm", "Bmm", "Baddbmm", "Mul", "PreluKernel"}
_BATCH_NORMS = {"NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"}


def _nonlinear(taken: Capture, names: Sequence[str]) -> set[str]:
    """Layers on whose way to the outputs the autograd graph has a node that is not piecewise linear
    in them.

    A set of layers is an integer with one bit for each.
    """
    bits = {taken.calls[n][0].edge.node: 1 << i for i, n in enumerate(names)}
    masks: dict[Any, int] = {}  # node -> layers that its inputs depend on
    crooked = 0
    # Depth first: a node is judged after all that it depends on.
    stack: list[tuple[Any, bool]] = [(taken.outputs.grad_fn, False)]
    while stack:
        node, inputs_done = stack.pop()
        if node is None or (node in masks and not inputs_done):
            continue
        inputs = [n for n, _ in node.next_functions if n is not None]
        if not inputs_done:
            stack.append((node, True))
            stack.extend((n, False) for n in inputs if n not in masks)
            continue
        below = [masks[n] | bits.get(n, 0) for n in inputs]
        masks[node] = _union(below)
        crooked |= _bent(node, below, masks, bits)
    return {n for i, n in enumerate(names) if crooked >> i & 1}


def _bent(
    node: Any, below: Sequence[int], masks: Mapping[Any, int], bits: Mapping[Any, int]
) -> int:
    """Layers in which a node is not piecewise linear, given those that its inputs depend on."""
    kind = operation_of(node)
    if is_custom_function(node):  # whatever its name
        return _union(below)
    if kind in _PRODUCTS:
        bent = 0
        for i, mask in enumerate(below):
            for other in below[:i]:
                bent |= mask & other
        return bent
    if kind == "Div":
        top, bottom = (n for n, _ in node.next_functions[:2])
        numerator = masks.get(top, 0) | bits.get(top, 0)
        denominator = masks.get(bottom, 0) | bits.get(bottom, 0)
        return denominator | (numerator & denominator)
    if kind in _BATCH_NORMS:
        return _union(below) if normalises_by_batch(node) else 0
    return 0 if kind in _LINEAR else _union(below)


def _union(masks: Sequence[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found
