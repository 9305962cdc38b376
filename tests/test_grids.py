"""The search for grids against a literal one, an exhaustive one, and brute force for one bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curvprune.compression import (
    COARSE,
    FINE,
    MIN_SCALE,
    ZERO_SHIFT_BITS,
    code_range,
    dequantize,
    quantize_to_grid,
    search_grid,
)
from tests.matrices import second_moment, weight


def literal_search(
    w: Tensor, a: Tensor, bits: int, symmetric: bool
) -> tuple[float, float, Callable[[float, float], float]]:
    """The documented candidates for one group, one after another: scale, error, and the error of
    any grid."""
    low, high = code_range(bits)
    top, bottom = max(float(w.max()), 0.0), min(float(w.min()), 0.0)
    whole = max(top / high, bottom / low) if symmetric else (top - bottom) / (high - low)
    zero: float = 0 if symmetric else min(max(round(low - bottom / whole), low), high)

    def error(s: float, z: float) -> float:
        return sum(
            float(aj) * (wj - (min(max(round(wj / s + z), low), high) - z) * s) ** 2
            for wj, aj in zip(w.tolist(), a, strict=True)
        )

    def half(s: float) -> float:
        return float(torch.tensor(max(s, MIN_SCALE), dtype=torch.float64).half())

    best = (math.inf, 0.0, 0.0)

    def offer(s: float, z: float) -> None:
        nonlocal best
        s = half(s)
        if error(s, z) < best[0]:
            best = (error(s, z), s, z)

    for share in COARSE:
        offer(whole * share, zero)
    if not symmetric and bits <= ZERO_SHIFT_BITS:
        start = best[1]
        for shift, share in itertools.product((-1, 1), (0.85, 1.0, 1.15)):
            offer(start * share, min(max(zero + shift, low), high))
    start, zero = best[1:]
    for step in FINE:
        offer(start + whole * step, zero)
    _, s, z = best
    codes = [min(max(round(wj / s + z), low), high) - z for wj in w.tolist()]
    above = sum(float(aj) * c * wj for aj, c, wj in zip(a, codes, w.tolist(), strict=True))
    below = sum(float(aj) * c * c for aj, c in zip(a, codes, strict=True))
    if above > 0:
        offer(above / below, z)
    return best[1], best[0], error


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_grid_search_finds_the_best_candidate(bits: int, symmetric: bool) -> None:
    W, a = weight(5, 24, seed=bits), second_moment(24).diagonal()
    scale, zero = search_grid(
        W.T.contiguous(), bits=bits, group_size=8, symmetric=symmetric, importance=a
    )
    low, high = code_range(bits)
    for row, group in itertools.product(range(5), range(3)):
        w = W[row, 8 * group : 8 * group + 8]
        expected, least, error = literal_search(w, a[8 * group : 8 * group + 8], bits, symmetric)
        found, z = float(scale[group, row]), 0 if zero is None else int(zero[group, row])
        assert low <= z <= high
        # Zero points can tie: two of them may give the same values.
        assert found == expected
        assert math.isclose(error(found, z), least, rel_tol=1e-9)
        top, bottom = max(float(w.max()), 0.0), min(float(w.min()), 0.0)
        minmax = max(top / high, bottom / low) if symmetric else (top - bottom) / (high - low)
        minmax = float(torch.tensor(minmax, dtype=torch.float64).half())
        assert least <= error(minmax, 0 if symmetric else round(low - bottom / minmax))


def test_grid_search_is_close_to_an_exhaustive_one() -> None:
    W, a = weight(20, 16), second_moment(16).diagonal()
    for bits, symmetric, slack in (
        (2, False, 1.12),
        (2, True, 1.02),
        (4, False, 1.12),
        (4, True, 1.08),
    ):
        scale, zero = search_grid(W.T.contiguous(), bits=bits, symmetric=symmetric, importance=a)
        low, high = code_range(bits)
        s = (
            W.abs().amax(dim=1, keepdim=True)
            * torch.linspace(0.01, 2, 800, dtype=torch.float64)
            * 2
            / (high - low)
        )
        s = s[..., None].half().double()
        best = torch.full((20,), math.inf, dtype=torch.float64)
        for z in [0] if symmetric else range(low, high + 1):
            q = ((W[:, None] / s + z).round().clamp(low, high) - z) * s
            best = torch.minimum(best, ((q - W[:, None]) ** 2 @ a).amin(dim=1))
        codes = quantize_to_grid(W, scale.T, None if zero is None else zero.T, bits=bits)
        found = (
            dequantize(codes, scale.T, None if zero is None else zero.T, dtype=torch.float64) - W
        ) ** 2 @ a
        assert bool((found >= best * (1 - 1e-2)).all())
        assert float(found.sum()) <= slack * float(best.sum())


def two_values_by_brute_force(w: Tensor, a: Tensor, symmetric: bool) -> float:
    """The least error of two values for a group: every way to deal its members out to them, each
    value at its best."""
    least = math.inf
    for sides in itertools.product((-1.0, 1.0), repeat=len(w)):
        side = torch.tensor(sides, dtype=torch.float64)
        if symmetric:
            value = side * (a * side * w).sum().clamp_min(0) / a.sum()
        else:
            value = torch.empty_like(w)
            for one in (-1.0, 1.0):
                members = side == one
                value[members] = (a * w)[members].sum() / a[members].sum()
        least = min(least, float((a * (value - w).square()).sum()))
    return least


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_one_bit_is_optimal(symmetric: bool, offset: float) -> None:
    W, a = weight(6, 21) + offset, second_moment(21).diagonal()
    scale, zero = search_grid(
        W.T.contiguous(), bits=1, group_size=8, symmetric=symmetric, importance=a
    )
    assert zero is not None and scale.dtype == zero.dtype == torch.float16
    codes = quantize_to_grid(W, scale.T, zero.T, bits=1, group_size=8)
    assert set(codes.unique().tolist()) <= {-1, 0}
    error = a * (dequantize(codes, scale.T, zero.T, 8, dtype=torch.float64) - W).square()
    if symmetric:
        assert bool((zero == -0.5).all()), "the values are -s/2 and s/2"
    for row, start in itertools.product(range(6), (0, 8, 16)):
        part = slice(start, start + 8)
        least = two_values_by_brute_force(W[row, part], a[part], symmetric)
        slack = 2**-18 * float((a * W[row].square().max())[part].sum())  # two values in float16
        assert least * (1 - 1e-9) <= float(error[row, part].sum()) <= least + slack


def test_one_bit_of_degenerate_groups() -> None:
    W = torch.zeros(5, 6, dtype=torch.float64)
    W[1], W[2], W[3], W[4, 2] = 0.25, -0.25, 0.01, 50.0
    a = torch.tensor([1.0, 0, 2, 0, 0, 3], dtype=torch.float64)
    for importance in (None, a, torch.zeros_like(a)):
        scale, zero = search_grid(W.T.contiguous(), bits=1, symmetric=False, importance=importance)
        assert zero is not None and bool(
            scale.isfinite().all() and zero.isfinite().all() and (scale > 0).all()
        )
        codes = quantize_to_grid(W, scale.T, zero.T, bits=1)
        torch.testing.assert_close(
            dequantize(codes, scale.T, zero.T, dtype=torch.float64), W, rtol=2**-10, atol=2**-24
        )
        scale, _ = search_grid(W.T.contiguous(), bits=1, importance=importance)
        assert bool((scale > 0).all())


@pytest.mark.parametrize("bits", [1, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_shorter_last_group_is_searched_like_any_other(bits: int, symmetric: bool) -> None:
    W, a = weight(5, 27), second_moment(27).diagonal()
    scale, zero = search_grid(
        W.T.contiguous(), bits=bits, group_size=8, symmetric=symmetric, importance=a
    )
    assert scale.shape == (4, 5)
    for group in range(4):
        part = slice(8 * group, 8 * group + 8)
        alone = search_grid(
            W[:, part].T.contiguous(), bits=bits, symmetric=symmetric, importance=a[part]
        )
        assert torch.equal(scale[group], alone[0][0])
        assert zero is None if alone[1] is None else torch.equal(zero[group], alone[1][0])


# Elements are scored 2^17 at a time: several groups at once, or some rows of one.
@pytest.mark.parametrize("out, width, size", [(3000, 60, 6), (300, 700, 500)])
def test_grid_search_does_not_depend_on_what_is_searched_together(
    out: int, width: int, size: int
) -> None:
    Wt, a = weight(out, width).T.contiguous(), second_moment(width).diagonal()
    assert Wt.numel() > 2**17
    scale, zero = search_grid(Wt, bits=3, group_size=size, symmetric=False, importance=a)
    assert zero is not None
    for start in range(0, width, size):
        part = slice(start, start + size)
        for rows in (slice(0, out // 3), slice(out // 3, None)):
            own = Wt[part, rows].contiguous()
            assert own.numel() < 2**17
            alone = search_grid(own, bits=3, symmetric=False, importance=a[part])
            assert torch.equal(scale[start // size, rows], alone[0][0])
            assert alone[1] is not None
            assert torch.equal(zero[start // size, rows], alone[1][0])
