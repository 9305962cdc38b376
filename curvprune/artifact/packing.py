"""Codes and masks as bits without gaps, in the order of compressed-tensors' ``pack-quantized``."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int, Int8, UInt8
from torch import Tensor


def pack(codes: Int8[Tensor, "_ _"], bits: int, *, dim: int = 1) -> Int[Tensor, "_ _"]:
    """Signed ``bits``-bit codes → int32 words along ``dim`` (1, or 0 for zero points), without
    gaps."""
    if dim == 0:
        return pack(codes.t().contiguous(), bits).t().contiguous()
    # 1. Unsigned, so that the lowest code has no bit set.
    unsigned = (codes.cpu().numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    # 2. The bits of each code, lowest first, and those of a whole row one after another.
    planes = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(planes.reshape(len(unsigned), -1), axis=-1, bitorder="little")
    # 3. Filled up to whole words of four bytes.
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack(
    words: Int[Tensor, "_ _"], bits: int, length: int, *, dim: int = 1
) -> Int8[Tensor, "_ _"]:
    """The inverse of `pack`; ``length`` is the number of codes along ``dim``."""
    if dim == 0:
        return unpack(words.t().contiguous(), bits, length).t().contiguous()
    raw = np.ascontiguousarray(words.cpu().numpy().astype("<i4")).view(np.uint8)
    stream = np.unpackbits(raw, axis=-1, bitorder="little")[:, : length * bits]
    planes = stream.reshape(len(raw), length, bits)
    unsigned = np.packbits(planes, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy((unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))


def bitmask(kept: Bool[Tensor, "out in"]) -> UInt8[Tensor, " bytes"]:
    """One bit for each entry, rows one after another, lowest bit first."""
    return torch.from_numpy(np.packbits(kept.cpu().numpy().reshape(-1), bitorder="little"))


def bits_of(mask: UInt8[Tensor, " bytes"]) -> Bool[Tensor, " bits"]:
    """The inverse of `bitmask`, in one row, with the bits that fill up the last byte."""
    return torch.from_numpy(np.unpackbits(mask.cpu().numpy(), bitorder="little").astype(bool))
