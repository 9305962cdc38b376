"""Second moments of a layer's inputs, ``A = E[x xᵀ]``, and how far the inputs have drifted.

Sums run over chunks of rows, so that inputs are never unfolded or widened as a whole. Where the CPU
multiplies 8-bit numbers, Gram matrices are sums of products of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvprune.compat import int8_product, multiplies_bytes_fast
from curvprune.model import Layer

_PANEL = 192  # columns of a Gram matrix computed at a time
_NARROW = 256  # inputs from which products in 8 bits pay
# Input rows per update of a Gram matrix: bounds the memory of unfolded convolutions and upcasts.
_ROWS = 4096
# Of a convolution's places, neighbours say much the same. Where their products are many, so many
# for each input are summed; `benchmarks/positions.py` tried others.
_PLACES, _PRODUCTS = 8, 5e10
# Tokens of the average expert, for each input, that count beside an expert's own;
# `benchmarks/experts.py` tried others.
_BORROWED = 0.5


@dataclass(frozen=True, slots=True)
class Moments:
    """What a layer's inputs are on average.

    Attributes:
        second: ``E[x xᵀ]``.
        drift: ``E[(x̃ − x) xᵀ]`` against the uncompressed model's inputs ``x̃``; ``None`` if equal
            or unknown.
        mean: ``E[x]``.
        moved: ``E[x̃ − x]``, where there is a drift.
        notes: what the report must say about them.
        count: inputs that they are means over, where that was counted.
    """

    second: Float[Tensor, "groups in in"]
    drift: Float[Tensor, "groups in in"] | None = None
    mean: Float[Tensor, "groups in"] | None = None
    moved: Float[Tensor, "groups in"] | None = None
    notes: tuple[str, ...] = ()
    count: int = 0

    @property
    def dead(self) -> int:
        """How many groups have inputs that are all zero."""
        return int((~self.second.diagonal(dim1=1, dim2=2).any(dim=1)).sum())

    @staticmethod
    def over(parts: Sequence[Moments]) -> Moments:
        """The moments of all inputs of several calls, without a drift."""
        if len(parts) == 1:
            return parts[0]
        total = max(1, sum(part.count for part in parts))
        second, mean = torch.zeros_like(parts[0].second), None
        for part in parts:
            second.add_(part.second, alpha=part.count / total)
            if part.mean is not None:
                mean = torch.zeros_like(part.mean) if mean is None else mean
                mean.add_(part.mean, alpha=part.count / total)
        return Moments(second, mean=mean, count=total)


def moments_of(
    layer: Layer, module: nn.Module, x: Tensor, original: Tensor | None, mask: Tensor | None
) -> Moments:
    """The moments of all inputs ``x`` of a layer.

    Args:
        module: the module that reads ``x``.
        original: what it reads in the uncompressed model, for the drift. Ignored where its shape is
            another one.
        mask: ``(items, tokens)``, where padding is zero.
    """
    # 1. Padding does not count.
    if original is not None and original.shape != x.shape:
        original = None
    if not layer.convolves and mask is not None and x.ndim > 2 and x.shape[:2] == mask.shape:
        tokens = mask.bool()
        if not bool(tokens.all()):
            x = x[tokens]
            original = None if original is None else original[tokens]

    # 2. Sum over chunks of rows.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    second = torch.zeros(layer.groups, layer.shape[1], layer.shape[1], dtype=wide, device=x.device)
    mean = torch.zeros(layer.groups, layer.shape[1], dtype=wide, device=x.device)
    drift = None if original is None else torch.zeros_like(second)
    moved_mean = torch.zeros_like(mean)
    count, places = 0, 0
    notes: tuple[str, ...] = ()
    chunks = _chunks(layer, x)
    sample = _Sample.of(layer, module, x)
    originals = [None] * len(chunks) if original is None else _chunks(layer, original)
    for chunk, before in zip(chunks, originals, strict=True):
        rows = layer.rows(module, chunk)
        places += rows.shape[1]
        chosen = slice(None) if sample is None else sample.places(rows.shape[1], x.device)
        rows = rows[:, chosen].to(wide)
        narrow = _narrowed(rows)
        _add_gram(second, rows, narrow)
        # The mean of what was multiplied: with the exact one, a constant among the inputs would
        # make the second moment indefinite.
        mean += rows.sum(1) if narrow is None else narrow.total()
        count += rows.shape[1]
        if drift is not None and before is not None:
            moved = layer.rows(module, before)[:, chosen].to(wide) - rows
            _add_drift(drift, moved, rows, narrow)
            moved_mean += moved.sum(1)
    _mirror(second)

    if sample is not None:
        notes = (
            f"layer {layer.name}: the moments of its {layer.shape[1]} inputs are those of {count} "
            f"of {places} places, evenly spread",
        )

    # 3. Means. No drift at all is told apart: nothing has to be moved.
    number, count = count, max(1, count)
    if drift is None or not bool(drift.any()):
        return Moments(second / count, mean=mean / count, count=number, notes=notes)
    moved_mean /= count
    return Moments(
        second / count,
        drift / count,
        mean=mean / count,
        moved=moved_mean,
        count=number,
        notes=notes,
    )


class _Sample:
    """Places of a convolution, one at random of every ``stride`` that follow one another."""

    def __init__(self, stride: float) -> None:
        self.stride = stride
        self.generator = torch.Generator().manual_seed(0)

    @classmethod
    def of(cls, layer: Layer, module: nn.Module, x: Tensor) -> _Sample | None:
        """A sample where the products are many and places many times the inputs, else ``None``."""
        if not layer.convolves or not len(x):
            return None
        places, width = len(x) * layer.rows(module, x[:1]).shape[1], layer.shape[1]
        stride = places / (_PLACES * width)
        if stride <= 1 or float(places) * layer.groups * width**2 < _PRODUCTS:
            return None
        return cls(stride)

    def places(self, count: int, device: torch.device) -> Tensor:
        starts = torch.arange(0, count, self.stride, dtype=torch.float64)
        offsets = torch.rand(len(starts), generator=self.generator, dtype=torch.float64)
        chosen = (starts + offsets * self.stride).long().clamp(max=count - 1)
        return chosen.unique().to(device)


def _chunks(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    # Convolutions unfold one item at a time at most; other inputs are already rows.
    if layer.convolves:
        return x.split(1)
    return x.reshape(-1, layer.shape[1]).split(_ROWS)


def _add_drift(drift: Tensor, moved: Tensor, rows: Tensor, narrow: _Bytes | None) -> None:
    """``drift += movedᵀ rows``; from ``narrow``, where it is given, in place of ``rows``."""
    if narrow is None:
        drift += _coarse_product(moved, rows)
    else:
        _add_product(drift[0], _Bytes.of(moved[0]), narrow)


def expert_moments(layer: Layer, x: Tensor, chosen: Tensor, mask: Tensor | None) -> Moments:
    """The moment of each expert's tokens.

    ``_BORROWED·in`` tokens of the average expert are among them: few tokens say little about most
    directions, and none nothing at all. Many outweigh the borrowed ones.

    Args:
        x: ``(tokens, in)`` inputs of all experts.
        chosen: which experts read which token, as `Layer.expert_rows` takes it.
    """
    # 1. Padding does not count.
    if mask is not None and mask.numel() == len(x) and not bool(mask.all()):
        kept = mask.reshape(-1).bool()
        x, chosen = x[kept], chosen[kept]

    # 2. Sum over each expert's own tokens.
    width = layer.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    second = torch.zeros(layer.groups, width, width, dtype=wide, device=x.device)
    counts: list[int] = []
    for total, rows in zip(second.split(1), layer.expert_rows(x, chosen), strict=True):
        for part in rows.split(_ROWS):
            _add_gram(total, part.to(wide)[None])
        counts.append(len(rows))
    _mirror(second)

    # 3. Borrow from the average expert.
    average = second.sum(0) / max(1, sum(counts))
    borrowed = _BORROWED * width
    for total, count in zip(second, counts, strict=True):
        total.add_(average, alpha=borrowed).div_(count + borrowed)
    few = sum(count < width for count in counts)
    if not few:
        return Moments(second)
    note = (
        f"layer {layer.name}: {few} of {layer.groups} experts saw fewer calibration tokens than "
        f"their {width} inputs (the fewest {min(counts)}) and were solved for those of all "
        "experts in part"
    )
    return Moments(second, notes=(note,))


def _mirror(second: Tensor) -> None:
    """Fill the lower triangle from the upper one."""
    for start in range(0, second.shape[1], _PANEL):
        stop = start + _PANEL
        second[:, stop:, start:stop] = second[:, start:stop, stop:].transpose(1, 2)


def _add_gram(total: Tensor, rows: Tensor, narrow: _Bytes | None = None) -> None:
    """``total += rowsᵀ rows``, from ``narrow`` where it is given.

    Panels on and above the diagonal only: five eighths of the work at four panels.
    """
    for start in range(0, rows.shape[2], _PANEL):
        panel, onwards = slice(start, start + _PANEL), slice(start, None)
        if narrow is None:
            left, right = rows[:, :, panel], rows[:, :, onwards]
            total[:, panel, onwards].baddbmm_(left.transpose(1, 2), right)
        else:
            _add_product(total[0, panel, onwards], narrow.columns(panel), narrow.columns(onwards))


def _coarse_product(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b``; on the CPU from bfloat16 factors, twice as fast.

    It only tells where to move, and is shrunk anyway.
    """
    if a.device.type == "cpu" and a.dtype == torch.float32:
        return (a.transpose(1, 2).bfloat16() @ b.bfloat16()).to(a.dtype)
    return a.transpose(1, 2) @ b


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Rows ``(n, in)`` in steps ``(in,)`` of 1/127 of each column's largest value.

    What is lost is noise of a twelfth of a squared step. No value of ``n`` is larger than ``√n``
    root mean squares, so the noise adds to a column's second moment n/193,548 of it at most, 2 %
    for `_ROWS`, and little to the others: far less than other tokens would. (A product rounded to
    bfloat16 is that of no inputs, and too coarse.)
    """

    values: Tensor
    step: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Bytes:
        step = rows.abs().amax(0).div_(127).clamp_min_(torch.finfo(rows.dtype).tiny)
        return cls((rows * step.reciprocal()).round_().to(torch.int8), step)

    def total(self) -> Tensor:
        """The sum of all rows, ``(1, in)``."""
        return (self.values.sum(0) * self.step)[None]

    def columns(self, which: slice) -> _Bytes:
        return _Bytes(self.values[:, which], self.step[which])


def _narrowed(rows: Tensor) -> _Bytes | None:
    """Rows ``(1, n, in)`` in 8 bits, where the CPU multiplies them four times as fast."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return None
    if not multiplies_bytes_fast() or len(rows) != 1 or rows.shape[2] < _NARROW:
        return None
    return _Bytes.of(rows[0])


def _add_product(total: Tensor, a: _Bytes, b: _Bytes) -> None:
    """``total += aᵀ b``, summed in whole numbers."""
    product = int8_product(a.values.T, b.values).to(total.dtype)
    total.addcmul_(product.mul_(b.step), a.step[:, None])
