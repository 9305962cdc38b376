"""The inputs of a convolution as rows that multiply its matrix, in one, two or three dimensions.

A transposed convolution is an ordinary one of stride one over an input with zeros in between: its
matrix is ``W[out, in · kernel]`` as well, and every patch is seen from its end (Dumoulin & Visin
2016, "A guide to convolution arithmetic for deep learning", §4).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def patches(conv: nn.Module, x: Tensor) -> Float[Tensor, "groups n in"]:
    """What the kernel sees at each place of the output, items one after another.

    Args:
        conv: a convolution, transposed or not.
        x: its input, ``(items, channels, ...)``, or ``(channels, ...)`` of one item.
    """
    assert isinstance(conv, (Convolution, Transposed))
    kernel, dilation = conv.kernel_size, conv.dilation
    if x.ndim == len(kernel) + 1:
        x = x.unsqueeze(0)
    # 1. Pads, and steps from one place to the next.
    stride: Sequence[int]
    if isinstance(conv, Transposed):
        padded, stride = _spread_out(conv, x), [1] * len(kernel)
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded, stride = F.pad(x, _in_order(_padding(conv)), mode=mode), conv.stride
    # 2. Patches as views: (items, channels, *places, *kernel).
    dims = range(len(kernel))
    for dim, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True), start=2):
        padded = padded.unfold(dim, d * (k - 1) + 1, s)
    inside: Any = (..., *[slice(None, None, d) for d in dilation])
    seen = padded[inside]
    if isinstance(conv, Transposed):
        seen = seen.flip([seen.ndim - 1 - dim for dim in dims])
    # 3. Channels of a group stand together: (groups, items, *places, channels, *kernel).
    grouped = seen.unflatten(1, (conv.groups, -1)).movedim(1, 0).movedim(2, 2 + len(kernel))
    width = x.shape[1] // conv.groups
    for k in kernel:
        width *= k
    return grouped.reshape(conv.groups, -1, width)


def _spread_out(conv: Transposed, x: Tensor) -> Tensor:
    """The input with ``stride − 1`` zeros between neighbours, and pads so that a kernel sees one
    patch for each place of the output."""
    shape = list(x.shape[:2])
    for size, s in zip(x.shape[2:], conv.stride, strict=True):
        shape.append((size - 1) * s + 1)
    spread = x.new_zeros(shape)
    places: Any = (..., *[slice(None, None, s) for s in conv.stride])
    spread[places] = x
    sides = []
    geometry = zip(conv.kernel_size, conv.dilation, conv.padding, conv.output_padding, strict=True)
    for k, d, p, more in geometry:
        assert isinstance(p, int)
        reach = d * (k - 1) - p  # negative: the border of the output is cut off
        sides.append((reach, reach + more))
    return F.pad(spread, _in_order(sides))


def _padding(conv: Convolution) -> list[tuple[int, int]]:
    """Pads before and after, for each dimension."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        # An odd pad has its larger half at the end, as torch has it.
        return [(t // 2, t - t // 2) for t in total]
    assert not isinstance(conv.padding, str)
    return [(p, p) for p in conv.padding]


def _in_order(sides: Sequence[tuple[int, int]]) -> list[int]:
    """Pads in the order of `torch.nn.functional.pad`: last dimension first."""
    return list(chain.from_iterable(reversed(sides)))
