"""Modules whose weight stays packed in memory: codes of four bits (up to 4 bits) or eight, and 16-bit scales. It is
unpacked when its module runs, layer by layer, to exactly the weight that an unpacked load gives.

Of an embedding only the rows that are looked up are unpacked. Few rows through a per-channel 8-bit Linear on the CPU
use torch's ``_weight_int8pack_mm``: at one row 4 times as fast as unpacking, at 16 rows 18 times slower (1536 × 576,
torch 2.13, AVX-512 without AMX); its 4-bit kernels lost to unpacking and are not used.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from curvprune.layers import Layer, laid_out
from curvprune.options import Quantize
from curvprune.solve.grids import dequantize

FEW_ROWS = 2  # of an input, up to which the int8 kernel beats unpacking


class PackedWeight(nn.Module):
    """A rounded weight ``(out, in)`` as codes and scales; ``dtype`` is that of the weight it stands for."""

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
            unsigned = F.pad(codes + 8, (0, self.width % 2)).to(torch.uint8)
            codes = (unsigned[:, ::2] | (unsigned[:, 1::2] << 4)).view(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.int8_kernel = not self.nibbles and zero is None and scale.shape[1] == 1

    def rows(self, index: Tensor | slice = slice(None)) -> Float[Tensor, "rows in"]:
        """Some rows of the weight, or all, unpacked."""
        codes = self.codes[index]
        if self.nibbles:
            unsigned = codes.view(torch.uint8)
            codes = torch.stack([unsigned & 15, unsigned >> 4], dim=2).flatten(1)[:, : self.width].to(torch.int8) - 8
        zero = None if self.zero is None else self.zero[index]
        return dequantize(codes, self.scale[index], zero, self.group_size).to(self.dtype)


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
    """A module of any kind with its weight packed; attributes other than ``weight`` are the module's own."""

    def __init__(self, module: nn.Module, weight: PackedWeight, shape: torch.Size, transposed: bool) -> None:
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
        if self.multiplies and len(arguments) == 1 and not named and self.packed.int8_kernel:
            x = arguments[0]
            if x.device.type == "cpu" and x.numel() <= FEW_ROWS * self.packed.width and x.dtype == torch.float32:
                flat = x.reshape(-1, self.packed.width)
                y = torch._weight_int8pack_mm(flat, self.packed.codes, self.packed.scale[:, 0].to(x.dtype))
                y = y.reshape(*x.shape[:-1], len(self.packed.codes))
                bias = self.module.bias
                return y + bias if isinstance(bias, Tensor) else y
        return torch.func.functional_call(self.module, {"weight": self.weight}, arguments, named)


class PackedExperts(_Around):
    """Stacked experts with one of their parameters packed, or both; while they run, all of them are unpacked."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.packed = nn.ModuleDict()
        self.layouts: dict[str, tuple[torch.Size, bool]] = {}

    def pack(self, parameter: str, weight: PackedWeight, shape: torch.Size, transposed: bool) -> None:
        _emptied(self.module, parameter, weight.dtype)
        self.packed[parameter] = weight
        self.layouts[parameter] = shape, transposed

    def forward(self, *arguments: Any, **named: Any) -> Any:
        weights = {
            n: laid_out(cast(PackedWeight, self.packed[n]).rows(), shape, transposed=transposed)
            for n, (shape, transposed) in self.layouts.items()
        }
        return torch.func.functional_call(self.module, weights, arguments, named)


def pack_modules(model: nn.Module, layer: Layer, weight: PackedWeight) -> None:
    """Replace every module that holds or shares the layer's weight."""
    shape, transposed = layer.weight.shape, layer.transposed
    names = (layer.name, *layer.aliases)
    owners = [name.rpartition(".")[0] if layer.kind == "experts" else name for name in names]
    # All are looked up first: two names may lead to one place, where the first would leave what the second finds.
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
    """The dense weights that were freed go back to the system: glibc would keep those below 32 MB for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)
