"""Which form a layer takes on disk: packed, sparse or dense; and how many bytes that is.

It depends on the option, on the kind of layer, and on who must be able to read the artifact.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from curvprune.artifact.readers import readable
from curvprune.model import Layer, changes_of
from curvprune.options import Form, Option, Quantize, pruner_of, quantizer_of, stored_bytes

Portable = bool | Literal["engines"]


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one that transformers saves and loads itself (told without importing
    transformers)."""
    # Wrappers of such models have the first two as well.
    known = getattr(type(model), "config_class", None) is not None
    return known and hasattr(model, "config") and hasattr(model, "save_pretrained")


def reader_of(model: nn.Module, layer: Layer, *, portable: Portable = True) -> str | None:
    """Who must be able to read this layer packed besides `curvprune.load`: ``"transformers"``,
    ``"vllm"``, ``None``.

    transformers' loader unpacks untied ``nn.Linear`` only, and of some classes none: they
    initialise weights that packing has removed. `curvprune.artifact.readers` tries which. A
    ``portable`` artifact therefore stores other layers of its models dense after rounding.
    ``portable="engines"`` is the folder that vLLM reads as well. An artifact that is not portable
    is for `curvprune.load` alone, and so is that of any module that is not transformers' own.
    """
    if _ours_alone(model, portable) or layer.name not in readable(model).packed:
        return None
    return "vllm" if portable == "engines" else "transformers"


def portable_for(model: nn.Module, portable: Portable) -> Portable:
    """``portable``, but for a model of transformers whose folder ``from_pretrained`` would not read
    even with dense weights: never."""
    return False if portable and why_not_portable(model) else portable


def why_not_portable(model: nn.Module) -> str:
    """Why ``from_pretrained`` would read no folder of a model of transformers; empty if it would,
    and for other models."""
    if not is_transformers(model):
        return ""
    if changes_of(model):
        return "no config describes its shapes"
    return readable(model).why_not


def _ours_alone(model: nn.Module, portable: Portable) -> bool:
    """Whether nothing but `curvprune.load` must read the artifact."""
    return not is_transformers(model) or not portable_for(model, portable)


def form_of(model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True) -> Form:
    """How the artifact stores a layer under an option.

    Packed: every rounded layer, if only `curvprune.load` must read it; else those of `reader_of`,
    from 2 bits on (compressed-tensors' zero points are integers, which one bit has no use for).
    Blocks: the same with zero points, where transformers must read it; vLLM reads the packed form
    alone. Sparse: a pruned layer that only `curvprune.load` must read, if that is smaller.
    Otherwise dense.
    """
    ours = _ours_alone(model, portable)
    quantize = quantizer_of(option)
    form: Form = "dense"
    # 1. Packed, where all who must read it can unpack it.
    if quantize is not None:
        form = "packed" if ours else _packed_for_others(model, layer, quantize, portable)
    # 2. Sparse, where that is smaller: few zeros save less than the bitmask takes.
    if pruner_of(option) is not None and ours:
        form = min((form, "sparse"), key=lambda f: _bytes(layer, option, f))
    return form


def _packed_for_others(
    model: nn.Module, layer: Layer, quantize: Quantize, portable: Portable
) -> Form:
    """How a rounded layer lies where others than `curvprune.load` must read it."""
    reader = reader_of(model, layer, portable=portable)
    if reader is None or quantize.bits == 1:
        return "dense"
    return "packed" if quantize.symmetric or reader == "vllm" else "blocks"


def layer_bytes(
    model: nn.Module, layer: Layer, option: Option, *, portable: Portable = True
) -> int:
    """Bytes on disk of one layer under one option."""
    return _bytes(layer, option, form_of(model, layer, option, portable=portable))


def _bytes(layer: Layer, option: Option, form: Form) -> int:
    return stored_bytes(option, layer.shape, dtype=layer.dtype, form=form, groups=layer.groups)
