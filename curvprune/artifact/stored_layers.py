"""How one layer lies on disk, packed, sparse or dense: from a solved layer to its tensors and back.

The packed layout is compressed-tensors' ``pack-quantized``: integer codes of ``bits`` bits packed
without gaps into little-endian int32 words along the inputs, float scales, zero points packed along
the outputs, and the shape. `curvprune.load` reads it for every kind of layer of any module.

Plain transformers reads it for Linear layers of its own models, but for zero points: from version
5.23 on it refuses packed ones. Those layers are ``blocks`` of one row and a group's width, of which
compressed-tensors packs the codes alone: a zero point is a byte.

A pruned layer that only `curvprune.load` must read is stored sparse where that is smaller.
``weight_bitmask`` has one bit for each weight, rows one after another, lowest bit first, set where
a weight is kept. Those weights alone follow in the same order: as ``weight_values`` or, rounded, as
``weight_packed`` in one run of codes, with the same scales and zero points. Exactly as many bits
are set as the option keeps, so that the size depends on option and shape alone: what is kept may be
zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from curvprune.artifact.packed_modules import HeldWeight, PackedWeight, SparseWeight
from curvprune.artifact.packing import bitmask, bits_of, pack, unpack
from curvprune.compression import HALF_WAY, Solved, dequantize, spread
from curvprune.model import Layer, key_of
from curvprune.options import (
    Form,
    Option,
    Quantize,
    kept_weights,
    pruner_of,
    quantizer_of,
    stored_dtype,
)

_AT_ONCE = 1 << 20  # places looked through at a time; each takes eight bytes

# ----------------------------------------------------------------------------------------- Writing


def stored_tensors(layer: Layer, solved: Solved, *, form: Form) -> dict[str, Tensor]:
    """The tensors of one layer as they lie on disk, keyed by their full name."""
    quantize = quantizer_of(solved.option)
    if form == "dense":
        weight = layer.from_matrix(solved.weight).to(_stored_type(layer, solved.option))
        return {layer.keys[0]: weight.contiguous()}
    tensors = {"shape": torch.tensor(layer.shape, dtype=torch.int64)}
    if form == "sparse":
        tensors |= _sparse_tensors(layer, solved)
    elif quantize is not None and solved.codes is not None:
        tensors["packed"] = pack(solved.codes, quantize.bits)
    # The same for both: a sparse layer leaves out codes, not groups.
    if quantize is not None:
        tensors |= _grid_tensors(solved, quantize, form)
    return {key_of(layer.name, f"weight_{key}"): tensor for key, tensor in tensors.items()}


def _stored_type(layer: Layer, option: Option) -> torch.dtype:
    found: torch.dtype = getattr(torch, stored_dtype(option, layer.dtype))
    return found


def _sparse_tensors(layer: Layer, solved: Solved) -> dict[str, Tensor]:
    """The bitmask, and the weights or codes where it is set."""
    quantize = quantizer_of(solved.option)
    if quantize is None:
        weight = solved.weight.to(_stored_type(layer, solved.option))
        kept = _kept(weight != 0, layer, solved.option)
        return {"values": weight[kept], "bitmask": bitmask(kept)}
    assert solved.codes is not None
    pruned = _code_of_zero(solved.zero, quantize, layer.shape[1])
    kept = _kept(solved.codes != pruned, layer, solved.option)
    codes = pack(solved.codes[kept][None], quantize.bits)[0]
    return {"packed": codes, "bitmask": bitmask(kept)}


def _grid_tensors(solved: Solved, quantize: Quantize, form: Form) -> dict[str, Tensor]:
    """Scales, and zero points where zero is not the middle of the grid."""
    assert solved.scale is not None
    tensors = {"scale": solved.scale.contiguous()}
    if solved.zero is not None and not quantize.symmetric:
        # Those of one bit are no integers, and those of blocks have a byte each.
        packs = quantize.bits > 1 and form != "blocks"
        zero = pack(solved.zero, quantize.bits, dim=0) if packs else solved.zero.contiguous()
        tensors["zero_point"] = zero
    return tensors


def _code_of_zero(zero: Tensor | None, quantize: Quantize, width: int) -> Tensor | int:
    """The code that a pruned weight has: its group's zero point."""
    return 0 if zero is None else spread(zero, width, quantize.group_size, dim=1)


def _kept(mask: Bool[Tensor, "out in"], layer: Layer, option: Option) -> Bool[Tensor, "out in"]:
    """Exactly as many weights as the option keeps: those that are not zero, and as many zeros as
    are missing."""
    prune = pruner_of(option)
    assert prune is not None
    promised = kept_weights(prune, layer.shape, groups=layer.groups)
    found = int(mask.sum())
    if found > promised:
        raise ValueError(
            f"layer {layer.name}: {found} of {layer.numel} weights are not zero, but option "
            f"{option.key} keeps {promised}; compress the layer again"
        )
    mask = mask.contiguous()
    missing = promised - found
    # The first zeros, part by part: never the places of a whole large layer at once.
    for part in mask.view(-1).split(_AT_ONCE):
        if missing == 0:
            break
        places = (~part).nonzero()[:missing, 0]
        part[places] = True
        missing -= len(places)
    return mask


# ----------------------------------------------------------------------------------------- Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A packed or sparse layer, read back.

    Attributes:
        matrix: ``(out, in)`` codes where there is a grid, else weights.
        kept: of a sparse layer, which weights are stored; the others are zero.
        quantize, scale, zero: the grid, as in `curvprune.compression.Solved`.
    """

    matrix: Tensor
    kept: Tensor | None = None
    quantize: Quantize | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None

    def weight(self) -> Tensor:
        if self.quantize is None or self.scale is None:
            return self.matrix
        return dequantize(self.matrix, self.scale, self.zero, self.quantize.group_size)

    def held(self, dtype: torch.dtype) -> HeldWeight:
        """The weight as it stays packed in memory, for a layer of type ``dtype``."""
        if self.kept is not None:
            return SparseWeight(self.matrix, self.kept, self.scale, self.zero, self.quantize, dtype)
        assert self.quantize is not None and self.scale is not None
        return PackedWeight(self.matrix, self.scale, self.zero, self.quantize, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnDisk:
    """The tensors of a file, of which those of one layer are taken out."""

    file: Path
    tensors: dict[str, Tensor]
    layer: Layer
    option: Option

    @property
    def where(self) -> str:
        return f"{self.file}: layer {self.layer.name}"

    def take(
        self, key: str, dtype: torch.dtype | None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The layer's tensor ``weight_{key}``, of a given type and shape, if any are given."""
        tensor = self.tensors.pop(key_of(self.layer.name, f"weight_{key}"), None)
        if tensor is None:
            raise ValueError(f"{self.where} lacks its weight_{key}; the file is damaged")
        fits = dtype is None or tensor.dtype == dtype
        if not fits or (shape is not None and tuple(tensor.shape) != shape):
            expected = f"{dtype or 'float'} {list(shape or ())}".removeprefix("torch.")
            found = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
            raise ValueError(
                f"{self.where}: its weight_{key} is {found}, expected {expected}; the file is "
                "damaged"
            )
        return tensor


def take_stored(
    file: Path, tensors: dict[str, Tensor], layer: Layer, option: Option, *, form: Form
) -> Stored:
    """Read a packed or sparse layer; its tensors are removed from those of the file.

    Raises ``ValueError`` naming file and layer if they are not whole, of another shape, or do not
    fit each other.
    """
    disk = _OnDisk(file=file, tensors=tensors, layer=layer, option=option)
    quantize, (out, width) = quantizer_of(option), layer.shape
    # 1. The shape first: what is wrong with it is wrong with all others.
    shape = disk.take("shape", torch.int64, (2,)).tolist()
    if shape != [out, width]:
        raise ValueError(f"{disk.where} is {shape}, the model has {layer.shape}")
    # 2. The grid, if the layer is rounded.
    scale = zero = kept = None
    if quantize is not None:
        scale, zero = _take_grid(disk, quantize, form)
    # 3. Weights or codes: those that are kept, or all.
    if form == "sparse":
        kept = _take_kept(disk)
        matrix = _take_sparse(disk, kept, zero)
    else:
        assert quantize is not None
        words = disk.take("packed", torch.int32, (out, math.ceil(width * quantize.bits / 32)))
        matrix = unpack(words, quantize.bits, width)
    return Stored(matrix=matrix, kept=kept, quantize=quantize, scale=scale, zero=zero)


def _take_grid(disk: _OnDisk, quantize: Quantize, form: Form) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points."""
    out, width = disk.layer.shape
    groups = 1 if quantize.group_size is None else math.ceil(width / quantize.group_size)
    scale = disk.take("scale", None, (out, groups))
    # One bit has no code for zero: the middle lies between its two.
    if quantize.bits == 1 and quantize.symmetric:
        return scale, torch.full(scale.shape, HALF_WAY, dtype=torch.float16)
    if quantize.symmetric:
        return scale, None
    if quantize.bits == 1:
        return scale, disk.take("zero_point", torch.float16, (out, groups))
    if form == "blocks":
        return scale, disk.take("zero_point", torch.int8, (out, groups))
    words = disk.take("zero_point", torch.int32, (math.ceil(out * quantize.bits / 32), groups))
    return scale, unpack(words, quantize.bits, out, dim=0)


def _take_kept(disk: _OnDisk) -> Bool[Tensor, "out in"]:
    """Which weights a sparse layer keeps: exactly as many as its option says."""
    (out, width), option = disk.layer.shape, disk.option
    bits = bits_of(disk.take("bitmask", torch.uint8, (math.ceil(out * width / 8),)))
    prune, count, groups = pruner_of(option), int(bits.sum()), disk.layer.groups
    whole = prune is not None and count == kept_weights(prune, (out, width), groups=groups)
    if not whole or bits[out * width :].any():
        raise ValueError(
            f"{disk.where}: its bitmask keeps {count} weights, not what {option.key} keeps; the "
            "file is damaged"
        )
    return bits[: out * width].view(out, width)


def _take_sparse(disk: _OnDisk, kept: Bool[Tensor, "out in"], zero: Tensor | None) -> Tensor:
    """The matrix of a sparse layer, of weights or of codes; what is not kept is zero."""
    count, quantize = int(kept.sum()), quantizer_of(disk.option)
    matrix: Tensor
    if quantize is None:
        values = disk.take("values", None, (count,))
        matrix = values.new_zeros(kept.shape)
    else:
        words = disk.take("packed", torch.int32, (math.ceil(count * quantize.bits / 32),))
        values = unpack(words[None], quantize.bits, count)[0]
        matrix = values.new_zeros(kept.shape) + _code_of_zero(zero, quantize, kept.shape[1])
    matrix[kept] = values
    return matrix
