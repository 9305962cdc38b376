"""Random vectors, drawn on the CPU from the caller's generator: the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from curvprune.curvature.operators import Operator

LARGEST = 2**26  # numbers of the vectors that go through an operator at once


def check_generator(generator: torch.Generator) -> None:
    """Raises ``ValueError`` unless the generator is on the CPU."""
    if generator.device.type != "cpu":
        raise ValueError(
            f"pass a CPU generator (got one on {generator.device}): its draws are the same on "
            "every device"
        )


def signs(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Rademacher vectors as int8 ``(n, count)`` on the CPU, eight signs a byte.

    They are drawn one after the other, so that it does not matter how many go through the operator
    at once.
    """
    n = op.space.dim
    result = torch.empty(n, count, dtype=torch.int8)
    shifts = torch.arange(8, dtype=torch.uint8)
    for column in range(count):
        drawn = torch.randint(0, 256, (-(-n // 8),), dtype=torch.uint8, generator=generator)
        bits = (drawn.unsqueeze(1) >> shifts) & 1
        result[:, column] = bits.view(torch.int8).reshape(-1)[:n] * 2 - 1
    return result


def gaussian(op: Operator, count: int, generator: torch.Generator) -> Tensor:
    """Standard normal vectors ``(n, count)``, drawn one after the other.

    The draw is in float32 whatever the operator's dtype, so that all dtypes see the same vectors.
    """
    n = op.space.dim
    if count == 0:
        return torch.zeros(n, 0, device=op.device, dtype=op.dtype)
    columns = [torch.randn(n, dtype=torch.float32, generator=generator) for _ in range(count)]
    return torch.stack(columns, 1).to(device=op.device, dtype=op.dtype)


def moved(op: Operator, v: Tensor) -> Tensor:
    """``v`` with the operator's dtype, on its device."""
    return v.to(device=op.device, dtype=op.dtype)


def widths(op: Operator, count: int) -> list[int]:
    """How many of ``count`` vectors go through the operator at once, so that memory holds them."""
    size = max(1, min(count, LARGEST // op.space.dim))
    return [min(size, count - start) for start in range(0, count, size)]
