"""Modules whose weight stays packed in memory, and is unpacked when they run, layer by layer, to
exactly the weight that an unpacked load gives.

A rounded weight is codes of four bits (up to 4 bits) or eight, and 16-bit scales. A sparse one is
one bit for each weight, and the kept weights or their codes.

Of an embedding only the rows that are looked up are unpacked. Few rows through a per-channel 8-bit
Linear on the CPU are multiplied without unpacking (`curvprune.compat.int8_linear`), and so are up
to 64 rows in bfloat16 through one of up to 4 bits (`curvprune.artifact.int4_kernel`).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from curvprune.artifact.int4_kernel import HeldModule, Int4Weight, int4_weight
from curvprune.compat import forget_weights_, int8_linear, keep_unflattened_
from curvprune.compression import dequantize
from curvprune.model import SEVERAL, Layer, Layout
from curvprune.options import Quantize

FEW_ROWS = 2  # of an input, up to which the int8 kernel beats unpacking
_EIGHT = torch.arange(8, dtype=torch.uint8)


class PackedWeight(HeldModule):
    """A rounded weight ``(out, in)`` as codes and scales; ``dtype`` is that of the weight it stands
    for."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self,
        codes: Int8[Tensor, "out in"],
        scale: Float[Tensor, "out groups"],
        zero: Int8[Tensor, "out groups"] | Float[Tensor, "out groups"] | None,
        quantize: Quantize,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.width, self.group_size = codes.shape[1], quantize.group_size
        self.dtype = self.saved = dtype
        self.nibbles = quantize.bits <= 4
        if self.nibbles:
            codes = _to_nibbles(codes)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.int8_kernel = not self.nibbles and zero is None and scale.shape[1] == 1

    def rows(self, index: Tensor | slice = slice(None)) -> Float[Tensor, "rows in"]:
        """Some rows of the weight, or all, unpacked."""
        # Codes stay as they are until their rows are asked for.
        codes = self.codes[index]
        if self.nibbles:
            codes = _from_nibbles(codes)[:, : self.width]
        zero = None if self.zero is None else self.zero[index]
        weight = dequantize(codes, self.scale[index], zero, self.group_size)
        return weight.to(self.saved).to(self.dtype)

    def for_kernel(self) -> Int4Weight | None:
        """The same weight as the 4-bit kernel reads it, if that can hold it.

        One that was saved in float16 or float32 and is asked for in bfloat16 has float16 scales,
        of which bfloat16 keeps 8 of 11 bits.
        """
        if not self.nibbles or self.dtype != torch.bfloat16:
            return None
        codes = _from_nibbles(self.codes)[:, : self.width]
        return int4_weight(codes, self.scale, self.zero, rounds=True)


class SparseWeight(HeldModule):
    """A pruned weight ``(out, in)`` as a bitmask and the kept weights, or their codes and scales;
    ``dtype`` is that of the weight it stands for."""

    mask: Tensor
    values: Tensor
    start: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        matrix: Float[Tensor, "out in"] | Int8[Tensor, "out in"],
        kept: Bool[Tensor, "out in"],
        scale: Float[Tensor, "out groups"] | None,
        zero: Int8[Tensor, "out groups"] | None,
        quantize: Quantize | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.width, self.dtype = kept.shape[1], dtype
        self.group_size = None if quantize is None else quantize.group_size
        self.nibbles = quantize is not None and quantize.bits <= 4
        # 1. Eight weights a byte, row by row, so that a row can be looked up.
        bits = F.pad(kept, (0, -self.width % 8)).view(len(kept), -1, 8).to(torch.uint8)
        self.register_buffer("mask", (bits << _EIGHT.to(kept.device)).sum(dim=2, dtype=torch.uint8))
        # 2. Where each row begins among the kept weights, which stand one after another.
        counts = kept.sum(dim=1)
        self.register_buffer("start", counts.cumsum(0) - counts)
        values = matrix[kept]
        self.register_buffer("values", _to_nibbles(values[None])[0] if self.nibbles else values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def rows(self, index: Tensor | slice = slice(None)) -> Float[Tensor, "rows in"]:
        """Some rows of the weight, or all, unpacked."""
        bits = (self.mask[index][..., None] >> _EIGHT.to(self.mask.device)) & 1
        kept = bits.flatten(1)[:, : self.width].bool()
        if isinstance(index, slice) and index == slice(None):
            values = _from_nibbles(self.values[None])[0] if self.nibbles else self.values
            matrix = values.new_zeros(kept.shape).masked_scatter_(kept, values)
        else:
            matrix = self._looked_up(index, kept)
        if self.scale is not None:
            zero = None if self.zero is None else self.zero[index]
            matrix = dequantize(matrix, self.scale[index], zero, self.group_size)
        nothing = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
        return torch.where(kept, matrix, nothing).to(self.dtype)

    def _looked_up(self, index: Tensor | slice, kept: Bool[Tensor, "rows in"]) -> Tensor:
        """Weights or codes of some rows; where ``kept`` is not set, any."""
        at = (self.start[index][:, None] + kept.cumsum(dim=1) - 1).clamp_(min=0)
        if not self.nibbles:
            return self.values[at]
        # Two codes a byte: the even one is the low half.
        pairs = _from_nibbles(self.values[at >> 1].reshape(-1, 1)).view(*at.shape, 2)
        return pairs.gather(2, (at & 1)[..., None])[..., 0]


HeldWeight = PackedWeight | SparseWeight | Int4Weight


def _to_nibbles(codes: Int8[Tensor, "rows columns"]) -> Int8[Tensor, "rows half"]:
    """Codes from −8 to 7, two a byte."""
    unsigned = F.pad(codes + 8, (0, codes.shape[1] % 2)).to(torch.uint8)
    return (unsigned[:, ::2] | (unsigned[:, 1::2] << 4)).view(torch.int8)


def _from_nibbles(nibbles: Int8[Tensor, "rows half"]) -> Int8[Tensor, "rows columns"]:
    """As many codes as fit: one more than there were, where their number was odd."""
    unsigned = nibbles.view(torch.uint8)
    return torch.stack([unsigned & 15, unsigned >> 4], dim=2).flatten(1).to(torch.int8) - 8


class _Around(nn.Module):
    """A module around another one, whose attributes it has."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _empty_(module: nn.Module, parameter: str, dtype: torch.dtype) -> None:
    """Take a module's weight away; its name stays, for those who read its type."""
    setattr(module, parameter, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))


class Packed(_Around):
    """A module of any kind with its weight packed; attributes other than ``weight`` are the
    module's own."""

    def __init__(self, module: nn.Module, weight: HeldWeight, layout: Layout) -> None:
        super().__init__(module)
        self.packed, self.layout = weight, layout
        _empty_(module, "weight", weight.dtype)
        # By the forward pass itself: a subclass may do something else with its weight.
        self.looks_up = type(module).forward is nn.Embedding.forward and module.max_norm is None
        self.multiplies = type(module).forward is nn.Linear.forward

    @property
    def weight(self) -> Tensor:
        """Unpacked, laid out as the module wants it."""
        return self.layout.tensor(self.packed.rows())

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if len(arguments) == 1 and not named:
            x = arguments[0]
            if self.looks_up:
                return self.packed.rows(x.reshape(-1)).reshape(*x.shape, self.packed.width)
            if self.multiplies and (
                _uses_int4_kernel(self.packed, x) or _uses_int8_kernel(self.packed, x)
            ):
                return self._multiplied(x)
        return torch.func.functional_call(self.module, {"weight": self.weight}, arguments, named)

    def _multiplied(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """What a Linear returns, from the codes themselves."""
        held, rows = self.packed, x.reshape(-1, self.packed.width)
        if isinstance(held, Int4Weight):
            y = held.multiplied(rows)
        else:
            eight = cast(PackedWeight, held)
            y = int8_linear(rows, eight.codes, eight.scale[:, 0].to(x.dtype))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        bias = self.module.bias
        return y + bias if isinstance(bias, Tensor) else y


def _uses_int4_kernel(held: HeldWeight, x: Tensor) -> bool:
    """Whether rows in bfloat16 go through a weight of up to 4 bits on the CPU."""
    fits = isinstance(held, Int4Weight) and x.shape[-1:] == (held.width,)
    return fits and cast(Int4Weight, held).runs(x)


def _uses_int8_kernel(held: HeldWeight, x: Tensor) -> bool:
    """Whether few rows go through a per-channel 8-bit weight on the CPU."""
    if not isinstance(held, PackedWeight) or not held.int8_kernel or x.dtype != held.dtype:
        return False
    if x.shape[-1:] != (held.width,) or (x.requires_grad and torch.is_grad_enabled()):
        return False  # it has no gradient
    few = x.numel() <= FEW_ROWS * held.width
    here = x.device.type == "cpu" and held.codes.device.type == "cpu"
    return few and here and x.dtype in (torch.float32, torch.bfloat16)


class PackedSeveral(_Around):
    """Stacked experts or a recurrent module with some of their weights packed; while they run, all
    of them are unpacked."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.packed = nn.ModuleDict()
        self.layouts: dict[str, Layout] = {}

    def pack(self, parameter: str, weight: HeldWeight, layout: Layout) -> None:
        if isinstance(self.module, nn.RNNBase):
            keep_unflattened_(self.module)
        _empty_(self.module, parameter, weight.dtype)
        self.packed[parameter] = weight
        self.layouts[parameter] = layout

    def forward(self, *arguments: Any, **named: Any) -> Any:
        # Those that are not packed are the module's own, and stay.
        weights = {}
        for name, layout in self.layouts.items():
            held = cast(HeldWeight, self.packed[name])
            weights[name] = layout.tensor(held.rows())
        try:
            return torch.func.functional_call(self.module, weights, arguments, named)
        finally:
            if isinstance(self.module, nn.RNNBase):
                forget_weights_(self.module)


def pack_modules(model: nn.Module, layer: Layer, weight: HeldWeight) -> bool:
    """Replace every module that holds or shares the layer's weight.

    Returns whether it is a Linear that no kernel multiplies few rows by without unpacking it.
    """
    layout = layer.layout
    names = (layer.name, *layer.aliases)
    owners: list[str] = list(names)
    if layer.kind in SEVERAL:  # their names are those of parameters
        owners = [name.rpartition(".")[0] for name in names]
    # All are looked up first: two names may lead to one place, where the first would leave what the
    # second finds.
    modules = [model.get_submodule(owner) for owner in owners]
    # A row alone is not looked up in the kernel's order: only what multiplies is held in it.
    multiplied = all(type(module).forward is nn.Linear.forward for module in modules)
    if multiplied and isinstance(weight, PackedWeight):
        weight = weight.for_kernel() or weight
    for name, owner, module in zip(names, owners, modules, strict=True):
        packed: nn.Module
        if layer.kind in SEVERAL:
            packed = module if isinstance(module, PackedSeveral) else PackedSeveral(module)
            packed.pack(name.rpartition(".")[2], weight, layout)
        else:
            packed = Packed(module, weight, layout)
        # In its place, under its name.
        parent, _, leaf = owner.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
    eight = isinstance(weight, PackedWeight) and weight.int8_kernel
    return multiplied and not eight and not isinstance(weight, Int4Weight)


def give_back_memory() -> None:
    """The dense weights that were freed go back to the system: glibc would keep those below 32 MB
    for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)
