"""How a layer is rounded: the grids of its groups by a search, then its codes.

With second moments of the inputs, the search weighs what an error costs, and the GPTQ sweep
(`curvprune.compression.gptq`) chooses the codes; the rows of all options are swept together.
Without them every weight goes to the nearest point of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvprune.compression.gptq import Factor, Rows, sweep_columns
from curvprune.compression.grids import code_range, quantize_to_grid, search_grid, spread
from curvprune.options import Quantize

# Rows swept at a time: enough to hide the cost of a column, few enough to bound memory.
STACKED_ROWS = 16384

# Weight of 1 / U_jj^2 against diag(A) in the scale search: 1 trusts the calibration data too much.
# SmolLM2-135M (six layers, groups of 64), output error on other text than calibrated on, at 2 / 3 /
# 4 bits: .0258 / .00659 / .00170 with 0, .0245 / .00602 / .00151 with 0.75, .0248 / .00606 / .00153
# with 1.
ABSORBED = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What one option of a layer shall round.

    Attributes:
        quantize: the grid that is asked for.
        weight: ``(in, out)`` what the rounded weight shall stand in for.
        sparse: keep the zeros of ``weight``.
    """

    quantize: Quantize
    weight: Tensor
    sparse: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """A rounded weight ``(codes - zero) * scale``, as it is stored.

    Attributes:
        codes: ``(out, in)`` int8.
        scale: ``(out, groups)`` in the type it is stored in.
        zero: ``(out, groups)``, ``None`` for a symmetric grid of 2 bits or more.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def round_in_sweep(
    targets: Sequence[Target], diagonal: Tensor, factor: Factor, *, stored: torch.dtype
) -> list[Rounded]:
    """Round all targets of a layer in one sweep over their columns.

    Around a refitted sparse weight and around the dense target the objective is the same up to a
    constant, for all weights on its support. What is left to absorb is the rounding.

    Args:
        targets: all of one shape.
        diagonal: ``(in,)`` of the second moment.
        factor: the factorised second moment.
        stored: the type of the scales.
    """
    # 1. The grid of every group and row, by what an error of each input costs.
    importance = _importance(diagonal, factor)
    grids = [_grid(target.weight, target.quantize, importance, stored) for target in targets]

    # 2. Sweep a part of all targets' rows at a time.
    width, out = targets[0].weight.shape
    step = max(1, STACKED_ROWS // len(targets))
    codes = [torch.empty(width, out, dtype=torch.int8, device=diagonal.device) for _ in targets]
    for start in range(0, out, step):
        part = slice(start, start + step)
        stacked = [
            _shifted_rows(target, grid, part) for target, grid in zip(targets, grids, strict=True)
        ]
        swept = sweep_columns([rows for rows, _ in stacked], factor)
        # 3. The sweep gives codes minus zero points.
        for whole, (rows, zero), value in zip(codes, stacked, swept, strict=True):
            whole[:, part] = value + spread(zero, width, rows.group_size, dim=0)
    return [_as_stored(own.T.contiguous(), grid) for own, grid in zip(codes, grids, strict=True)]


def round_to_nearest(weight: Tensor, target: Target, *, stored: torch.dtype) -> Rounded:
    """Round ``weight (out, in)`` to the nearest points of the grid that suits ``target``."""
    quantize = target.quantize
    scale, zero = _grid(target.weight, quantize, None, stored)
    codes = quantize_to_grid(
        weight,
        scale.T,
        None if zero is None else zero.T,
        bits=quantize.bits,
        group_size=quantize.group_size,
    )
    return _as_stored(codes, (scale, zero))


def _grid(
    weight: Tensor, quantize: Quantize, importance: Tensor | None, stored: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return search_grid(
        weight,
        bits=quantize.bits,
        group_size=quantize.group_size,
        symmetric=quantize.symmetric,
        importance=importance,
        stored=stored,
    )


def _importance(diagonal: Tensor, f: Factor) -> Tensor:
    """What an error of each input costs, for the grid search, ``(in,)``.

    Alone, it costs ``H_jj``. Inside the sweep the later columns absorb a part, and ``1 / U_jj^2``
    is left.
    """
    left = torch.empty_like(diagonal)
    left[f.order] = f.U.diagonal().square().reciprocal()
    return left**ABSORBED * (diagonal + f.damping * diagonal.mean()) ** (1 - ABSORBED)


def _shifted_rows(
    target: Target, grid: tuple[Tensor, Tensor | None], part: slice
) -> tuple[Rows, Tensor]:
    """Some rows of a target for the sweep, which knows integers only, and their zero points."""
    quantize, weight = target.quantize, target.weight[:, part]
    scale = grid[0][:, part].to(weight)
    zero = torch.zeros_like(scale) if grid[1] is None else grid[1][:, part].to(weight)
    if quantize.bits == 1:
        # The zero point of one bit is no integer. The sweep sees nothing but differences of weights
        # and their values, so both may be moved together, by what makes it one.
        weight = weight + spread(zero * scale, len(weight), quantize.group_size, dim=0)
        zero = torch.zeros_like(scale)
    lowest, highest = code_range(quantize.bits)
    rows = Rows(
        weight=weight,
        scale=scale,
        low=lowest - zero,
        high=highest - zero,
        group_size=quantize.group_size,
        keep=weight != 0 if target.sparse else None,
    )
    return rows, zero


def _as_stored(codes: Tensor, grid: tuple[Tensor, Tensor | None]) -> Rounded:
    scale, zero = grid
    if zero is not None:
        zero = zero.T.contiguous()
    return Rounded(codes=codes, scale=scale.T.contiguous(), zero=zero)
