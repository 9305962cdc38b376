"""The types of ggml that hold our grids bit for bit: which one an option becomes, its bytes, and
its blocks.

A row of a matrix is cut into blocks of 32 weights. Of a block are stored a float16 ``d``, in some
types a float16 ``m``, and a code ``q`` for every weight:

| type | a weight is | codes | bytes a block | bits a weight |
|---|---|---|---|---|
| Q4_0 | ``d (q - 8)`` | 0 to 15 | 18 | 4.5 |
| Q5_0 | ``d (q - 16)`` | 0 to 31 | 22 | 5.5 |
| Q8_0 | ``d q`` | -128 to 127 | 34 | 8.5 |
| Q4_1 | ``d q + m`` | 0 to 15 | 20 | 5 |
| Q5_1 | ``d q + m`` | 0 to 31 | 24 | 6 |

Q4_0 and Q4_1 keep the code of weight ``i`` in the low half of byte ``i`` and that of weight ``i +
16`` in its high half. Q5_0 and Q5_1 do so with the lower four bits; the fifth bits stand before
them in one 32-bit word. The order within a block is: d, m, fifth bits, codes.

Source: ``ggml-common.h`` and ``gguf-py/gguf/quants.py`` of ggml-org/llama.cpp; gguf 0.19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curvprune.artifact import Stored
from curvprune.compression import spread
from curvprune.options import Cast, Option, Quantize, quantizer_of, stored_dtype

BLOCK = 32  # weights that share a scale
ALIGNMENT = 32  # bytes: every tensor of a file starts at a multiple

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """A type of ggml whose blocks hold codes; ``low`` to ``high`` times ``d`` are its values,
    counted from ``m`` where it has one."""

    low: int
    high: int
    block_bytes: int
    minimum: bool = False


BLOCK_TYPES = {
    "Q4_0": BlockType(low=-8, high=7, block_bytes=18),
    "Q5_0": BlockType(low=-16, high=15, block_bytes=22),
    "Q8_0": BlockType(low=-128, high=127, block_bytes=34),
    "Q4_1": BlockType(low=0, high=15, block_bytes=20, minimum=True),
    "Q5_1": BlockType(low=0, high=31, block_bytes=24, minimum=True),
}
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# The number that a file has for a type, and the one that stands for a file of mostly such a type.
TYPE_NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "BF16": 30,
}
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
}
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufForm:
    """What an option becomes in a GGUF file.

    Attributes:
        type: ggml's name of it; ``None`` where none holds the option exactly.
        why_not: then why not, in words.
        nearest: then the nearest option that a type holds.
    """

    type: str | None
    why_not: str = ""
    nearest: Option | None = None


def gguf_type(option: Option, shape: tuple[int, int], *, dtype: str = "float32") -> GgufForm:
    """The type of ggml that holds an option of a matrix exactly, whatever its weights are.

    Codes may need a wider type than their bits: with zero points ``z`` a weight is a scale times
    ``code - z``, which has one bit more. Pruned weights are stored as zeros.

    Args:
        shape: ``(out, in)``.
        dtype: of the layer's weights.
    """
    quantize = quantizer_of(option)
    if quantize is None:
        return GgufForm(type=_FLOATS[stored_dtype(option, dtype)])
    # 1. Whole blocks, each in one group.
    width, size = shape[1], quantize.group_size
    if width % BLOCK:
        return GgufForm(
            type=None,
            why_not=f"its rows are {width} wide, and a block of ggml holds {BLOCK} weights",
            nearest=Cast(dtype="float16"),
        )
    if size is not None and size < width and size % BLOCK:
        near = max(BLOCK, round(size / BLOCK) * BLOCK)
        return GgufForm(
            type=None,
            why_not=f"a block of ggml shares a scale among {BLOCK} weights, not {size}",
            nearest=replace(quantize, group_size=near),
        )
    # 2. The narrowest type that has all codes.
    name = _narrowest(quantize)
    if name is not None:
        return GgufForm(type=name)
    kind = "a free zero point" if quantize.bits == 1 else "zero points"
    return GgufForm(
        type=None,
        why_not=f"no type of ggml has all values of {quantize.bits} bits with {kind}",
        nearest=replace(quantize, symmetric=True),
    )


def _narrowest(quantize: Quantize) -> str | None:
    """The narrowest type that has all values of a grid, by its codes alone."""
    bits = quantize.bits
    if quantize.symmetric:
        least = 1 if bits == 1 else 1 << (bits - 1)
    elif bits == 1:
        return None  # two values that nothing ties to a multiple of a float16
    else:
        least = (1 << bits) - 1
    for name in ("Q4_0", "Q5_0", "Q8_0"):
        kind = BLOCK_TYPES[name]
        # Symmetric grids have one value more below zero; with zero points either side may be full.
        if -kind.low >= least and (quantize.symmetric or kind.high >= least):
            return name
    return None


def gguf_layer_bytes(option: Option, shape: tuple[int, int], *, dtype: str = "float32") -> int:
    """Bytes that a matrix takes in a GGUF file, up to the start of the next tensor.

    Raises ``ValueError`` with the nearest option where no type holds the option.
    """
    form = gguf_type(option, shape, dtype=dtype)
    if form.type is None:
        assert form.nearest is not None
        raise ValueError(f"option {option.key}: {form.why_not}; nearest: {form.nearest.key}")
    return padded(type_bytes(form.type, shape))


def type_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of one of the types."""
    count = math.prod(shape)
    if name in FLOAT_BYTES:
        return count * FLOAT_BYTES[name]
    return count // BLOCK * BLOCK_TYPES[name].block_bytes


def padded(count: int) -> int:
    """The next multiple of the files' alignment."""
    return -(-count // ALIGNMENT) * ALIGNMENT


# ------------------------------------------------------------------------------------------ blocks


def float_rows(tensor: Tensor, name: str) -> Bytes:
    """The bytes of a tensor of floats, its last axis as bytes."""
    if name == "BF16":
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    else:
        raw = tensor.to(torch.float32 if name == "F32" else torch.float16).contiguous().numpy()
    return np.ascontiguousarray(raw).view(np.uint8)


def block_rows(stored: Stored, name: str) -> Bytes | None:
    """The bytes of a rounded matrix ``(out, bytes of a row)``; ``None`` where the type does not
    hold its very values, as of scales below what a float16 can say.

    Args:
        name: one of ``BLOCK_TYPES``.
    """
    kind = BLOCK_TYPES[name]
    parts = _codes_and_scales(stored)
    if parts is None:
        return None
    codes, scale = parts
    # 1. What a block has in common, in float16.
    width, blocks = codes.shape[1], codes.shape[1] // BLOCK
    size = None if stored.quantize is None else stored.quantize.group_size
    each = spread(scale, width, size, dim=1).expand(len(codes), width)[:, ::BLOCK]
    half = each.to(torch.float16)
    if not torch.equal(half.to(torch.float32), each.to(torch.float32)):
        return None
    # 2. Codes in the type's own range.
    if int(codes.min()) < kind.low or int(codes.max()) > kind.high:
        return None
    q = codes.numpy().reshape(len(codes), blocks, BLOCK)
    pieces = [_as_bytes(half.numpy())]
    if name == "Q8_0":
        pieces.append(q.astype(np.int8).view(np.uint8))
    else:
        pieces += _nibbles((q - kind.low).astype(np.uint8), fifth=kind.high - kind.low > 15)
    # 3. Block after block.
    joined: Bytes = np.concatenate(pieces, axis=-1)
    return joined.reshape(len(codes), -1)


def _codes_and_scales(stored: Stored) -> tuple[Tensor, Tensor] | None:
    """Whole numbers whose products with the scales are the weights; int16, as zero points may
    double their range."""
    quantize, scale, zero = stored.quantize, stored.scale, stored.zero
    assert quantize is not None and scale is not None
    codes = stored.matrix.to(torch.int16)
    if quantize.bits == 1:
        # -s/2 and s/2: the odd numbers -1 and 1 times half the scale.
        return (2 * codes + 1, scale.to(torch.float32) / 2) if quantize.symmetric else None
    if zero is not None:
        codes -= spread(zero, codes.shape[1], quantize.group_size, dim=1)
    return codes, scale


def _as_bytes(half: npt.NDArray[np.float16]) -> Bytes:
    """``(out, blocks)`` numbers as ``(out, blocks, 2)`` bytes."""
    return np.ascontiguousarray(half)[..., None].view(np.uint8)


def _nibbles(q: Bytes, *, fifth: bool) -> list[Bytes]:
    """Codes ``(out, blocks, 32)`` as the fifth bits, where the type has them, and 16 bytes."""
    half = BLOCK // 2
    first, second = q[..., :half] & np.uint8(15), q[..., half:] & np.uint8(15)
    low: Bytes = first | (second << np.uint8(4))
    if not fifth:
        return [low]
    return [np.packbits(q >> np.uint8(4), axis=-1, bitorder="little"), low]


def recovered(weight: Tensor, quantize: Quantize) -> Stored | None:
    """The codes and scales of a matrix of floats that was rounded and stored dense, where they say
    exactly what the floats are; else ``None``.

    A group's largest weight is ``k`` scales for some ``k`` up to 128. Every ``k`` is tried until
    the scale is a float16 and all weights of the group are whole multiples of it. Cost: a few
    passes over the weights, as most groups are settled by the first tries.
    """
    out, width = weight.shape
    if not quantize.symmetric or quantize.bits == 1 or width % BLOCK:
        return None
    # Blocks, not groups: each may have a scale of its own in the file.
    w = weight.detach().to(torch.float32).reshape(-1, BLOCK)
    if not torch.equal(w.to(weight.dtype).reshape(weight.shape), weight):
        return None
    low, high = -(1 << (quantize.bits - 1)), (1 << (quantize.bits - 1)) - 1
    codes = torch.zeros(w.shape, dtype=torch.int8)
    scale = torch.ones(len(w), dtype=torch.float16)
    top = w.abs().amax(dim=1)
    left = (top > 0).nonzero()[:, 0]
    for k in range(-low, 0, -1):
        if not len(left):
            break
        # 1. A scale that is a float16 exactly.
        d = top[left] / k
        half = d.to(torch.float16)
        maybe = (half.to(torch.float32) * k == top[left]) & (half > 0)
        rows = left[maybe]
        # 2. Of which all weights are multiples.
        each = half[maybe].to(torch.float32)[:, None]
        q = (w[rows] / each).round_()
        fits = ((q * each == w[rows]) & (q >= low) & (q <= high)).all(dim=1)
        found = rows[fits]
        codes[found] = q[fits].to(torch.int8)
        scale[found] = half[maybe][fits]
        settled = torch.zeros(len(w), dtype=torch.bool)
        settled[found] = True
        left = left[~settled[left]]
    if len(left):
        return None
    grid = replace(quantize, group_size=BLOCK)
    return Stored(
        matrix=codes.reshape(out, width), quantize=grid, scale=scale.reshape(out, width // BLOCK)
    )
