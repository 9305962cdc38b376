"""Solvers against exhaustive search, textbook inverse updates, closed forms and
compressed-tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as peer_dequantize
from torch import Tensor

import curvprune.compression.solver as solve_room
from curvprune.compression import (
    COARSE,
    DRIFT,
    FINE,
    MIN_SCALE,
    RIDGE,
    ZERO_SHIFT_BITS,
    Solved,
    code_range,
    column_order,
    dequantize,
    factor,
    pruning,
    quantize_to_grid,
    search_grid,
    solve,
)
from curvprune.options import (
    Cast,
    Keep,
    Option,
    Prune,
    PruneQuantize,
    Quantize,
    pruner_of,
    quantizer_of,
)

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


def textbook(W: Tensor, H: Tensor, s: Solved, order: Tensor, drop: Tensor) -> Tensor:
    """Optimal brain surgeon in a fixed order: the inverse Hessian of the columns left, updated
    explicitly (float64)."""
    W, inverse, drop = (
        W.double()[:, order].clone(),
        torch.linalg.inv(H.double()[order][:, order]),
        drop[:, order],
    )
    for j in range(len(order)):
        q = torch.where(drop[:, j], 0.0, nearest(s, int(order[j]), W[:, j]))
        change = (W[:, j] - q) / inverse[j, j]
        W[:, j:] -= change[:, None] * inverse[j, j:]
        W[:, j] = q
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    result = torch.empty_like(W)
    result[:, order] = W
    return result


QUANTIZERS: list[Quantize] = [
    Quantize(bits=2, group_size=5, symmetric=False),
    Quantize(bits=3, group_size=10),
    Quantize(bits=4, symmetric=False),
    Quantize(bits=8),
]
UNEVEN: list[Quantize] = [  # no zero on the grid, or a shorter last group
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


@pytest.mark.parametrize("shape", [(1, 20), (6, 20), (3, 140), (4, 260)])
def test_sweep_equals_the_textbook(shape: tuple[int, int]) -> None:
    W, A = weight(*shape), second_moment(shape[1])
    order = column_order(A.diagonal())
    options: list[Option] = [*QUANTIZERS, *UNEVEN, *PRUNERS[4:]]
    for s in solve(W, options, A, layer="x", damping=DAMPING):
        start, prune = W, pruner_of(s.option)
        if prune is not None:
            (sparse,) = solve(W, [prune], A, layer="x", damping=DAMPING)
            start = sparse.weight
        expected = textbook(start, damped(A), s, order, start == 0)
        torch.testing.assert_close(s.weight, expected, rtol=1e-8, atol=1e-10)


def test_diagonal_second_moment_reaches_the_exhaustive_optimum() -> None:
    W, A = weight(1, 4), torch.diag(torch.tensor([1.0, 3.0, 0.2, 2.0], dtype=torch.float64))
    (s,) = solve(W, [Quantize(bits=2, symmetric=False)], A, layer="x")
    grid = [points(s, j)[0].tolist() for j in range(4)]
    best = min(
        output_error(torch.tensor([values], dtype=torch.float64), W, A)
        for values in itertools.product(*grid)
    )
    assert math.isclose(output_error(s.weight, W, A), best, rel_tol=1e-12)


def test_compensation_is_between_the_optimum_and_rounding() -> None:
    W, A = weight(200, 4), second_moment(4)
    (s,) = solve(W, [Quantize(bits=2)], A, layer="x")
    H = damped(A)
    combinations = torch.tensor(list(itertools.product(range(4), repeat=4)))
    plain = torch.stack([nearest(s, j, W[:, j]) for j in range(4)], dim=1)
    optimum = 0.0
    for row in range(len(W)):
        values = torch.stack([points(s, j)[row][combinations[:, j]] for j in range(4)], dim=1)
        d = values - W[row]
        optimum += float(((d @ H) * d).sum(dim=1).min())
    reached, rounded = output_error(s.weight, W, H), output_error(plain, W, H)
    assert optimum <= reached * (1 + 1e-12)
    assert reached < 0.9 * rounded


@pytest.mark.parametrize("width", [1, 40, 301])  # the last is inverted by halves, of odd size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_factor_inverts(dtype: torch.dtype, width: int) -> None:
    A = second_moment(width, dtype=dtype)
    f = factor(A, column_order(A.diagonal()), layer="x", damping=DAMPING)
    H = damped(A.double())[f.order][:, f.order]
    assert torch.equal(f.U, f.U.triu())
    torch.testing.assert_close(
        f.U.double().T @ f.U.double() @ H,
        torch.eye(width, dtype=torch.float64),
        rtol=0,
        atol=1e-10 if dtype == torch.float64 else 1e-3,
    )
    assert (f.damping, f.notes) == (DAMPING, ())


def test_columns_go_by_descending_second_moment() -> None:
    diagonal = torch.tensor([1.0, 2.0, 5.0, 5.0, 9.0, 0.0, 3.0, 1.0])
    assert column_order(diagonal).tolist() == [4, 2, 3, 6, 1, 0, 7, 5]


def least_squares(W: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """The best weights on a support, row by row, in closed form."""
    result = torch.zeros_like(W)
    for row, kept in enumerate(keep):
        s = kept.nonzero()[:, 0]
        result[row, s] = torch.linalg.solve(H[s][:, s], (H @ W[row])[s])
    return result


def test_pruning_one_weight_is_the_surgeons_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "REFITS", 20)
    W, A = weight(1, 10), second_moment(10)
    p = int(A.diagonal().argmax())
    W[0, p] = 1e-3
    (s,) = solve(W, [Prune(sparsity=0.1)], A, layer="x", damping=DAMPING)
    H = damped(A)
    rest = [j for j in range(10) if j != p]
    expected = W.clone()
    expected[0, p] = 0
    expected[0, rest] += torch.linalg.solve(H[rest][:, rest], H[rest, p]) * W[0, p]
    torch.testing.assert_close(s.weight, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "option", [Prune(sparsity=0.5), Prune(sparsity=0.7), Prune(pattern="2:4"), Prune(pattern="3:5")]
)
def test_the_refit_is_least_squares_on_the_support(
    monkeypatch: pytest.MonkeyPatch, option: Prune
) -> None:
    W, A = weight(6, 20), second_moment(20)
    H = damped(A)
    (rough,) = solve(W, [option], A, layer="x", damping=DAMPING)
    best = least_squares(W, H, rough.weight != 0)
    assert output_error(rough.weight, W, H) < 1.1 * output_error(best, W, H)
    monkeypatch.setattr(pruning, "REFITS", 60)
    (fine,) = solve(W, [option], A, layer="x", damping=DAMPING)
    torch.testing.assert_close(fine.weight, best, rtol=1e-8, atol=1e-10)


def sparse_gpt(W: Tensor, H: Tensor, prune: Prune) -> Tensor:
    """SparseGPT with the mask of one block of all columns or of each group (float64)."""
    W, width = W.clone(), len(H)
    inverse = torch.linalg.inv(H)
    pivots = torch.linalg.cholesky(inverse, upper=True).diagonal().square()
    drop = torch.zeros(W.shape, dtype=torch.bool)
    for j in range(width):
        if prune.sparsity is not None and j == 0:
            drop.view(-1)[
                (W**2 / pivots).flatten().argsort()[: round(prune.sparsity * W.numel())]
            ] = True
        if prune.nm is not None and j % prune.nm[1] == 0:
            group = slice(j, j + prune.nm[1])
            ranked = (W[:, group] ** 2 / pivots[group]).argsort(dim=1)[
                :, : prune.nm[1] - prune.nm[0]
            ]
            drop[:, group] = drop[:, group].scatter(1, ranked, True)
        change = torch.where(drop[:, j], W[:, j], 0.0) / inverse[j, j]
        W[:, j:] -= change[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.where(drop, 0.0, W)


@pytest.mark.parametrize(
    "option",
    [Prune(sparsity=0.5), Prune(sparsity=0.75), Prune(pattern="2:4"), Prune(pattern="1:4")],
)
def test_the_support_is_close_to_the_best_one(option: Prune) -> None:
    """All supports of one row of eight weights, over forty problems: on average near the best, far
    below SparseGPT."""
    supports = torch.tensor(list(itertools.product([False, True], repeat=8)))
    if option.nm is None:
        assert option.sparsity is not None
        supports = supports[supports.sum(dim=1) == 8 - round(8 * option.sparsity)]
    else:
        supports = supports[(supports.view(-1, 2, 4).sum(dim=2) == option.nm[0]).all(dim=1)]
    reached = best = swept = 0.0
    for seed in range(40):
        W, H = weight(1, 8, seed=seed), damped(second_moment(8, seed=100 + seed))
        (s,) = solve(W, [option], H, layer="x", damping=0.0)
        assert bool((supports == (s.weight != 0)).all(dim=1).any())
        errors = [output_error(least_squares(W, H, kept[None]), W, H) for kept in supports]
        scale = max(errors)
        best += min(errors) / scale
        reached += output_error(s.weight, W, H) / scale
        swept += output_error(sparse_gpt(W, H, option), W, H) / scale
    assert best <= reached < 1.5 * best
    assert reached < 0.7 * swept


def test_float32_and_estimated_thresholds_do_as_well() -> None:
    """A layer large enough for thresholds from a sample; float32 takes its steps in bfloat16."""
    W, A = weight(256, 400), second_moment(400)
    assert W.numel() > 3 * pruning.SAMPLE
    for option in (Prune(sparsity=0.6), Prune(pattern="2:4")):
        (wide,) = solve(W, [option], A, layer="x", damping=DAMPING)
        (narrow,) = solve(W.float(), [option], A.float(), layer="x", damping=DAMPING)
        assert (
            int((wide.weight == 0).sum())
            == int((narrow.weight == 0).sum())
            == round(W.numel() * (option.sparsity or 0.5))
        )
        error = output_error(wide.weight, W, damped(A))
        assert output_error(narrow.weight, W, damped(A)) < 1.05 * error
        assert error < 0.8 * output_error(sparse_gpt(W, damped(A), option), W, damped(A))


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:7", "5:8"])
def test_equal_weights_still_make_a_pattern(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    (s,) = solve(torch.ones(3, 4 * m), [Prune(pattern=pattern)], torch.eye(4 * m), layer="x")
    assert bool(((s.weight != 0).view(3, 4, m).sum(dim=2) == n).all())


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("width", [20, 300])
def test_sparsity_is_exact(width: int, with_inputs: bool) -> None:
    W, A = weight(7, width), second_moment(width) if with_inputs else None
    for s in solve(W, PRUNERS, A, layer="x"):
        prune = pruner_of(s.option)
        assert prune is not None
        zeros = s.weight == 0
        if prune.nm is not None:
            n, m = prune.nm
            dropped = zeros.view(7, -1, m).sum(dim=2)
            assert bool((dropped == m - n).all() if s.scale is None else (dropped >= m - n).all())
            continue
        assert prune.sparsity is not None
        count = round(prune.sparsity * W.numel())
        assert int(zeros.sum()) == count if s.scale is None else int(zeros.sum()) >= count


def test_pruned_and_rounded_weights_lie_on_the_grid() -> None:
    W, A = weight(6, 40), second_moment(40)
    for s in solve(W, PRUNERS[4:], A, layer="x"):
        assert s.codes is not None and s.scale is not None
        for j in range(40):
            assert torch.equal(nearest(s, j, s.weight[:, j]), s.weight[:, j])
        zero = torch.zeros_like(s.scale, dtype=torch.int8) if s.zero is None else s.zero
        stored_zero = s.codes == zero.repeat_interleave(40 // zero.shape[1], dim=1)
        assert torch.equal(stored_zero, s.weight == 0)


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


@pytest.mark.parametrize("chunk", [1, 37, 10_000])
def test_grid_search_does_not_depend_on_the_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    Wt, a = weight(50, 24).T.contiguous(), second_moment(24).diagonal()
    expected = search_grid(Wt, bits=3, group_size=6, symmetric=False, importance=a)
    monkeypatch.setattr("curvprune.compression.grids.CHUNK", chunk)
    found = search_grid(Wt, bits=3, group_size=6, symmetric=False, importance=a)
    assert torch.equal(found[0], expected[0])
    assert found[1] is not None and expected[1] is not None and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_degenerate_groups(dtype: torch.dtype, with_inputs: bool) -> None:
    W = weight(8, 20, dtype=dtype)
    W[0] = 0
    W[1, 5:10] = 0
    W[2] = 0.25
    W[3] = -0.25
    W[4], W[4, 7] = 1e-4, 50.0
    W[5] = 2e-7  # below the smallest float16 for most grids
    W[6] *= 1e8
    A = second_moment(20, dtype=dtype) if with_inputs else None
    options: list[Option] = [
        Quantize(bits=b, group_size=g, symmetric=s)
        for b, g, s in itertools.product((2, 4, 8), (5, None), (True, False))
    ]
    for s in solve(W, options, A, layer="x"):
        q = quantizer_of(s.option)
        assert q is not None and s.scale is not None and s.codes is not None
        assert (
            bool(s.weight.isfinite().all())
            and bool(s.scale.isfinite().all())
            and bool((s.scale > 0).all())
        )
        assert bool((s.weight[0] == 0).all())
        if q.group_size == 5:
            assert bool((s.weight[1, 5:10] == 0).all())
        if not with_inputs:
            # A constant is a point of the grid up to the rounding of the scale.
            torch.testing.assert_close(s.weight[2:4], W[2:4], rtol=2**-10, atol=0)
            assert abs(float(s.weight[4, 7]) - 50) < 50 / 4
            assert float((s.weight[5] - W[5]).abs().max()) <= MIN_SCALE / 2
            assert float(s.weight[6].abs().max()) >= 65504, "saturates at the largest scale"
        low, high = code_range(q.bits)
        assert low <= int(s.codes.min()) and int(s.codes.max()) <= high
        if s.zero is not None:
            assert low <= int(s.zero.min()) and int(s.zero.max()) <= high


def test_damping_grows_on_a_singular_second_moment() -> None:
    x = torch.randn(12, generator=torch.Generator().manual_seed(0))
    (s, p) = solve(
        weight(3, 12, dtype=torch.float32),
        [Quantize(bits=4), Prune(sparsity=0.5)],
        torch.outer(x, x),
        layer="mlp.up",
        damping=0.0,
    )
    assert s.damping > 0 and p.damping == s.damping
    assert any("mlp.up" in note and f"{s.damping:g}" in note for note in s.notes)
    assert bool(s.weight.isfinite().all()) and bool(p.weight.isfinite().all())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_are_rounded_to_nearest(damping: float) -> None:
    W, A = weight(5, 20), second_moment(20)
    A[:, [3, 11]] = 0
    A[[3, 11]] = 0
    s, p = solve(
        W, [Quantize(bits=4, group_size=5), Prune(sparsity=0.1)], A, layer="x", damping=damping
    )
    assert s.damping == damping and s.notes == ()
    for j in (3, 11):
        assert torch.equal(s.weight[:, j], nearest(s, j, W[:, j]))
    left = torch.where(p.weight[:, [3, 11]] == 0, 0.0, W[:, [3, 11]])
    torch.testing.assert_close(p.weight[:, [3, 11]], left, rtol=1e-12, atol=0)


BAD = [
    (lambda W, A: (W, [Quantize(bits=4)], torch.zeros_like(A)), "layer mlp.up.*received no inputs"),
    (
        lambda W, A: (W, [Quantize(bits=4)], A * math.nan),
        "layer mlp.up.*NaN or infinite.*calibrate",
    ),
    (lambda W, A: (W, [Quantize(bits=4)], A[:4, :4]), r"layer mlp.up.*12 inputs.*\(4, 4\)"),
    (
        lambda W, A: (W, [Quantize(bits=4)], -A),
        "layer mlp.up.*not positive definite.*more or other data.*leave",
    ),
    (lambda W, A: (W / 0, [Quantize(bits=4)], A), "layer mlp.up.*weight holds NaN"),
    (lambda W, A: (W[0], [Quantize(bits=4)], A), r"layer mlp.up.*\(out, in\).*\(12,\)"),
    (lambda W, A: (W, [Prune(pattern="2:5")], A), "layer mlp.up.*multiple of 5"),
    (
        lambda W, A: (W * 1e8, [Cast(dtype="float16")], A),
        "layer mlp.up.*overflow float16.*bfloat16",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_errors_name_the_layer_and_a_remedy(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    W, options, A = arguments(weight(3, 12), second_moment(12))
    with pytest.raises(ValueError, match=message):
        solve(W, options, A, layer="mlp.up")


def test_negative_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="layer x: damping=-1"):
        solve(weight(3, 12), [Keep()], None, layer="x", damping=-1)


@pytest.mark.parametrize(
    "option", [*QUANTIZERS, Quantize(bits=7, group_size=8), PRUNERS[4], PRUNERS[5]]
)
def test_compressed_tensors_reads_the_same_weight(option: Quantize | PruneQuantize) -> None:
    W, A = weight(6, 40, dtype=torch.float32), second_moment(40, dtype=torch.float32)
    (s,) = solve(W, [option], A, layer="x")
    q = quantizer_of(option)
    assert q is not None and s.codes is not None and s.scale is not None
    packed = pack_to_int32(s.codes, q.bits)
    codes = unpack_from_int32(packed, q.bits, s.codes.shape)
    zero = None
    if s.zero is not None:
        zero = unpack_from_int32(
            pack_to_int32(s.zero, q.bits, packed_dim=0), q.bits, s.zero.shape, packed_dim=0
        )
    args = QuantizationArgs(
        num_bits=q.bits,
        type="int",
        symmetric=q.symmetric,
        strategy="channel" if q.group_size is None else "group",
        group_size=q.group_size,
    )
    assert torch.equal(peer_dequantize(codes, s.scale.float(), zero, args), s.weight)
    assert torch.equal(dequantize(s.codes, s.scale, s.zero, q.group_size), s.weight)
    # Stored values are grid points: rounding them again changes nothing.
    assert torch.equal(
        quantize_to_grid(s.weight, s.scale, s.zero, bits=q.bits, group_size=q.group_size), s.codes
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    W, A = weight(6, 40, dtype=dtype), second_moment(40, dtype=torch.float32)
    options: list[Option] = [
        Keep(),
        Cast(dtype="bfloat16"),
        Quantize(bits=8, group_size=10, symmetric=False),
        Prune(sparsity=0.1),
    ]
    keep, cast, rounded, pruned = solve(W, options, A, layer="x")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(s.weight.dtype == compute for s in (keep, cast, rounded, pruned))
    assert torch.equal(keep.weight, W.to(compute))
    assert torch.equal(cast.weight, W.to(torch.bfloat16).to(compute))
    assert torch.equal(pruned.weight, pruned.weight.to(dtype).to(compute)), (
        "stored in the dtype of W"
    )
    assert output_error(rounded.weight, W, A) < 1e-3 * output_error(torch.zeros_like(W), W, A)
    assert rounded.scale is not None and rounded.scale.dtype == (
        dtype if dtype == torch.bfloat16 else torch.float16
    )


def test_options_and_chunks_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    W, A = weight(9, 140), second_moment(140)
    options: list[Option] = [
        Keep(),
        PRUNERS[0],
        QUANTIZERS[0],
        PRUNERS[2],
        QUANTIZERS[3],
        PRUNERS[4],
        PRUNERS[5],
        QUANTIZERS[1],
        *UNEVEN,
    ]
    before = W.clone(), A.clone(), torch.get_rng_state()
    together = solve(W, options, A, layer="x")
    monkeypatch.setattr(solve_room, "STACKED_ROWS", 7)
    chunked = solve(W, options, A, layer="x")
    for option, s, c in zip(options, together, chunked, strict=True):
        (alone,) = solve(W, [option], A, layer="x")
        assert s.option is option
        torch.testing.assert_close(s.weight, alone.weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(s.weight, c.weight, rtol=1e-9, atol=1e-12)
    assert (
        torch.equal(W, before[0])
        and torch.equal(A, before[1])
        and torch.equal(torch.get_rng_state(), before[2])
    )


def test_without_inputs_rounds_to_nearest_and_prunes_by_magnitude() -> None:
    W = weight(6, 20)
    rounded, pruned, both = solve(
        W, [QUANTIZERS[0], Prune(sparsity=0.4), PRUNERS[4]], None, layer="x"
    )
    uneven = solve(W, UNEVEN, None, layer="x")
    for j in range(20):
        for s in (rounded, *uneven):
            torch.testing.assert_close(s.weight[:, j], nearest(s, j, W[:, j]), rtol=0, atol=0)
        torch.testing.assert_close(
            both.weight[:, j],
            torch.where(both.weight[:, j] == 0, 0.0, nearest(both, j, W[:, j])),
            rtol=0,
            atol=0,
        )
    cut = W.abs().flatten().sort().values[round(0.4 * W.numel())]
    assert torch.equal(pruned.weight, torch.where(W.abs() >= cut, W, 0.0))
    assert bool(
        (both.weight[W.abs() < W.abs().flatten().sort().values[round(0.6 * W.numel())]] == 0).all()
    )
    assert rounded.damping == 0


@pytest.mark.parametrize("option", [*QUANTIZERS, *UNEVEN])
def test_compensation_beats_rounding_on_correlated_inputs(option: Quantize) -> None:
    W, A = weight(16, 140, dtype=torch.float32), second_moment(140, dtype=torch.float32)
    (s,) = solve(W, [option], A, layer="x")
    assert s.scale is not None
    codes = quantize_to_grid(W, s.scale, s.zero, bits=option.bits, group_size=option.group_size)
    plain = dequantize(codes, s.scale, s.zero, option.group_size)
    assert output_error(s.weight, W, A) < 0.7 * output_error(plain, W, A)


def test_the_drift_moves_the_target_towards_what_undoes_it():
    """At 8 bits rounding is nearly exact, so what comes out is the moved weight: DRIFT of the way
    to the solution of ``min E|V x - W x~|^2 + ridge |V - W|^2``, found here as least squares on the
    inputs themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    original = x @ (torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)).double() + 0.1
    W = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    A, D = x.T @ x / 400, (original - x).T @ x / 400
    ridge = (RIDGE * float(A.diagonal().mean()) * 400) ** 0.5 * torch.eye(12, dtype=torch.float64)
    best = torch.linalg.lstsq(
        torch.cat([x, ridge]), torch.cat([original @ W.T, ridge @ W.T])
    ).solution.T
    options = [Quantize(bits=8, group_size=4), Prune(sparsity=0.5), Keep()]
    moved = solve(W, options, A, layer="a", damping=1e-9, drift=D)
    target = W + DRIFT * (best - W)
    assert (
        float((moved[0].weight - target).abs().max())
        < 0.02
        < float((moved[0].weight - W).abs().max())
    )
    assert torch.equal(moved[2].weight, W)
    # Pruning with the drift comes closer to the original outputs than without.
    still = solve(W, options, A, layer="a", damping=1e-9)
    errors = [float((x @ s[1].weight.T - original @ W.T).square().sum()) for s in (moved, still)]
    assert errors[0] < errors[1]
