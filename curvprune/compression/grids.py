"""Uniform grids: one 16-bit scale and one zero point for each (output row, group of inputs).

A grid with scale ``s`` and zero ``z`` holds the values ``(k - z) * s`` for the integers ``k`` in
``[-2^(b-1), 2^(b-1) - 1]`` (compressed-tensors' signed convention). From 2 bits on ``z`` is such an
integer too, so zero is on the grid and a pruned weight a point of it; a product of at most nine
bits with a 16-bit float is exact in float32: what is computed here is what a reader of the file
gets.

One bit has two values. Around an integer zero point one of them would be 0, so that all weights of
one sign would be lost. There ``z`` is a float16: -1/2 in a symmetric grid, whose values are
``-s/2`` and ``s/2``, any number otherwise.

The last group of a row is shorter where the group size does not divide the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Shares of the range that clips nothing. Twice as many changed the output error by less than 1 %
# (SmolLM2-135M, six layers, 2 to 8 bits).
COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
FINE = (-0.06, -0.03, 0.03, 0.06)
ZERO_SHIFT_BITS = 4  # finer grids have so many points that losing one at an end hardly matters
MIN_SCALE = 2.0**-24  # smallest positive float16
MAX_SCALE = 65504.0
MOST_STEPS = 1024  # from here on the steps of float16 are whole ones
HALF_WAY = -0.5  # zero of a symmetric grid of one bit
CHUNK = 1 << 17  # elements scored at a time: half a megabyte stays in the cache of one core
ACCELERATED_CHUNK = 1 << 24  # elsewhere every chunk costs a few hundred kernel launches


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest stored code of a ``bits``-wide signed grid."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def scale_dtype(weight: torch.dtype) -> torch.dtype:
    """The type in which scales are stored: float16, but bfloat16 for a bfloat16 weight.

    Readers of such a weight would round a float16 scale once more.
    """
    return torch.bfloat16 if weight == torch.bfloat16 else torch.float16


def round_scale(scale: Tensor, stored: torch.dtype = torch.float16) -> Tensor:
    """The nearest scale that ``stored`` can hold and that is neither zero nor infinite.

    In the dtype of ``scale``.
    """
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(stored).to(scale.dtype)


def spread(parameters: Tensor, width: int, group_size: int | None, *, dim: int) -> Tensor:
    """Parameters, one for each group along ``dim``, repeated for each of the ``width`` inputs."""
    if parameters.shape[dim] == 1:
        return parameters
    return parameters.repeat_interleave(group_size or width, dim=dim).narrow(dim, 0, width)


def quantize_to_grid(
    W: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
) -> Tensor:
    """Round to the nearest point of the grid.

    Args:
        W: ``(out, in)`` float.
        scale: ``(out, groups)`` float16, positive.
        zero: ``(out, groups)`` int8, or ``None`` for a symmetric grid of 2 bits or more; float16
            for one bit.
        group_size: inputs per group; ``None`` means one group per row.

    Returns:
        codes ``(out, in)`` int8, ``clamp(round(w / s) + z, -2^(b-1), 2^(b-1) - 1)``.
    """
    width = W.shape[1]
    compute = torch.promote_types(W.dtype, torch.float32)
    low, high = code_range(bits)
    codes = W.to(compute) / spread(scale.to(compute), width, group_size, dim=1)
    shift = None if zero is None else spread(zero, width, group_size, dim=1)
    if shift is not None and shift.is_floating_point():
        codes += shift
        shift = None
    codes.round_()
    if shift is not None:
        codes += shift
    return codes.clamp_(low, high).to(torch.int8)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    group_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values of stored codes, ``(codes - zero) * scale``, exact in float32 from 2 bits on.

    Args:
        codes: ``(out, in)`` int8.
        scale: ``(out, groups)`` float16.
        zero: ``(out, groups)`` int8, or ``None`` for a symmetric grid of 2 bits or more; float16
            for one bit.
        group_size: inputs per group; ``None`` means one group per row.
        dtype: float32 or float64.
    """
    width = codes.shape[1]
    values = codes.to(dtype)
    if zero is not None:
        values -= spread(zero, width, group_size, dim=1)
    values *= spread(scale.to(dtype), width, group_size, dim=1)
    return values


def search_grid(
    Wt: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    importance: Tensor | None = None,
    stored: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that minimise ``sum_j a_j (w_j - q(w_j))^2`` in each (row, group).

    Starts from the smallest scale that clips nothing and tries its ``COARSE`` shares, then ``FINE``
    steps around the best, then the least-squares scale of the best codes. Up to ``ZERO_SHIFT_BITS``
    bits the zero points next to the min-max one are tried as well (that is, clipping one end more
    than the other). Scores use the scale as it will be stored, so the result is never worse than
    min-max. The two values of one bit are the best ones there are, up to the rounding of what is
    stored: see `_two_values`.

    Args:
        Wt: ``(in, out)``, float32 or float64: the weight transposed, so that the rows' parameters
            lie along the contiguous axis.
        importance: ``a``, ``(in,)``, non-negative; ``None`` means ones.
        stored: the type of the scales.

    Returns:
        scale ``(groups, out)`` of type ``stored`` and zero ``(groups, out)``: int8, ``None`` if
        symmetric; of one bit float16, -1/2 if symmetric.

    Cost:
        scores 13 candidates (19 for asymmetric grids of at most ``ZERO_SHIFT_BITS`` bits), for one
        bit one sort of each group at most; no forward pass.
    """
    width = len(Wt)
    a = Wt.new_ones(width) if importance is None else importance.to(Wt)
    # 1. Whole groups, and the last one, which may be shorter.
    size = min(group_size or width, width)
    whole = width - width % size
    kind = _Kind(bits=bits, symmetric=symmetric, stored=stored)
    parts = [_search_groups(Wt[:whole], a[:whole], size, kind)]
    if whole < width:
        parts.append(_search_groups(Wt[whole:], a[whole:], width - whole, kind))
    scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    # 2. As they are stored.
    scale = scale.to(stored)
    if bits == 1:
        return scale, zero.to(torch.float16)
    return scale, None if symmetric else zero.to(torch.int8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """What kind of grid is searched; ``stored`` is the type of its scales."""

    bits: int
    symmetric: bool
    stored: torch.dtype


def _search_groups(Wt: Tensor, a: Tensor, size: int, kind: _Kind) -> tuple[Tensor, Tensor]:
    """Groups of one size.

    Args:
        Wt: ``(groups * size, out)``.
        a: ``(groups * size,)``.

    Returns:
        scale and zero, ``(groups, out)``.
    """
    groups = Wt.reshape(-1, size, Wt.shape[1])
    # Only ratios matter inside a group; without this, tiny second moments underflow in float32.
    a = a.reshape(-1, 1, size)
    a = a / a.amax(dim=2, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    scale = Wt.new_empty(len(groups), Wt.shape[1])
    zero = torch.zeros_like(scale)
    most = CHUNK if Wt.device.type == "cpu" else ACCELERATED_CHUNK
    search = _two_values if kind.bits == 1 else _search
    for part in _chunks(len(groups), size, Wt.shape[1], most):
        some, rows = part
        w = groups[some, :, rows].contiguous()
        scale[part], zero[part] = search(w, a[some], kind)
    return scale, zero


def _chunks(groups: int, size: int, out: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Groups and rows that make up about ``most`` elements: several groups, or a part of one."""
    per_group = max(1, most // (size * out))
    per_row = out if size * out <= most else max(16, most // size)
    for g in range(0, groups, per_group):
        for r in range(0, out, per_row):
            yield slice(g, g + per_group), slice(r, r + per_row)


class _Best:
    """The best grid so far of every (group, row) of a chunk, ``w`` as in `_search`."""

    def __init__(self, w: Tensor, a: Tensor, kind: _Kind) -> None:
        self.w, self.a, self.stored = w, a, kind.stored
        self.low, self.high = code_range(kind.bits)
        shape = (w.shape[0], 1, w.shape[2])
        self.scale = w.new_ones(shape)
        self.zero = w.new_zeros(shape)
        self.error = w.new_full(shape, torch.inf)
        # Buffers: w / s + z, and the code nearest to it.
        self.v = torch.empty_like(w)
        self.q = torch.empty_like(w)

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest code of every weight, in a buffer that the next call overwrites."""
        torch.addcmul(zero, self.w, scale.reciprocal(), out=self.v)
        return torch.round(self.v, out=self.q).clamp_(self.low, self.high)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Score a candidate, with its scale as it is stored, and keep it where it is better."""
        scale = round_scale(scale, self.stored)
        miss = self.codes(scale, zero).sub_(self.v).square_()
        error = torch.bmm(self.a, miss).mul_(scale).mul_(scale)
        better = error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def least_squares_scale(self) -> Tensor:
        """``s = sum a w c / sum a c^2`` for the codes ``c`` (zero subtracted) of the best grid."""
        c = self.codes(self.scale, self.zero).sub_(self.zero)
        above = torch.bmm(self.a, torch.mul(c, self.w, out=self.v))
        below = torch.bmm(self.a, c.square_())
        known = (above > 0) & (below > 0)
        return torch.where(known, above / below.clamp_min(MIN_SCALE), self.scale)


def _search(w: Tensor, a: Tensor, kind: _Kind) -> tuple[Tensor, Tensor]:
    """Two bits or more: ``w (groups, size, rows)``, ``a (groups, 1, size)``.

    Returns:
        scale and zero, ``(groups, rows)``.
    """
    # 1. The smallest scale that clips nothing.
    low, high = code_range(kind.bits)
    top = w.amax(dim=1, keepdim=True).clamp_min_(0)
    bottom = w.amin(dim=1, keepdim=True).clamp_max_(0)
    if kind.symmetric:
        whole = torch.maximum(top / high, bottom / low)
        zero = torch.zeros_like(whole)
    else:
        whole = (top - bottom) / (high - low)
        zero = (low - bottom / whole.clamp_min(MIN_SCALE)).round_().clamp_(low, high)
    # A group of zeros must stay zeros also when error compensation moves its weights a little.
    whole = torch.where(whole > 0, whole, 1.0)
    # 2. Its shares.
    best = _Best(w, a, kind)
    for share in COARSE:
        best.offer(whole * share, zero)
    # 3. Coarse grids: clip one end more than the other.
    if not kind.symmetric and kind.bits <= ZERO_SHIFT_BITS:
        start = best.scale
        for shift in (-1, 1):
            for share in (0.85, 1.0, 1.15):
                best.offer(start * share, (zero + shift).clamp_(low, high))
    # 4. Small steps around the best, then least squares for its codes.
    start, zero = best.scale, best.zero
    for step in FINE:
        best.offer(start + whole * step, zero)
    best.offer(best.least_squares_scale(), best.zero)
    return best.scale[:, 0], best.zero[:, 0]


def _two_values(w: Tensor, a: Tensor, kind: _Kind) -> tuple[Tensor, Tensor]:
    """One bit: ``w (groups, size, rows)``, ``a (groups, 1, size)``.

    Symmetric: the best ``s`` of the values ``-s`` and ``s`` is the mean of ``|w|``, weighted with
    ``a``.

    Asymmetric: weights of the lower value lie below those of the upper one. So a group has as many
    candidates as members: split the sorted weights, and each side's value is its mean. What the
    best split gains over one value for all is ``A_1 A_2 / (A_1 + A_2) (m_2 - m_1)^2`` with the
    sides' sums of ``a`` and means ``m``.

    Returns:
        scale and zero, ``(groups, rows)``.
    """
    a = a.transpose(1, 2).expand_as(w)
    # Inputs that are always zero: every weight counts the same.
    if not bool((a.sum(dim=1) > 0).all()):
        a = torch.where(a.sum(dim=1, keepdim=True) > 0, a, 1.0)
    if kind.symmetric:
        scale = round_scale(2 * (a * w.abs()).sum(dim=1) / a.sum(dim=1), kind.stored)
        return scale, torch.full_like(scale, HALF_WAY)
    # 1. Sort, and sum from below.
    w, order = w.sort(dim=1)
    a = a.gather(1, order)
    below, moment = a.cumsum(dim=1), (a * w).cumsum(dim=1)
    mass, total = below[:, -1:], moment[:, -1:]
    above = mass - below
    # 2. The split that gains most.
    tiny = torch.finfo(w.dtype).tiny
    gap = (total - moment) / above.clamp_min(tiny) - moment / below.clamp_min(tiny)
    gain = torch.where((below > 0) & (above > 0), below * above * gap.square(), -1.0)
    gain[:, -1] = 0  # all weights on one side: the split that is always there
    split = gain.argmax(dim=1, keepdim=True)
    # 3. Each side's mean.
    lower = (moment.gather(1, split) / below.gather(1, split).clamp_min(tiny))[:, 0]
    upper = ((total - moment.gather(1, split)) / above.gather(1, split).clamp_min(tiny))[:, 0]
    mean = (total / mass)[:, 0]
    # Two values that nearly agree are further from zero than a float16 zero point can tell steps
    # apart: then all weights get one value, and the other is 0.
    single = (split[:, 0] == w.shape[1] - 1) | (mean.abs() > MOST_STEPS * (upper - lower))
    lower = torch.where(single, mean.clamp_max(0), lower)
    upper = torch.where(single, mean.clamp_min(0), upper)
    # 4. As they are stored: when the scale is rounded, the middle of the two values stays.
    scale = round_scale(upper - lower, kind.stored)
    zero = HALF_WAY - (upper + lower) / (2 * scale)
    return scale, zero.clamp(-MAX_SCALE, MAX_SCALE)
