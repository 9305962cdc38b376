"""Shares of a spectrum and errors over items: within two errors of dense eigenvalues, bounds by
linear programming, brute force over items, and points whose kind is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn

import curvprune as cp
from curvprune.curvature import Dense, Moments
from curvprune.model import Classification, LabelFree
from tests.dense_curvature import dense
from tests.networks import mlp, seeded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------- shares


def bulk(n: int = 484) -> np.ndarray:
    """A dense bulk around zero and some outliers, as networks have it."""
    rng = np.random.default_rng(0)
    middle = rng.standard_normal(n - 24) ** 3 * 0.02 + 0.002
    return np.sort(np.r_[middle, np.linspace(0.2, 1, 24)])


@pytest.mark.parametrize(("runs", "steps"), [(5, 40), (2, 60)])
def test_shares_hold_the_truth_within_two_errors(runs: int, steps: int) -> None:
    spectrum = bulk()
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((484, 484)))[0]
    op = Dense(torch.from_numpy((q * spectrum) @ q.T))
    size = np.abs(spectrum).sum()
    ranges = [(-math.inf, -1e-3), (-1e-3, 1e-3), (-math.inf, 0.004), (0.1, math.inf)]
    truth = [float(((spectrum >= a) & (spectrum <= b)).mean()) for a, b in ranges]
    truth.append(size**2 / (spectrum**2).sum())
    truth.append(spectrum.sum())
    inside = np.zeros(len(truth), dtype=int)
    for seed in range(12):
        found = cp.density(op, runs=runs, steps=steps, generator=generator(seed))
        estimates = [found.mass(a, b) for a, b in ranges]
        estimates += [found.effective_rank(484), found.trace(484)]
        errors = np.array([e.value for e in estimates]) - truth
        inside += np.abs(errors) <= 2 * np.array([e.stderr for e in estimates])
        assert all(e.converged == (e.stderr <= 0.02) for e in estimates[:4])
        assert not estimates[5].converged
    # 90 % in all, and none of the quantities alone is left behind.
    assert inside.sum() >= 0.9 * 12 * len(truth) and inside.min() >= 10


def extremes(f: np.ndarray, grid: np.ndarray, moments: np.ndarray, degree: int) -> list[float]:
    """The least and the most of ``∫ f`` over measures on the grid with these moments."""
    # Chebyshev polynomials, because powers are nearly dependent.
    rows = np.polynomial.chebyshev.chebvander(grid, degree).T
    found = []
    for sign in (1, -1):
        result = linprog(sign * f, A_eq=rows, b_eq=moments, bounds=(0, None), method="highs")
        assert result.status == 0
        found.append(sign * result.fun)
    return found


def test_bounds_are_the_best_that_the_moments_allow() -> None:
    """Against linear programs over all measures on a fine grid."""
    # A rule's node may lie far out.
    near = np.linspace(-1.5, 1.5, 3001)
    far = np.geomspace(1.5, 40, 300)
    k, grid = 4, np.r_[-far[::-1], near, far]
    atoms, mass = np.array([-0.9, -0.5, -0.1, 0.0, 0.2, 0.3, 0.7, 1.0]), np.full(8, 1 / 8)
    op = Dense(torch.from_numpy(np.diag(atoms)))
    start = torch.from_numpy(np.sqrt(mass))
    # The Gauss rule of k steps from that start, by its definition.
    krylov = [start]
    for _ in range(k - 1):
        krylov.append(op @ krylov[-1])
    basis = torch.linalg.qr(torch.stack(krylov, 1))[0]
    nodes, vectors = np.linalg.eigh((basis.mT @ op.matrix @ basis).numpy())
    bounds = Moments(nodes, (vectors.T @ (basis.mT @ start).numpy()) ** 2, complete=False)
    moments = mass @ np.polynomial.chebyshev.chebvander(atoms, 2 * k - 2)
    for t in (-0.6, -0.25, 0.05, 0.4):
        low, _ = extremes((grid < t - 1e-9) * 1.0, grid, moments, 2 * k - 2)
        _, high = extremes((grid <= t + 1e-9) * 1.0, grid, moments, 2 * k - 2)
        found = bounds.up_to(t)
        assert found.low == pytest.approx(low, abs=2e-3) and found.low <= mass[atoms < t].sum()
        assert found.high == pytest.approx(high, abs=2e-3) and found.high >= mass[atoms < t].sum()
    low, high = extremes(np.abs(grid), grid, moments, 2 * k - 2)
    size = bounds.mean_size()
    assert size.low == pytest.approx(low, abs=2e-3) and size.high == pytest.approx(high, abs=2e-3)


# -------------------------------------------------------------------------------- errors over items


def items(n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 4, generator=generator(3), dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator(4))


def test_errors_over_items_are_those_of_brute_force() -> None:
    """32 items are 32 parts: against the dense Hessian of every item."""
    model, (x, y) = mlp(), items()
    analysis = cp.analyze(model, [(x, y)], quantities=["density"], max_products=64)
    names = [n for n, _ in model.named_parameters()]

    each = []
    for i in range(32):
        one = [(x[i : i + 1], y[i : i + 1])]
        each.append(dense(model, one, Classification(), "hessian", names).detach())
    hessians = torch.stack(each)
    halves = [torch.linalg.eigh(hessians[side::2].mean(0))[1] for side in (0, 1)]
    values, vectors = torch.linalg.eigh(hessians.mean(0))
    for column, end in ((-1, analysis.model.highest), (0, analysis.model.lowest)):
        v = vectors[:, column]
        own = torch.einsum("i,nij,j->n", v, hessians, v)
        crossed = torch.zeros(32, dtype=torch.float64)
        for side in (0, 1):
            other = halves[1 - side][:, column]
            crossed[side::2] = torch.einsum("i,nij,j->n", other, hessians[side::2], other)
        assert end.held_out == pytest.approx(float(crossed.mean()), rel=2e-2)
        assert end.held_out_error == pytest.approx(float(crossed.std()) / math.sqrt(32), rel=2e-2)
        fit = float(own.mean() - crossed.mean()) / 3
        expected = math.hypot(float(own.std()) / math.sqrt(32), fit)
        assert end.over_items == pytest.approx(expected, rel=2e-2)
    assert analysis.diagnosis.lambda_max_over_items == analysis.model.highest.over_items
    assert analysis.model.trace.value == pytest.approx(float(values.sum()))
    # The trace's error over items: that of the items' own traces.
    traces = hessians.diagonal(dim1=1, dim2=2).sum(1)
    spread = float(traces.std()) / math.sqrt(32)
    assert analysis.model.trace.over_items == pytest.approx(spread, rel=0.15)


def test_the_gradient_s_noise_is_that_of_the_items() -> None:
    model, (x, y) = mlp(), items()
    analysis = cp.analyze(model, [(x, y)], quantities=["density"], max_products=16)
    each = []
    for i in range(32):
        model.zero_grad()
        nn.functional.cross_entropy(model.eval()(x[i : i + 1]), y[i : i + 1]).backward()
        each.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    folds = torch.stack(each).view(4, 8, -1).mean(0)  # every eighth item
    expected = math.sqrt(float(folds.var(0).sum()) / 8)
    assert analysis.model.gradient_noise.size == pytest.approx(expected, rel=1e-9)
    assert analysis.to_dict()["diagnosis"]["gradient_noise"] == pytest.approx(expected, rel=1e-9)


def at_zero(x: torch.Tensor, y: torch.Tensor, *, matrix: str = "hessian") -> cp.Analysis:
    """Two linear layers of zeros: no gradient, and a Hessian with eigenvalues ±σ of the sample's
    correlation of inputs and labels."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return cp.analyze(model, [(x, y)], quantities=["density"], matrix=matrix, max_products=32)


def test_a_saddle_that_only_the_items_noise_makes_is_not_called_one() -> None:
    """Labels without any relation to the inputs: in the population the point is level."""
    kinds = []
    for seed in range(8):
        x = torch.randn(64, 4, generator=generator(seed), dtype=torch.float64)
        y = torch.randint(0, 3, (64,), generator=generator(100 + seed))
        diagnosis = at_zero(x, y).diagnosis
        kinds.append(diagnosis.kind)
        # By a share of the largest, each of them is a saddle.
        assert diagnosis.lambda_min == pytest.approx(-diagnosis.lambda_max)
        assert diagnosis.gradient_norm < 1e-12
    assert kinds.count("flat") >= 7


def test_a_saddle_of_the_population_is_called_one() -> None:
    x = torch.randn(64, 4, generator=generator(1), dtype=torch.float64)
    found = at_zero(x, x[:, :3].argmax(1))
    assert found.diagnosis.kind == "saddle"
    assert found.model.lowest.held_out + 2 * found.model.lowest.held_out_error < 0
    assert "a saddle" in " ".join(found.diagnosis.text)
    assert at_zero(x, x[:, :3].argmax(1), matrix="ggn").diagnosis.kind is None


def test_a_point_with_a_gradient_is_neither() -> None:
    x = torch.randn(64, 4, generator=generator(1), dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    diagnosis = cp.analyze(model, [(x, x[:, :3].argmax(1))], quantities=["density"]).diagnosis
    assert diagnosis.kind == "not stationary"
    assert diagnosis.gradient_norm > diagnosis.gradient_noise
    few = cp.analyze(model, [(x[:3], x[:3, :3].argmax(1))], quantities=["density"]).diagnosis
    assert few.kind is None and "too few items" in " ".join(few.text)


def test_a_loss_that_couples_items_has_no_errors_over_them() -> None:
    """Similarities within a batch: half of its items have another loss."""
    model = seeded(lambda: nn.Linear(4, 3).double())

    def similar(output: torch.Tensor, batch: object) -> torch.Tensor:
        # With a class that no item is, because a softmax over one says nothing.
        return nn.functional.pad(3 * output @ output.mT, (0, 1))

    loss = LabelFree(model, of=similar)
    changed = seeded(lambda: nn.Linear(4, 3).double())
    with torch.no_grad():
        changed.weight.add_(0.3)
    analysis = cp.analyze(changed, [items()], objective=loss, quantities=["density"], layers="*")
    assert analysis.model.highest is None and analysis.diagnosis.lambda_max_over_items is None
    assert any("not the mean of its items' losses" in note for note in analysis.notes)


# ------------------------------------------------------------------------------------------ a flag


def test_the_model_s_trace_says_whether_it_met_the_tolerance() -> None:
    """With more parameters than are computed one by one."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 150), nn.Tanh(), nn.Linear(150, 3)).double())
    data = [items()]
    loose, tight = (
        cp.analyze(model, data, quantities=["density"], rtol=rtol, max_products=16)
        for rtol in (10.0, 1e-3)
    )
    assert loose.model.trace.converged and not tight.model.trace.converged
    assert loose.to_dict()["model"]["trace"]["converged"] is True
    assert any("the whole model's trace" in note for note in tight.notes)
    assert not any("the whole model's trace" in note for note in loose.notes)
    names = [n for n, _ in model.named_parameters()]

    truth = float(dense(model, data, Classification(), "hessian", names).detach().trace())
    assert abs(tight.model.trace.value - truth) < 3 * tight.model.trace.stderr
    fisher = cp.analyze(model, data, matrix="fisher", quantities=["trace"], rtol=1e-3)
    assert not any(layer.trace.converged for layer in fisher.layers.values())
