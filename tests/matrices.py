"""Weights and second moments to solve for, and what their solutions cost."""

from __future__ import annotations

import torch
from torch import Tensor

from curvprune.compression import Solved, code_range
from curvprune.options import Prune, PruneQuantize, Quantize, quantizer_of

DAMPING = 0.01


def weight(out: int, width: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=g, dtype=torch.float64) * 0.05
    W *= torch.where(torch.rand(out, width, generator=g) < 0.05, 4.0, 1.0)
    return W.to(dtype)


def second_moment(width: int, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low = max(1, width // 3)
    X = torch.randn(4 * width, low, generator=g, dtype=torch.float64) @ torch.randn(
        low, width, generator=g, dtype=torch.float64
    )
    X += 0.3 * torch.randn(4 * width, width, generator=g, dtype=torch.float64)
    X *= torch.exp(0.7 * torch.randn(width, generator=g, dtype=torch.float64))
    return (X.T @ X / len(X)).to(dtype)


def damped(A: Tensor) -> Tensor:
    return A + DAMPING * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)


def output_error(W_hat: Tensor, W: Tensor, H: Tensor) -> float:
    d = W_hat.double() - W.double()
    return float(((d @ H.double()) * d).sum())


def points(s: Solved, column: int) -> Tensor:
    """All values that each row's grid has at a column: ``(out, 2^bits)``."""
    assert s.scale is not None
    q = quantizer_of(s.option)
    assert q is not None
    group = column // (q.group_size or s.weight.shape[1])
    low, high = code_range(q.bits)
    k = torch.arange(low, high + 1, dtype=torch.float64)
    zero = 0 if s.zero is None else s.zero[:, group, None].double()
    return (k - zero) * s.scale[:, group, None].double()


def nearest(s: Solved, column: int, values: Tensor) -> Tensor:
    p = points(s, column)
    return p.gather(1, (p - values[:, None]).abs().argmin(dim=1, keepdim=True))[:, 0]


QUANTIZERS: list[Quantize] = [
    Quantize(bits=2, group_size=5, symmetric=False),
    Quantize(bits=3, group_size=10),
    Quantize(bits=4, symmetric=False),
    Quantize(bits=8),
]
UNEVEN: list[Quantize] = [
    # no zero on the grid, or a shorter last group
    Quantize(bits=1),
    Quantize(bits=1, group_size=6, symmetric=False),
    Quantize(bits=1, group_size=9),
    Quantize(bits=3, group_size=6, symmetric=False),
    Quantize(bits=4, group_size=64),
    Quantize(bits=7, group_size=7),
]
PRUNERS: list[Prune | PruneQuantize] = [
    Prune(sparsity=0.5),
    Prune(sparsity=0.3),
    Prune(pattern="2:4"),
    Prune(pattern="3:5"),
    PruneQuantize(
        prune=Prune(sparsity=0.6), quantize=Quantize(bits=3, group_size=10, symmetric=False)
    ),
    PruneQuantize(prune=Prune(pattern="2:4"), quantize=Quantize(bits=4)),
]
