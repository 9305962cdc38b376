"""Which form a layer takes on disk: packed, sparse or dense; and how many bytes that is.

It depends on the option, on the kind of layer, and on who must be able to read the artifact.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from curvprune.model import Layer, changes_of
from curvprune.options import Form, Option, Quantize, pruner_of, quantizer_of, stored_bytes

Portable = bool | Literal["engines"]


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one that transformers saves and loads itself (told without importing
    transformers)."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def reader_of(model: nn.Module, layer: Layer, *, portable: Portable = True) -> str | None:
    """Who must be able to read this layer packed besides `curvprune.load`: ``"transformers"``,
    ``"engines"``, ``None``.

    transformers' loader unpacks untied ``nn.Linear`` only: a packed Embedding crashes its weight
    initialisation. A ``portable`` artifact therefore stores other layers of its models dense after
    rounding. ``portable="engines"`` keeps the options of those that are packed to what serving
    engines have kernels for. An artifact that is not portable is for `curvprune.load` alone, and so
    is that of any module that is not transformers' own.
    """
    if _ours_alone(model, portable) or layer.kind != "linear" or layer.aliases:
        return None
    return "engines" if portable == "engines" else "transformers"


def portable_for(model: nn.Module, portable: Portable) -> Portable:
    """A model of transformers with shapes that its config cannot describe is never portable
    (`curvprune.model.shapes`)."""
    return False if is_transformers(model) and changes_of(model) else portable


def _ours_alone(model: nn.Module, portable: Portable) -> bool:
    """Whether nothing but `curvprune.load` must read the artifact."""
    return not portable_for(model, portable) or not is_transformers(model)


def form_of(model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True) -> Form:
    """How the artifact stores a layer under an option.

    Packed: every rounded layer, if only `curvprune.load` must read it; else those of `reader_of`,
    from 2 bits on (compressed-tensors' zero points are integers, which one bit has no use for).
    Sparse: a pruned layer that only `curvprune.load` must read, if that is smaller. Otherwise
    dense.
    """
    ours = _ours_alone(model, portable)
    quantize = quantizer_of(option)
    form: Form = "dense"
    # 1. Packed, where all who must read it can unpack it.
    if quantize is not None and (ours or _others_unpack(model, layer, quantize, portable)):
        form = "packed"
    # 2. Sparse, where that is smaller: few zeros save less than the bitmask takes.
    if pruner_of(option) is not None and ours:
        form = min((form, "sparse"), key=lambda f: _bytes(layer, option, f))
    return form


def _others_unpack(model: nn.Module, layer: Layer, quantize: Quantize, portable: Portable) -> bool:
    """Whether those who must read the layer packed can."""
    if quantize.bits == 1 or _one_row_of_zero_points(layer, quantize):
        return False
    return reader_of(model, layer, portable=portable) is not None


def _one_row_of_zero_points(layer: Layer, quantize: Quantize) -> bool:
    """Whether all outputs' zero points fit into one word: compressed-tensors (0.20) cannot unpack a
    row of those."""
    out, width = layer.shape
    return (
        not quantize.symmetric
        and out * quantize.bits <= 32
        and width > (quantize.group_size or width)
    )


def layer_bytes(
    model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True
) -> int:
    """Bytes on disk of one layer under one option."""
    return _bytes(layer, option, form_of(model, layer, option, portable=portable))


def _bytes(layer: Layer, option: Option, form: Form) -> int:
    return stored_bytes(option, layer.shape, dtype=layer.dtype, form=form, groups=layer.groups)
