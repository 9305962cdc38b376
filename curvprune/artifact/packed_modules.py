"""Modules whose weight stays packed in memory: codes of four bits (up to 4 bits) or eight, and
16-bit scales; of a sparse layer one bit for each weight, and the kept ones. It is unpacked when its
module runs, layer by layer, to exactly the weight that an unpacked load gives.

Of an embedding only the rows that are looked up are unpacked. Few rows through a per-channel 8-bit
Linear on the CPU use torch's ``_weight_int8pack_mm``: at one row 4 times as fast as unpacking, at
16 rows 18 times slower (1536 × 576, torch 2.13, AVX-512 without AMX); its 4-bit kernels lost to
unpacking and are not used.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from curvprune.compression import dequantize
from curvprune.model import Layer, laid_out
from curvprune.options import Quantize

FEW_ROWS = 2  # of an input, up to which the int8 kernel beats unpacking
_EIGHT = torch.arange(8, dtype=torch.uint8)


class PackedWeight(nn.Module):
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
        self.width, self.group_size, self.dtype = codes.shape[1], quantize.group_size, dtype
        self.nibbles = quantize.bits <= 4
        if self.nibbles:
            codes = _to_nibbles(codes)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.int8_kernel = not self.nibbles and zero is None and scale.shape[1] == 1

    def rows(self, index: Tensor | slice = slice(None)) -> Float[Tensor, "rows in"]:
        """Some rows of the weight, or all, unpacked."""
        codes = self.codes[index]
        if self.nibbles:
            codes = _from_nibbles(codes)[:, : self.width]
        zero = None if self.zero is None else self.zero[index]
        return dequantize(codes, self.scale[index], zero, self.group_size).to(self.dtype)


class SparseWeight(nn.Module):
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
        bits = F.pad(kept, (0, -self.width % 8)).view(len(kept), -1, 8).to(torch.uint8)
        self.register_buffer("mask", (bits << _EIGHT.to(kept.device)).sum(dim=2, dtype=torch.uint8))
        counts = kept.sum(dim=1)
        self.register_buffer("start", counts.cumsum(0) - counts)  # where each row begins
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
            at = (self.start[index][:, None] + kept.cumsum(dim=1) - 1).clamp_(min=0)
            if self.nibbles:
                pairs = _from_nibbles(self.values[at >> 1].reshape(-1, 1)).view(*at.shape, 2)
                matrix = pairs.gather(2, (at & 1)[..., None])[..., 0]
            else:
                matrix = self.values[at]
        if self.scale is not None:
            zero = None if self.zero is None else self.zero[index]
            matrix = dequantize(matrix, self.scale[index], zero, self.group_size)
        return torch.where(
            kept, matrix, torch.zeros((), dtype=matrix.dtype, device=matrix.device)
        ).to(self.dtype)


HeldWeight = PackedWeight | SparseWeight


def _to_nibbles(codes: Int8[Tensor, "rows columns"]) -> Int8[Tensor, "rows half"]:
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


def _emptied(module: nn.Module, parameter: str, dtype: torch.dtype) -> None:
    setattr(module, parameter, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))


class Packed(_Around):
    """A module of any kind with its weight packed; attributes other than ``weight`` are the
    module's own."""

    def __init__(
        self, module: nn.Module, weight: HeldWeight, shape: torch.Size, transposed: bool
    ) -> None:
        super().__init__(module)
        self.packed, self.shape, self.transposed = weight, shape, transposed
        _emptied(module, "weight", weight.dtype)
        self.looks_up = type(module).forward is nn.Embedding.forward and module.max_norm is None
        self.multiplies = type(module).forward is nn.Linear.forward

    @property
    def weight(self) -> Tensor:
        """Unpacked, laid out as the module wants it."""
        return laid_out(self.packed.rows(), self.shape, transposed=self.transposed)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if self.looks_up and len(arguments) == 1 and not named:
            index = arguments[0]
            return self.packed.rows(index.reshape(-1)).reshape(*index.shape, self.packed.width)
        held = self.packed
        if (
            self.multiplies
            and len(arguments) == 1
            and not named
            and isinstance(held, PackedWeight)
            and held.int8_kernel
        ):
            x = arguments[0]
            if (
                x.device.type == "cpu"
                and x.numel() <= FEW_ROWS * held.width
                and x.dtype == torch.float32
            ):
                y = torch._weight_int8pack_mm(
                    x.reshape(-1, held.width), held.codes, held.scale[:, 0].to(x.dtype)
                )
                y = y.reshape(*x.shape[:-1], len(held.codes))
                bias = self.module.bias
                return y + bias if isinstance(bias, Tensor) else y
        return torch.func.functional_call(self.module, {"weight": self.weight}, arguments, named)


class PackedExperts(_Around):
    """Stacked experts with one of their parameters packed, or both; while they run, all of them are
    unpacked."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.packed = nn.ModuleDict()
        self.layouts: dict[str, tuple[torch.Size, bool]] = {}

    def pack(self, parameter: str, weight: HeldWeight, shape: torch.Size, transposed: bool) -> None:
        _emptied(self.module, parameter, weight.dtype)
        self.packed[parameter] = weight
        self.layouts[parameter] = shape, transposed

    def forward(self, *arguments: Any, **named: Any) -> Any:
        weights = {
            n: laid_out(cast(HeldWeight, self.packed[n]).rows(), shape, transposed=transposed)
            for n, (shape, transposed) in self.layouts.items()
        }
        return torch.func.functional_call(self.module, weights, arguments, named)


def pack_modules(model: nn.Module, layer: Layer, weight: HeldWeight) -> None:
    """Replace every module that holds or shares the layer's weight."""
    shape, transposed = layer.weight.shape, layer.transposed
    names = (layer.name, *layer.aliases)
    owners = [name.rpartition(".")[0] if layer.kind == "experts" else name for name in names]
    # All are looked up first: two names may lead to one place, where the first would leave what the
    # second finds.
    for owner, module in [(owner, model.get_submodule(owner)) for owner in owners]:
        packed: nn.Module
        if layer.kind == "experts":
            packed = module if isinstance(module, PackedExperts) else PackedExperts(module)
            packed.pack(layer.parameter, weight, shape, transposed)
        else:
            packed = Packed(module, weight, shape, transposed)
        parent, _, leaf = owner.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)


def give_back_memory() -> None:
    """The dense weights that were freed go back to the system: glibc would keep those below 32 MB
    for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)
