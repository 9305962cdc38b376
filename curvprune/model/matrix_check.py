"""Whether a layer's output is its matrix times its input, seen on data.

Subclasses of Linear, of convolutions and of Embedding may compute more: an embedding times the root
of its width (Gemma, BioGPT), positions that are shifted inside (OPT, BART), a weight that is
standardised before it is used (BiT, NFNet), a product with an adapter or a factor. Hooks may do the
same to a plain class. Whoever takes such a layer for a matrix computes wrong moments, factors and
traces, so each module's output is compared once with the product itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compat import float32_is_coarse
from curvprune.model.forward import Batch, evaluating
from curvprune.model.layers import Layer
from curvprune.model.losses import Loss
from curvprune.model.recurrent import is_recurrent

ROWS, CHANNELS = 256, 2048  # of a module's call that are compared, evenly spaced
TABLE = 4096  # rows of an embedding that are searched at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """How a layer's output differs from its matrix times its input.

    Attributes:
        what: the difference in words, to stand after "layer x: ".
        used: what is used is the weight all the same, so that rounding it is rounding what is used:
            an embedding all of whose outputs are rows of its matrix times one number, or a module
            that returns its product among others.
    """

    what: str
    used: bool = False


@torch.no_grad()
def deviations(
    model: nn.Module, objective: Loss, batch: Batch, layers: Mapping[str, Layer]
) -> dict[str, Deviation]:
    """Layer → how its output differs from its matrix times its input, for layers where it does.

    Every call of every module that has the layer's weight is looked at, on at most `ROWS` rows and
    `CHANNELS` outputs. Layers that the forward pass does not reach are not judged, nor are stacked
    experts, whose formula is transformers' own. Tolerances follow the coarsest type of weight,
    input and output.

    Args:
        batch: a small one; a single item will do.
        layers: of ``model``, by their names in it.

    Cost: one forward pass and a few rows of every product once more.
    """
    found: dict[str, Deviation] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, named: Any, output: Any) -> None:
            if name in found and not found[name].used:
                return
            new = _deviation(layers[name], module, (*arguments, *named.values()), output)
            if new is not None:
                found[name] = new

        return hook

    handles = []
    for name, layer in layers.items():
        if layer.kind == "experts":
            continue
        # By identity, as one module may have two names.
        modules = {id(layer.module): layer.module}
        for alias in layer.aliases:
            module = model.get_submodule(alias)
            modules[id(module)] = module
        for module in modules.values():
            handles.append(module.register_forward_hook(compare(name), with_kwargs=True))
    try:
        with evaluating(model):
            objective.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in layers if name in found}


def _deviation(
    layer: Layer, module: nn.Module, given: Sequence[Any], output: Any
) -> Deviation | None:
    """The difference in one call of a module with the layer's weight."""
    if layer.kind == "recurrent":
        if is_recurrent(module):
            return None
        return Deviation(what=f"{type(module).__name__} has a forward pass of its own")
    if not isinstance(output, Tensor):
        what = f"its module returns a {type(output).__name__}, not a tensor"
        return Deviation(what=what, used=_has_product(layer, module, given, output))
    if not layer.weight.is_floating_point():
        return Deviation(what=f"its weight holds {layer.dtype}, no real numbers")
    tensors = [value for value in given if isinstance(value, Tensor)]
    if isinstance(module, nn.EmbeddingBag):
        return Deviation(what="its output is a sum of rows of its weight", used=True)
    if isinstance(module, nn.Embedding):
        return _of_lookup(layer, tensors, output)
    if not tensors:
        return Deviation(what="its module has no tensor for an input")
    return _of_product(layer, module, tensors[0], output)


def _has_product(layer: Layer, module: nn.Module, given: Sequence[Any], output: Any) -> bool:
    """Whether the product, with or without its bias, is a part of what a module returns."""
    x = next((value for value in given if isinstance(value, Tensor)), None)
    if not isinstance(output, (tuple, list)) or x is None or isinstance(module, nn.Embedding):
        return False
    for part in output:
        for biased in (True, False) if isinstance(part, Tensor) else ():
            if _of_product(layer, module, x, part, biased=biased) is None:
                return True
    return False


# ---------------------------------------------------------------------------------------- products


def _of_product(
    layer: Layer, module: nn.Module, x: Tensor, output: Tensor, *, biased: bool = True
) -> Deviation | None:
    """Compare with ``x Wᵀ + b``, or ``x Wᵀ`` unless ``biased``."""
    other = Deviation(what="its output has another shape than its weight times its input")
    # 1. Rows of inputs and of outputs, by group.
    if layer.convolves:
        dims = layer.weight.ndim
        if x.ndim != dims or output.ndim != dims or output.shape[1] != layer.shape[0]:
            return other
        y = output.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    elif x.shape[-1:] != layer.shape[1:] or output.shape[-1:] != layer.shape[:1]:
        return other
    else:
        y = output.reshape(1, -1, layer.shape[0])
    if not x.is_floating_point():
        return other
    rows = layer.rows(module, x)
    if rows.shape[1] != y.shape[1]:
        return other

    # 2. Some rows and channels.
    weight = layer.as_matrix(layer.weight).reshape(layer.groups, -1, layer.shape[1])
    bias = getattr(module, "bias", None) if biased else None
    shift = y.new_zeros(1) if bias is None else bias.reshape(layer.groups, 1, -1)
    places, channels = _some(rows.shape[1], ROWS, x), _some(weight.shape[1], CHANNELS, x)
    rows, y, weight = rows[:, places], y[:, places][:, :, channels], weight[:, channels]
    shift = shift if bias is None else shift[:, :, channels]

    # 3. The products, and how far rounding may be off: the coarsest type's, of every summand.
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    rounding = _rounding(x, layer.weight, output)
    rows, y, weight, shift = (t.to(dtype) for t in (rows, y, weight, shift))
    expected = rows @ weight.mT + shift
    summands = rows.abs() @ weight.abs().mT + shift.abs()
    allowed = max(1e-4, 4 * rounding) * _norm(expected) + 4 * rounding * _norm(summands)
    if not bool((_norm(y - expected) > allowed + 1e-30).any()):
        return None
    return Deviation(what=_in_words(y, expected, 8 * rounding + 1e-3))


def _in_words(y: Tensor, expected: Tensor, tolerance: float) -> str:
    size = float(_norm(expected.flatten()))
    factor = float((y * expected).sum()) / max(size**2, 1e-30)
    off = float(_norm((y - factor * expected).flatten()))
    if off <= tolerance * abs(factor) * size:
        return f"its output is {factor:.4g} times its weight times its input"
    off = float(_norm((y - expected).flatten()))
    return f"its output differs from its weight times its input by {off / max(size, 1e-30):.0%}"


def _some(count: int, most: int, like: Tensor) -> Tensor:
    """At most so many of ``count`` places, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), device=like.device).long()


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1)


def _rounding(*tensors: Tensor) -> float:
    """Relative rounding error of a product of these types."""
    worst = max(torch.finfo(t.dtype).eps for t in tensors)
    coarse = float32_is_coarse() or tensors[0].is_cuda
    if coarse and worst < 2**-10 and tensors[0].dtype == torch.float32:
        # Kernels may multiply float32 as TensorFloat-32.
        worst = 2**-10
    return worst


# ---------------------------------------------------------------------------------------- lookups


def _of_lookup(layer: Layer, tensors: Sequence[Tensor], output: Tensor) -> Deviation | None:
    """Compare with the rows that the input names."""
    table = layer.weight
    if output.shape[-1:] != table.shape[1:] or not output.is_floating_point():
        return Deviation(what="its output has another shape than the rows of its weight")
    # 1. Exactly those rows?
    index = tensors[0] if tensors else None
    if index is not None and _names_rows(index, table) and index.numel() * table.shape[1]:
        rows = table[index.long()]
        if rows.shape == output.shape and bool(_same(rows, output)):
            return None
    # 2. Some rows, all times the same number?
    flat = output.reshape(-1, table.shape[1])
    flat = flat[_some(len(flat), 32, output)]
    factor = _common_factor(flat.to(_wide(flat)), table)
    if factor is None:
        return Deviation(what="its output is no row of its weight")
    if abs(factor - 1) < 1e-3:
        what = "it looks up other rows of its weight than its input says"
    else:
        what = f"its output is {factor:.4g} times a row of its weight"
    return Deviation(what=what, used=True)


def _names_rows(index: Tensor, table: Tensor) -> bool:
    """Whether a tensor can be an index into the table."""
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        return False
    return not index.numel() or bool(((index >= 0) & (index < len(table))).all())


def _same(rows: Tensor, output: Tensor) -> Tensor:
    # A lookup copies; a cast may round.
    error = (rows.to(_wide(output)) - output.to(_wide(output))).abs()
    return (error <= 2 * _rounding(rows, output) * rows.abs()).all()


def _common_factor(
    found: Float[Tensor, "n width"], table: Float[Tensor, "rows width"]
) -> float | None:
    """The number by which all of ``found`` are multiples of rows of the table, if there is one."""
    # 1. For each, the row of the smallest angle to it, part by part of the table.
    best = torch.full((len(found),), -1.0, dtype=found.dtype, device=found.device)
    nearest = torch.zeros_like(found)
    for part in table.split(TABLE):
        rows = part.to(found.dtype)
        cosine = (found @ rows.t()).abs() / _norm(rows).clamp_min(1e-30) / _norm(found)[:, None]
        value, place = cosine.nan_to_num(-1.0).max(1)
        better = value > best
        best = torch.where(better, value, best)
        nearest = torch.where(better[:, None], rows[place], nearest)
    # 2. Rows of zeros, such as that of padding, are multiples of any.
    counted = (_norm(found) > 0) & (_norm(nearest) > 0)
    if not bool(counted.any()):
        return None
    found, nearest = found[counted], nearest[counted]
    factors = (found * nearest).sum(1) / nearest.square().sum(1)
    # 3. One number for all.
    factor = factors.median()
    tolerance = max(1e-4, 8 * _rounding(table))
    off = _norm(found - factor * nearest) > tolerance * _norm(found)
    return None if bool(off.any()) else float(factor)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
