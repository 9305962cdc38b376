"""Pruning against least squares, all supports of small problems, and SparseGPT."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from curvprune.compression import prune_weight, solve
from curvprune.options import Prune, pruner_of
from tests.matrices import (
    DAMPING,
    PRUNERS,
    damped,
    nearest,
    output_error,
    second_moment,
    weight,
)


def least_squares(W: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """The best weights on a support, row by row, in closed form."""
    result = torch.zeros_like(W)
    for row, kept in enumerate(keep):
        s = kept.nonzero()[:, 0]
        result[row, s] = torch.linalg.solve(H[s][:, s], (H @ W[row])[s])
    return result


def test_pruning_one_weight_is_the_surgeons_solution() -> None:
    W, H = weight(1, 10), damped(second_moment(10))
    p = int(H.diagonal().argmax())
    W[0, p] = 1e-3
    found = prune_weight(W.T.contiguous(), H, Prune(sparsity=0.1), refits=20).T
    rest = [j for j in range(10) if j != p]
    expected = W.clone()
    expected[0, p] = 0
    expected[0, rest] += torch.linalg.solve(H[rest][:, rest], H[rest, p]) * W[0, p]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "option", [Prune(sparsity=0.5), Prune(sparsity=0.7), Prune(pattern="2:4"), Prune(pattern="3:5")]
)
def test_the_refit_is_least_squares_on_the_support(option: Prune) -> None:
    W, A = weight(6, 20), second_moment(20)
    H = damped(A)
    (rough,) = solve(W, [option], A, layer="x", damping=DAMPING)
    best = least_squares(W, H, rough.weight != 0)
    assert output_error(rough.weight, W, H) < 1.1 * output_error(best, W, H)
    fine = prune_weight(W.T.contiguous(), H, option, refits=60).T
    torch.testing.assert_close(fine, best, rtol=1e-8, atol=1e-10)


def sparse_gpt(W: Tensor, H: Tensor, prune: Prune) -> Tensor:
    """SparseGPT with the mask of one block of all columns or of each group (float64)."""
    W, width = W.clone(), len(H)
    inverse = torch.linalg.inv(H)
    pivots = torch.linalg.cholesky(inverse, upper=True).diagonal().square()
    gone = torch.zeros(W.shape, dtype=torch.bool)
    for j in range(width):
        if prune.sparsity is not None and j == 0:
            ranked = (W**2 / pivots).flatten().argsort()
            gone.view(-1)[ranked[: round(prune.sparsity * W.numel())]] = True
        if prune.nm is not None and j % prune.nm[1] == 0:
            group = slice(j, j + prune.nm[1])
            ranked = (W[:, group] ** 2 / pivots[group]).argsort(dim=1)
            smallest = ranked[:, : prune.nm[1] - prune.nm[0]]
            gone[:, group] = gone[:, group].scatter(1, smallest, True)
        change = torch.where(gone[:, j], W[:, j], 0.0) / inverse[j, j]
        W[:, j:] -= change[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return torch.where(gone, 0.0, W)


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
    """A layer large enough for thresholds from a sample of 2^15 weights.

    float32 takes its steps in bfloat16.
    """
    W, A = weight(256, 400), second_moment(400)
    assert W.numel() > 3 * 2**15
    for option in (Prune(sparsity=0.6), Prune(pattern="2:4")):
        (wide,) = solve(W, [option], A, layer="x", damping=DAMPING)
        (narrow,) = solve(W.float(), [option], A.float(), layer="x", damping=DAMPING)
        zeros = round(W.numel() * (option.sparsity or 0.5))
        assert int((wide.weight == 0).sum()) == int((narrow.weight == 0).sum()) == zeros
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
