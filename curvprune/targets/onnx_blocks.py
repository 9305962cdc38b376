"""How ONNX Runtime holds a rounded weight: codes in blocks of inputs, as its operators
``MatMulNBits`` and ``GatherBlockQuantized`` read them.

A weight is ``W[out, in] = (code − zero) · scale``. Codes are unsigned, of 2, 4 or 8 bits, packed
along the inputs with the first in the lowest bits. A block is a power of two of inputs, at least
16; the last one is filled up. Without zero points, zero is the middle of the codes.

A grid of another width is held by the next one that has its codes. A group that is a multiple of a
block has its scale once for each of them. Both are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from curvprune.artifact import Stored
from curvprune.options import Quantize

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
SCALE_BYTES = 2  # float16, cast where they are read: a session does that once

Bytes = np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A grid in blocks.

    Attributes:
        bits: of a code, 2, 4 or 8.
        size: inputs of a block.
        shape: ``(out, in)`` of the weight.
        zeros: there are zero points.
    """

    bits: int
    size: int
    shape: tuple[int, int]
    zeros: bool

    @property
    def count(self) -> int:
        """Blocks of an output, the last one filled up."""
        return math.ceil(self.shape[1] / self.size)

    @property
    def nbytes(self) -> int:
        """Codes, scales and zero points of the layer in the file."""
        out = self.shape[0]
        codes = out * self.count * self.size * self.bits // 8
        zeros = out * math.ceil(self.count * self.bits / 8) if self.zeros else 0
        return codes + out * self.count * SCALE_BYTES + zeros


def blocks_for(quantize: Quantize, shape: tuple[int, int]) -> Blocks | None:
    """The smallest form that holds every value of a grid exactly; ``None`` where there is none:
    groups without a power of two of at least 16, and two values that are any."""
    if quantize.bits == 1 and not quantize.symmetric:
        return None
    bits = next(one for one in BITS if one >= quantize.bits)
    group = quantize.group_size
    found = []
    for size in BLOCKS:
        if group is None or group % size == 0 or group >= shape[1]:
            zeros = not quantize.symmetric
            found.append(Blocks(bits=bits, size=size, shape=shape, zeros=zeros))
    # Of two that take the same, the one with fewer blocks.
    return min(found, key=lambda one: (one.nbytes, -one.size), default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTensors:
    """What the operators read: ``codes (out, blocks, bytes)``, ``scale (out, blocks)`` in float16,
    ``zero (out, bytes)``."""

    form: Blocks
    codes: Bytes
    scale: Bytes
    zero: Bytes | None


def block_tensors(stored: Stored) -> BlockTensors | None:
    """A packed layer in blocks, every value as it was; ``None`` where `blocks_for` has none."""
    quantize = stored.quantize
    if quantize is None or stored.scale is None:
        return None
    out, width = stored.matrix.shape
    form = blocks_for(quantize, (out, width))
    if form is None:
        return None
    # 1. Unsigned codes around the middle of the wider grid; what was left out is zero.
    codes, scale = stored.matrix.to(torch.int16), stored.scale
    if stored.kept is not None:
        pruned = _at_inputs(stored.zero, width, quantize) if stored.zero is not None else 0
        codes = torch.where(stored.kept, codes, pruned)
    if quantize.bits == 1:
        codes, scale = 2 * codes + 1, scale / 2  # −s and s are −1 and 1 times s, of four values
        if not torch.equal(scale * 2, stored.scale):
            return None
    middle = 1 << (form.bits - 1)
    whole = torch.full((out, form.count * form.size), middle, dtype=torch.int16)
    whole[:, :width] = codes + middle
    # 2. A scale and a zero point for every block, those of its group.
    starts = torch.arange(form.count) * form.size
    groups = torch.zeros_like(starts)
    if quantize.group_size is not None:
        groups = starts // quantize.group_size
    zero = None
    if form.zeros:
        assert stored.zero is not None
        zero = _packed(stored.zero.to(torch.int16)[:, groups] + middle, form.bits)
    return BlockTensors(
        form=form,
        codes=_packed(whole, form.bits).reshape(out, form.count, -1),
        scale=scale[:, groups].to(torch.float16).contiguous().numpy(),
        zero=zero,
    )


def _at_inputs(groups: Tensor, width: int, quantize: Quantize) -> Tensor:
    """The value of a group at each of its inputs."""
    size = quantize.group_size or width
    return groups.to(torch.int16)[:, torch.arange(width) // size]


def _packed(values: Tensor, bits: int) -> UInt8[Bytes, "out bytes"]:
    """Unsigned values along the rows, the first in the lowest bits; the last byte is filled up."""
    each = 8 // bits
    bytes_ = values.numpy().astype(np.uint8)
    bytes_ = np.pad(bytes_, ((0, 0), (0, -bytes_.shape[1] % each)))
    parts = bytes_.reshape(len(bytes_), -1, each)
    packed = np.zeros(parts.shape[:2], dtype=np.uint8)
    for place in range(each):
        packed |= parts[..., place] << (bits * place)
    return packed
