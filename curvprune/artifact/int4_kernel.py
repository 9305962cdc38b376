"""A rounded weight of up to four bits in the order of torch's 4-bit kernel for processors.

The kernel multiplies bfloat16 rows by ``code · scale + zero`` with scale and zero in bfloat16. Our
weights are ``(code − zero) · scale``: the product ``zero · scale`` has up to 12 bits and bfloat16
keeps 8. What is left of it is a second bfloat16, which meets the sums of the rows over each group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from curvprune.compat import INT4_GROUPS, INT4_ROWS, int4_linear, int4_packed

# At 16 rows as fast as dense, at 64 at .6 of it: unpacking takes longer than that up to here.
MOST_ROWS = 64
_BLOCKS = (64, 32, 16)  # rows, with AVX-512, with AVX2, and in the plain form


class HeldModule(nn.Module):
    """A weight that is not held in the type it stands for, ``dtype``: a cast of the model changes
    what it is unpacked to, and rounds nothing that it is made of."""

    dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldModule:
        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(moved, recurse)
        return self


class Int4Weight(HeldModule):
    """A weight ``(out, in)`` as the kernel reads it: half a byte a weight, and four to six bytes a
    group; ``dtype`` is that of the weight it stands for."""

    packed: Tensor
    scale_and_zero: Tensor
    left: Tensor | None

    def __init__(
        self, packed: Tensor, scale: Tensor, zero: Tensor, *, block: int, shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.shape, self.block, self.dtype = shape, block, torch.bfloat16
        self.group = shape[1] // scale.shape[1]
        high = zero.bfloat16()
        left = (zero - high.float()).bfloat16()
        pair = torch.stack([scale.bfloat16(), high], dim=2).transpose(0, 1).contiguous()
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", pair)
        self.register_buffer("left", left.t().contiguous() if bool(left.any()) else None)

    @property
    def width(self) -> int:
        """Inputs."""
        return self.shape[1]

    def rows(self, index: Tensor | slice = slice(None)) -> Float[Tensor, "rows in"]:
        """Some rows of the weight, or all, unpacked: exactly what the kernel multiplies by."""
        codes = _unpacked(self.packed, self.shape, self.block)[index].float()
        scale, zero = self.scale_and_zero.float().permute(2, 1, 0)
        if self.left is not None:
            zero = zero + self.left.float().t()
        grouped = codes.unflatten(1, (-1, self.group))
        weight = grouped * scale[index][..., None] + zero[index][..., None]
        return weight.flatten(1).bfloat16().to(self.dtype)

    def runs(self, x: Tensor) -> bool:
        """Whether the kernel multiplies ``x``, and faster than unpacking does."""
        if x.dtype != torch.bfloat16 or self.dtype != torch.bfloat16:
            return False
        here = x.device.type == "cpu" and self.packed.device.type == "cpu"
        learns = x.requires_grad and torch.is_grad_enabled()
        return here and not learns and 0 < x.numel() <= MOST_ROWS * self.width

    def multiplied(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """``x Wᵀ`` from the codes themselves."""
        y = int4_linear(x.contiguous(), self.packed, self.group, self.scale_and_zero)
        if self.left is None:
            return y
        return torch.addmm(y, x.reshape(len(x), -1, self.group).sum(dim=2), self.left)


def int4_weight(
    codes: Int8[Tensor, "out in"], scale: Tensor, zero: Tensor | None, *, rounds: bool = False
) -> Int4Weight | None:
    """The weight ``(codes − zero) · scale`` for the kernel; ``None`` where the kernel cannot hold
    it exactly.

    Args:
        codes: from −8 to 7.
        scale: ``(out, groups)``.
        zero: ``(out, groups)``, if any.
        rounds: take scales that bfloat16 does not hold at their nearest there.
    """
    # 1. Shapes that it takes: our groups in whole ones of its own.
    outputs, width = codes.shape
    groups = scale.shape[1]
    if codes.device.type != "cpu" or outputs % INT4_ROWS or width % groups:
        return None
    fitting = [size for size in INT4_GROUPS if (width // groups) % size == 0]
    if not fitting:
        return None
    # 2. Numbers that it holds.
    exact = scale.float()
    near = exact.bfloat16().float()
    if not rounds and not torch.equal(near, exact):
        return None
    offset = torch.zeros_like(near) if zero is None else -zero.float() * near
    high = offset.bfloat16().float()
    if not torch.equal(high + (offset - high).bfloat16().float(), offset):
        return None
    # 3. An order that we can undo, on this processor and with this torch.
    packed = int4_packed(codes)
    block = next((b for b in _BLOCKS if _undoes(packed, codes, b)), None)
    if block is None:
        return None
    times = width // groups // fitting[0]
    near, offset = (part.repeat_interleave(times, dim=1) for part in (near, offset))
    return Int4Weight(packed, near, offset, block=block, shape=(outputs, width))


def _undoes(packed: Tensor, codes: Tensor, block: int) -> bool:
    return torch.equal(_unpacked(packed, (codes.shape[0], codes.shape[1]), block), codes)


def _unpacked(packed: Tensor, shape: tuple[int, int], block: int) -> Int8[Tensor, "out in"]:
    """The codes again: whole blocks of rows, and what is left of them as a smaller one."""
    outputs, width = shape
    whole = outputs - outputs % block
    flat, parts = packed.reshape(-1), []
    for start, stop, size in ((0, whole, block), (whole, outputs, outputs - whole)):
        if stop == start:
            continue
        held = flat[start * width // 2 : stop * width // 2].view(-1, width, size // 2)
        both = torch.cat([held & 15, held >> 4], dim=2)
        order = _order(size).to(packed.device)
        parts.append(both.index_select(2, order).transpose(1, 2).reshape(stop - start, width))
    return torch.cat(parts).to(torch.int8) - 8


@cache
def _order(size: int) -> Tensor:
    """Where each row of a block stands among its low halves, then its high ones: found by packing
    the rows' own numbers, four bits at a time."""
    rows = torch.arange(size)
    found = torch.zeros(size, dtype=torch.long)
    for shift in (0, 4):
        digits = ((rows >> shift) & 15).to(torch.int8) - 8
        held = int4_packed(digits[:, None].expand(-1, 32)).reshape(32, -1)[0]
        found += torch.cat([held & 15, held >> 4]).long() << shift
    return found.argsort()
