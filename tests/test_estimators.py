"""Estimators on dense matrices whose spectrum is known: values, error bars, convergence flags,
seeds."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from curvprune.curvature import (
    Dense,
    Diagonal,
    EigenPairs,
    Estimate,
    Function,
    Lanczos,
    Lobpcg,
    ParamSpace,
    density,
    diagonal,
    eigenpairs,
    trace,
)

N = 80
SPECTRA = {
    "fast decay": 0.7 ** np.arange(N),
    "slow decay": 1 / np.arange(1, N + 1) ** 1.5,
    "flat": 1 + np.random.default_rng(1).random(N),
    "negative end larger": np.r_[-10, -3, np.linspace(-1, 5, N - 2)],
    "repeated": np.r_[5.0, 5, 5, 4, 3, np.ones(N - 5)],
    "low rank": np.r_[5.0, 4, 3, 2, 1, np.zeros(N - 5)],
    "zero": np.zeros(N),
}
TRACE = ["hutchinson", "hutch++", "xtrace"]
DIAGONAL = ["hutchinson", "xdiag"]
EIGEN = {"lanczos": Lanczos(), "lobpcg": Lobpcg()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(spectrum: np.ndarray, dtype: torch.dtype = torch.float64) -> Dense:
    n = len(spectrum)
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    matrix = (q * spectrum) @ q.T
    return Dense(torch.from_numpy((matrix + matrix.T) / 2).to(dtype))


class Counting(Function):
    """The matrix, with a count of its products and no closed form."""

    def __init__(self, op: Dense) -> None:
        super().__init__(self.multiply, op.space, measure=op.measure, dtype=op.dtype)
        self.matrix, self.products = op.matrix, 0

    def multiply(self, v: torch.Tensor) -> torch.Tensor:
        self.products += v.shape[1]
        return self.matrix @ v


def ends(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    rising = np.sort(spectrum)
    return {
        "LA": rising[::-1][:k],
        "SA": rising[:k],
        "BE": np.r_[rising[::-1][:k], rising[:k]],
        "LM": rising[np.argsort(-np.abs(rising), kind="stable")][:k],
        "SM": rising[np.argsort(np.abs(rising), kind="stable")][:k],
    }[which]


# -------------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", TRACE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_trace_is_within_its_error_bar(method: str, name: str, dtype: torch.dtype) -> None:
    op, truth = Counting(dense(SPECTRA[name], dtype)), SPECTRA[name].sum()
    result = trace(op, method=method, rtol=0.05, max_products=70, generator=seeded())
    assert result.num_products == op.products <= 70
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert abs(result.value - truth) <= 4 * result.stderr + rounding * np.abs(SPECTRA[name]).sum()
    if result.converged:
        assert result.stderr <= 0.05 * abs(result.value)
        assert result.num_items >= 8


@pytest.mark.parametrize("method", TRACE)
@pytest.mark.parametrize("name", ["slow decay", "negative end larger"])
def test_the_trace_is_unbiased_and_its_error_bar_calibrated(method: str, name: str) -> None:
    op, truth, seeds = dense(SPECTRA[name]), SPECTRA[name].sum(), 120
    results = [
        trace(op, method=method, rtol=1e-12, max_products=60, generator=seeded(s))
        for s in range(seeds)
    ]
    values = np.array([r.value for r in results])
    stderr = np.array([r.stderr for r in results])
    assert not any(r.converged for r in results)
    assert abs(values.mean() - truth) <= 4 * values.std() / math.sqrt(seeds)
    # Leave-one-out estimates share most of their sketch: XTrace's error bar is too small by up to a
    # third, which its docstring says and this holds it to.
    coverage, ratio = (0.8, 0.6) if method == "xtrace" else (0.92, 0.85)
    covered = int((np.abs(values - truth) <= 2 * stderr).sum())
    assert covered >= binom.ppf(0.001, seeds, coverage)
    assert ratio < math.sqrt((stderr**2).mean()) / values.std() < 1.2


def left_out(omega: np.ndarray, a: np.ndarray) -> list[np.ndarray]:
    """Orthonormal bases of A Ω without each of its columns."""
    return [np.linalg.qr(a @ np.delete(omega, i, 1))[0] for i in range(omega.shape[1])]


@pytest.mark.parametrize("name", ["slow decay", "negative end larger"])
def test_xtrace_and_xdiag_are_their_definitions(name: str) -> None:
    """The fast formulas against leave-one-out by brute force, for one round of 8 columns."""
    op, m = dense(SPECTRA[name]), 8
    a, eye = op.matrix.numpy(), np.eye(N)
    generator = seeded(4)
    omega = np.stack([torch.randn(N, generator=generator).double().numpy() for _ in range(m)], 1)
    samples = []
    for i, q in enumerate(left_out(omega, a)):
        v = (eye - q @ q.T) @ omega[:, i]
        samples.append(np.trace(q.T @ a @ q) + (N - m + 1) * (v @ a @ v) / (v @ v))
    found = trace(op, method="xtrace", rtol=1e-12, max_products=16, generator=seeded(4))
    assert found.value == pytest.approx(np.mean(samples), rel=1e-10)
    assert found.stderr == pytest.approx(np.std(samples, ddof=1) / math.sqrt(m), rel=1e-8)

    generator = seeded(4)
    drawn = [
        torch.randint(0, 256, (N // 8,), dtype=torch.uint8, generator=generator).numpy()
        for _ in range(m)
    ]
    signs = np.stack([np.unpackbits(d, bitorder="little") * 2.0 - 1 for d in drawn], 1)
    entries = []
    for i, q in enumerate(left_out(signs, a)):
        entries.append(np.diag(q @ q.T @ a) + signs[:, i] * ((eye - q @ q.T) @ a @ signs[:, i]))
    result = diagonal(op, method="xdiag", rtol=1e-12, max_products=16, generator=seeded(4))
    np.testing.assert_allclose(result.values.numpy(), np.mean(entries, 0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        result.stderr.numpy(), np.std(entries, 0, ddof=1) / math.sqrt(m), rtol=1e-7
    )


def test_hutchinson_is_exact_on_a_diagonal() -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(301))
    result = trace(Diagonal(values), method="hutchinson", generator=seeded())
    assert result.stderr == 0 and result.converged and result.num_products == 8
    assert result.value == pytest.approx(float(values.sum()), abs=1e-12)
    found = diagonal(Diagonal(values), generator=seeded())
    assert torch.equal(found.values, values) and not found.stderr.any()


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_sketches_are_exact_once_they_hold_the_range(method: str) -> None:
    result = trace(dense(SPECTRA["low rank"]), method=method, generator=seeded())
    assert result.value == pytest.approx(15, abs=1e-10)
    assert result.stderr < 1e-10 and result.converged and result.num_products <= 24


def test_sketches_need_far_fewer_products_on_fast_decay() -> None:
    op, truth = dense(SPECTRA["fast decay"]), SPECTRA["fast decay"].sum()
    error = {}
    for method in TRACE:
        found = [
            trace(op, method=method, rtol=1e-12, max_products=48, generator=seeded(s)).value
            for s in range(6)
        ]
        error[method] = np.abs(np.array(found) - truth).mean()
    assert error["hutch++"] < 0.1 * error["hutchinson"]
    assert error["xtrace"] < 0.1 * error["hutchinson"]


@pytest.mark.parametrize("method", TRACE)
def test_the_trace_is_read_off_where_that_is_cheaper(method: str) -> None:
    tiny = trace(dense(np.array([2.0, -2.0, 3.0])), method=method, generator=seeded())
    exact = Estimate(value=tiny.value, stderr=0.0, num_items=0, num_products=3, converged=True)
    assert tiny == exact
    assert tiny.value == pytest.approx(3.0)
    single = trace(Dense(torch.tensor([[2.5]])), method=method, generator=seeded())
    assert single.value == 2.5 and single.stderr == 0
    # trace zero: no relative accuracy is ever met by sampling
    op = Counting(dense(np.r_[np.ones(N // 2), -np.ones(N // 2)]))
    exact = trace(op, method=method, rtol=0.01, max_products=1000, generator=seeded())
    assert abs(exact.value) < 1e-10 and exact.stderr == 0 and exact.converged
    assert exact.num_products == op.products < 4 * N


@pytest.mark.parametrize("method", TRACE)
def test_a_trace_says_when_the_products_did_not_suffice(method: str) -> None:
    op = dense(SPECTRA["negative end larger"])
    assert not trace(op, method=method, rtol=0.001, max_products=60, generator=seeded()).converged
    # fewer than 8 samples are never enough, however well they agree
    assert not trace(op, method=method, rtol=10.0, max_products=7, generator=seeded()).converged


# ----------------------------------------------------------------------------------------- diagonal


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", DIAGONAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_diagonal_is_within_its_error_bars(method: str, name: str, dtype: torch.dtype) -> None:
    op = Counting(dense(SPECTRA[name], dtype))
    result = diagonal(op, method=method, rtol=0.1, max_products=70, generator=seeded())
    truth = op.matrix.diagonal()
    assert result.num_products == op.products <= 70
    assert result.values.dtype == result.stderr.dtype == dtype
    norm = torch.linalg.vector_norm
    assert norm(result.values - truth) <= 2 * norm(result.stderr) + 1e-4 * norm(truth)
    if result.converged:
        assert norm(result.stderr) <= 0.1 * norm(result.values)


@pytest.mark.parametrize("method", DIAGONAL)
def test_the_diagonal_is_unbiased_and_its_error_bars_calibrated(method: str) -> None:
    op, seeds = dense(SPECTRA["slow decay"]), 80
    truth = op.matrix.diagonal()
    runs = [
        diagonal(op, method=method, rtol=1e-12, max_products=48, generator=seeded(s))
        for s in range(seeds)
    ]
    values, stderr = torch.stack([r.values for r in runs]), torch.stack([r.stderr for r in runs])
    z = (values.mean(0) - truth) / (values.std(0) / math.sqrt(seeds))
    assert float(z.abs().max()) < 4.5 and float((z**2).mean()) < 1.6
    assert 0.7 < float((stderr**2).mean().sqrt() / values.var(0).mean().sqrt()) < 1.5
    assert not any(r.converged for r in runs)


def test_xdiag_beats_hutchinson_on_fast_decay_and_both_read_off_a_small_diagonal() -> None:
    op = dense(SPECTRA["fast decay"])
    truth = op.matrix.diagonal()
    error = {}
    for method in DIAGONAL:
        found = diagonal(op, method=method, rtol=1e-9, max_products=60, generator=seeded())
        error[method] = float((found.values - truth).norm())
    assert error["xdiag"] < 0.05 * error["hutchinson"]
    for method in DIAGONAL:
        small = dense(np.array([1.0, -4.0, 2.0, 0.5]))
        result = diagonal(small, method=method, generator=seeded())
        assert torch.allclose(result.values, small.matrix.diagonal()) and result.num_products == 4


# --------------------------------------------------------------------------------------- eigenpairs


def check_pairs(
    op: Dense, spectrum: np.ndarray, pairs: EigenPairs, k: int, which: str, atol: float
) -> None:
    truth = ends(spectrum, k, which)
    if which == "LM":  # equal magnitudes come in any order
        np.testing.assert_allclose(np.abs(pairs.values.numpy()), np.abs(truth), atol=atol)
    else:
        np.testing.assert_allclose(pairs.values.numpy(), truth, atol=atol)
    v = pairs.vectors
    assert float((v.mT @ v - torch.eye(v.shape[1], dtype=v.dtype)).abs().max()) < 1e-4
    actual = torch.linalg.vector_norm(op.matrix @ v - v * pairs.values, dim=0)
    scale = max(float(np.abs(spectrum).max()), 1.0) * (1e-9 if v.dtype == torch.float64 else 1e-5)
    assert float((actual - pairs.residuals).abs().max()) < scale


@pytest.mark.parametrize("name", ["flat", "negative end larger", "repeated", "low rank", "zero"])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("method", EIGEN)
def test_eigenpairs_at_either_end(method: str, which: str, name: str) -> None:
    spectrum = SPECTRA[name]
    op = dense(spectrum)
    for k in (1, 4):
        counting = Counting(op)
        pairs = eigenpairs(
            counting,
            k,
            which=which,
            method=EIGEN[method],
            tol=1e-6,
            max_products=600,
            generator=seeded(),
        )
        assert pairs.converged and pairs.num_products == counting.products
        check_pairs(op, spectrum, pairs, k, which, atol=1e-4)


@pytest.mark.parametrize("method", EIGEN)
def test_float32_eigenpairs(method: str) -> None:
    op = dense(SPECTRA["negative end larger"], torch.float32)
    pairs = eigenpairs(op, 2, which="BE", method=EIGEN[method], tol=1e-4, generator=seeded())
    assert pairs.values.dtype == torch.float32 and pairs.converged
    check_pairs(op, SPECTRA["negative end larger"], pairs, 2, "BE", atol=2e-3)


@pytest.mark.parametrize("method", EIGEN)
def test_the_first_eigenvalue_comes_once(method: str) -> None:
    spectrum = np.r_[100.0, np.linspace(1, 2, N - 1)]
    pairs = eigenpairs(
        dense(spectrum), 2, which="LA", method=EIGEN[method], tol=1e-3, generator=seeded()
    )
    np.testing.assert_allclose(pairs.values.numpy(), [100, 2], rtol=5e-3)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("method", EIGEN)
def test_all_eigenpairs_of_a_small_matrix(method: str, k: int) -> None:
    spectrum = np.array([3.0, 3.0, -1.0, 0.0, 2.0])[:k]
    pairs = eigenpairs(
        dense(spectrum), k, which="LA", method=EIGEN[method], tol=1e-10, generator=seeded()
    )
    np.testing.assert_allclose(pairs.values.numpy(), np.sort(spectrum)[::-1], atol=1e-10)
    assert pairs.converged and pairs.num_products == k


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("name", ["negative end larger", "flat", "low rank", "repeated"])
def test_thick_restart_finds_what_an_unrestarted_run_finds(name: str, which: str) -> None:
    spectrum = SPECTRA[name]
    op = dense(spectrum)
    whole = eigenpairs(op, 3, which=which, tol=1e-6, max_products=600, generator=seeded())
    parts = eigenpairs(
        op,
        3,
        which=which,
        method=Lanczos(max_basis=12),
        tol=1e-6,
        max_products=600,
        generator=seeded(),
    )
    assert whole.converged and parts.converged
    np.testing.assert_allclose(parts.values.numpy(), whole.values.numpy(), atol=1e-4)
    check_pairs(op, spectrum, parts, 3, which, atol=1e-4)


def test_errors_are_honest_at_a_loose_tolerance() -> None:
    for name in ("fast decay", "slow decay", "flat", "negative end larger"):
        truth = ends(SPECTRA[name], 1, "LM")[0]
        for seed in range(10):
            pairs = eigenpairs(dense(SPECTRA[name]), tol=1e-2, generator=seeded(seed))
            assert pairs.converged and pairs.num_products >= 6
            # at the edge of a dense spectrum the gap is itself an estimate: a factor of two
            assert abs(float(pairs.values[0]) - truth) <= 2e-2 * abs(truth)
            nearest = np.abs(SPECTRA[name] - float(pairs.values[0])).min()
            assert nearest <= float(pairs.residuals[0]) + 1e-12


@pytest.mark.parametrize("method", EIGEN)
def test_too_few_products_are_not_called_converged(method: str) -> None:
    pairs = eigenpairs(
        dense(SPECTRA["flat"]),
        3,
        which="SA",
        method=EIGEN[method],
        tol=1e-8,
        max_products=9,
        generator=seeded(),
    )
    assert not pairs.converged and pairs.num_products <= 9 and len(pairs.values) == 3


@pytest.mark.parametrize("method", EIGEN)
def test_a_start_is_used_and_an_eigenvector_of_the_wrong_value_does_not_mislead(
    method: str,
) -> None:
    spectrum = np.r_[7.0, np.linspace(0, 1, N - 1)]
    op = dense(spectrum)
    vectors = torch.linalg.eigh(op.matrix).eigenvectors
    misled = replace(EIGEN[method], start=vectors[:, 3].clone())
    wrong = eigenpairs(op, which="LA", method=misled, tol=1e-6, generator=seeded())
    assert float(wrong.values[0]) == pytest.approx(7, abs=1e-4)
    near = vectors[:, -1] + 1e-6 * torch.randn(N, dtype=torch.float64, generator=seeded(1))
    cold = eigenpairs(op, which="LA", method=EIGEN[method], tol=1e-10, generator=seeded())
    led = replace(EIGEN[method], start=near)
    warm = eigenpairs(op, which="LA", method=led, tol=1e-10, generator=seeded())
    assert float(warm.values[0]) == pytest.approx(7, abs=1e-8)
    assert warm.num_products <= min(8, cold.num_products)


def test_a_nearly_invisible_outlier_is_not_missed() -> None:
    # one eigenvalue of 100 among 20000 ones: a random start sees it with weight 1/20000
    values = torch.ones(20_000, dtype=torch.float64)
    values[17] = 100
    for method in EIGEN.values():
        pairs = eigenpairs(Diagonal(values), method=method, generator=seeded())
        assert float(pairs.values[0]) == pytest.approx(100)


def test_values_nearest_to_zero_are_found_or_not_called_converged() -> None:
    spectrum = SPECTRA["negative end larger"]
    op = dense(spectrum)
    pairs = eigenpairs(op, 3, which="SM", max_products=200, generator=seeded())
    assert pairs.converged and pairs.num_products <= N
    np.testing.assert_allclose(pairs.values, ends(spectrum, 3, "SM"), rtol=1e-2)
    for most in (10, 25, 40):
        early = eigenpairs(op, 3, which="SM", max_products=most, generator=seeded())
        assert not early.converged
        # An eigenvalue lies within each residual.
        for value, residual in zip(early.values, early.residuals, strict=True):
            assert np.abs(spectrum - float(value)).min() <= float(residual) + 1e-12
    # A gap around zero is seen from both of its sides long before the bulk is resolved.
    apart = np.r_[np.linspace(-3, -2, 40), 0.01, -0.02, np.linspace(2, 3, 38)]
    found = eigenpairs(dense(apart), 2, which="SM", generator=seeded())
    assert found.converged and found.num_products < N / 2
    np.testing.assert_allclose(found.values, [0.01, -0.02], rtol=1e-2)
    # Where nothing is negative they are the smallest.
    flat = Dense(dense(SPECTRA["flat"]).matrix, psd=True)
    for method in EIGEN.values():
        low = eigenpairs(flat, 2, which="SM", method=method, generator=seeded())
        np.testing.assert_allclose(low.values, ends(SPECTRA["flat"], 2, "SA"), rtol=1e-2)
    with pytest.raises(ValueError, match="use method=Lanczos"):
        eigenpairs(op, which="SM", method=Lobpcg(), generator=seeded())


# ------------------------------------------------------------------------------------------ density


def test_the_density_has_the_masses_of_the_spectrum() -> None:
    spectrum = np.r_[np.zeros(40), np.linspace(1, 2, 30), np.full(10, -3.0)]
    op = Counting(dense(spectrum))
    result = density(op, runs=20, steps=30, generator=seeded())
    assert result.num_products == op.products <= 600
    for lower, upper in [(-0.1, 0.1), (0.5, 2.5), (-4.0, -2.0)]:
        share = ((spectrum >= lower) & (spectrum <= upper)).mean()
        mass = result.mass(lower, upper)
        assert abs(mass.value - share) <= 4 * mass.stderr
        assert 0 < mass.stderr < 0.05 and mass.num_items == 20
    assert result.mass(-10, 10).value == pytest.approx(1)
    total = result.trace(80)
    assert abs(total.value - spectrum.sum()) <= 4 * total.stderr
    rank, truth = result.effective_rank(80), np.abs(spectrum).sum() ** 2 / (spectrum**2).sum()
    assert abs(rank.value - truth) <= 4 * rank.stderr and rank.stderr < 0.2 * truth
    assert np.trapezoid(result.density.numpy(), result.grid.numpy()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quadrature_is_exact_for_polynomials(dtype: torch.dtype) -> None:
    spectrum = SPECTRA["negative end larger"]
    op = dense(spectrum, dtype)
    result = density(op, runs=1, steps=5, generator=seeded(3))
    v = torch.randn(N, dtype=torch.float32, generator=seeded(3)).to(dtype)
    v = (v / v.norm()).double()
    for power in range(10):  # degree below 2 · steps
        moment = float(v @ torch.linalg.matrix_power(op.matrix.double(), power) @ v)
        found = float((result.weights * result.nodes**power).sum())
        assert found == pytest.approx(moment, rel=1e-9 if dtype == torch.float64 else 1e-3)


def test_a_spectrum_of_few_values_ends_a_run_early() -> None:
    result = density(
        dense(np.r_[np.full(20, 2.0), np.full(60, 5.0)]), runs=4, steps=30, generator=seeded()
    )
    assert result.num_products == 8
    assert result.weights.sum(1).tolist() == pytest.approx([1] * 4)
    assert result.mass(1.9, 2.1).value + result.mass(4.9, 5.1).value == pytest.approx(1)
    zero = density(dense(np.zeros(5)), runs=2, steps=5, generator=seeded())
    assert zero.num_products == 2 and zero.effective_rank(5).value == 0
    assert bool(torch.isfinite(zero.density).all())
    one = density(Dense(torch.tensor([[4.0]])), runs=3, generator=seeded())
    assert one.trace(1) == Estimate(value=4.0, stderr=0.0, num_items=3, num_products=3)


# --------------------------------------------------------------------------------- seeds and errors


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone() -> None:
    op = dense(SPECTRA["slow decay"])
    before = torch.random.get_rng_state()
    for method in TRACE:
        again = [trace(op, method=method, max_products=60, generator=seeded(5)) for _ in range(2)]
        assert again[0] == again[1]
        other = trace(op, method=method, max_products=30, rtol=1e-9, generator=seeded(6))
        assert other.value != again[0].value
    for method in DIAGONAL:
        a, b = (diagonal(op, method=method, max_products=40, generator=seeded(5)) for _ in range(2))
        assert torch.equal(a.values, b.values) and torch.equal(a.stderr, b.stderr)
    for method in EIGEN.values():
        x, y = (eigenpairs(op, 3, method=method, generator=seeded(5)) for _ in range(2))
        assert torch.equal(x.values, y.values) and torch.equal(x.vectors, y.vectors)
    p, q = (density(op, runs=2, steps=10, generator=seeded(5)) for _ in range(2))
    assert torch.equal(p.nodes, q.nodes) and torch.equal(p.density, q.density)
    assert torch.equal(before, torch.random.get_rng_state())


def test_arguments_that_make_no_sense() -> None:
    op = dense(SPECTRA["flat"])
    for estimator in (trace, diagonal):
        with pytest.raises(ValueError, match="rtol must be positive"):
            estimator(op, rtol=0.0, generator=seeded())
        with pytest.raises(ValueError, match="max_products=1 is too small"):
            estimator(op, max_products=1, generator=seeded())
    with pytest.raises(ValueError, match="k=81"):
        eigenpairs(op, 81, generator=seeded())
    with pytest.raises(ValueError, match="asks for 82 of 80"):
        eigenpairs(op, 41, which="BE", generator=seeded())
    with pytest.raises(ValueError, match="tol must be positive"):
        eigenpairs(op, tol=0.0, generator=seeded())
    with pytest.raises(ValueError, match="max_products=3 is too small"):
        eigenpairs(op, 4, max_products=3, generator=seeded())
    with pytest.raises(
        ValueError, match="max_basis=5 is too small for 4 eigenpairs; pass at least 7"
    ):
        eigenpairs(op, 4, method=Lanczos(max_basis=5), generator=seeded())
    with pytest.raises(ValueError, match="not zero"):
        zero = torch.zeros(N, dtype=torch.float64)
        eigenpairs(op, method=Lanczos(start=zero), generator=seeded())
    with pytest.raises(ValueError, match="sigma > 0"):
        density(op, sigma=0.0, generator=seeded())
    with pytest.raises(ValueError, match="float32 or float64"):
        trace(Diagonal(torch.ones(30, dtype=torch.bfloat16)), generator=seeded())


def test_an_unknown_method_names_the_valid_ones() -> None:
    # Where annotations are checked, they refuse it first; users run without.
    op = dense(SPECTRA["flat"])
    unchecked = [inspect.unwrap(f) for f in (trace, diagonal, eigenpairs)]
    said = [
        "method='magic'; expected one of 'hutch\\+\\+', 'hutchinson', 'xtrace'",
        "method='magic'; expected one of 'hutchinson', 'xdiag'",
        r"method='magic'; expected Lanczos\(\.\.\.\) or Lobpcg\(\.\.\.\)",
    ]
    for estimator, message in zip(unchecked, said, strict=True):
        with pytest.raises(ValueError, match=message):
            estimator(op, method="magic", generator=seeded())
    with pytest.raises(ValueError, match="which='XX'; expected one of 'LM', 'LA', 'SA', 'BE'"):
        inspect.unwrap(eigenpairs)(op, which="XX", generator=seeded())
    with pytest.raises(Exception, match="magic"):
        trace(op, method="magic", generator=seeded())


def test_products_that_are_not_finite_are_refused() -> None:
    broken = Function(lambda v: v * math.nan, ParamSpace(shapes={"x": (40,)}), dtype=torch.float64)
    for method in EIGEN.values():
        with pytest.raises(FloatingPointError, match="not finite"):
            eigenpairs(broken, method=method, generator=seeded())
    with pytest.raises(FloatingPointError, match="not finite"):
        density(broken, generator=seeded())
    for method in ("hutchinson", "hutch++"):
        with pytest.raises(FloatingPointError, match="not finite"):
            trace(broken, method=method, generator=seeded())
    with pytest.raises(FloatingPointError, match="not finite"):
        diagonal(broken, generator=seeded())
