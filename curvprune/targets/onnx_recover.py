"""The codes of a rounded weight that an artifact holds as floats, where they can be found again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.artifact import Stored
from curvprune.options import Quantize


def recovered(weight: Float[Tensor, "out in"], quantize: Quantize) -> Stored | None:
    """Codes, scales and zero points that give ``weight`` to the last bit; ``None`` where not every
    group has them, such as after a cast to 16 bits, and for one bit.

    The largest weight of a group is ``k`` times its scale, for a whole ``k``: all are tried, from
    the largest down. Other codes than the first ones may be found; the values are the same. Cost:
    as many passes over the groups that are left as a grid has values, mostly few.
    """
    out, width = weight.shape
    size = quantize.group_size or width
    if quantize.bits == 1 or width % size:
        return None
    groups = weight.to(torch.float32).reshape(-1, size)
    most = (1 << quantize.bits) - 1 if not quantize.symmetric else 1 << (quantize.bits - 1)
    multiples = torch.zeros(groups.shape, dtype=torch.int16)
    scale = torch.ones(len(groups), dtype=torch.float16)
    top = groups.abs().amax(dim=1)
    left = (top > 0).nonzero()[:, 0]
    for k in range(most, 0, -1):
        if not len(left):
            break
        # 1. A scale that is a float16 exactly.
        half = (top[left] / k).to(torch.float16)
        maybe = (half.float() * k == top[left]) & (half > 0)
        rows, half = left[maybe], half[maybe]
        # 2. Of which all weights are multiples, within the width of a code.
        whole = (groups[rows] / half.float()[:, None]).round()
        fits = (whole * half.float()[:, None] == groups[rows]).all(dim=1)
        fits &= _within(whole, quantize)
        multiples[rows[fits]] = whole[fits].to(torch.int16)
        scale[rows[fits]] = half[fits]
        settled = torch.zeros(len(groups), dtype=torch.bool)
        settled[rows[fits]] = True
        left = left[~settled[left]]
    if len(left):
        return None
    # 3. Zero points that bring the multiples among the codes.
    zero, low = None, -(1 << (quantize.bits - 1))
    if not quantize.symmetric:
        lowest = multiples.amin(dim=1).clamp(max=0)
        zero = (low - lowest).to(torch.int8).reshape(out, -1)
        multiples += (low - lowest)[:, None]
    return Stored(
        matrix=multiples.to(torch.int8).reshape(out, width),
        quantize=quantize,
        scale=scale.reshape(out, -1),
        zero=zero,
    )


def _within(whole: Tensor, quantize: Quantize) -> Tensor:
    """Groups whose multiples of their scale a grid has: around zero, or as far apart as its
    codes, zero among them."""
    half = 1 << (quantize.bits - 1)
    lowest, highest = whole.amin(dim=1), whole.amax(dim=1)
    if quantize.symmetric:
        return (lowest >= -half) & (highest < half)
    return highest.clamp(min=0) - lowest.clamp(max=0) < 2 * half
