"""Certificates against closed forms, brute-force likelihoods, exact enumeration, and simulated
error rates."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from curvprune.certificate import (
    Verdict,
    certify_accuracy,
    certify_loss,
    certify_values,
    exact_p_value,
    fixed_sequence,
    items_needed,
    items_needed_for_accuracy,
    power_for_accuracy,
    probability_of_certifying,
)

ALPHA = 0.05


def loss_verdict(
    difference: NDArray, count: NDArray, *, max_drop: float, **options: object
) -> Verdict:
    base = 2.0 * count
    return certify_loss(base, base + difference, count, max_drop=max_drop, **options)


def symmetric(size: int, seed: int = 0) -> NDArray:
    """A sample with no skewness at all, so that the bound is the plain t bound."""
    half = np.random.default_rng(seed).normal(size=size // 2)
    return np.concatenate([half, -half])


def test_equal_items_without_skew_are_the_paired_t_test() -> None:
    difference = 0.01 + 0.1 * symmetric(40)
    count = np.full(40, 7.0)
    verdict = loss_verdict(7 * difference, count, max_drop=0.05)
    paired = stats.ttest_rel(2.0 + difference, np.full(40, 2.0), alternative="less")
    assert verdict.drop == pytest.approx(0.01)
    assert verdict.stderr == pytest.approx(stats.sem(difference))
    assert verdict.bound == pytest.approx(paired.confidence_interval(0.95).high)
    assert (verdict.baseline, verdict.compressed) == (pytest.approx(2.0), pytest.approx(2.01))
    assert (verdict.items, verdict.clusters, verdict.measure) == (40, None, "nats/token")


def test_equal_clusters_are_the_t_test_of_cluster_means() -> None:
    means = 0.02 + 0.1 * symmetric(12)
    within = 0.3 * np.random.default_rng(1).normal(size=(12, 5))
    difference = means[:, None] + within - within.mean(axis=1, keepdims=True)
    verdict = loss_verdict(
        3 * difference.ravel(),
        np.full(60, 3.0),
        clusters=np.repeat([f"doc{i}" for i in range(12)], 5),
        max_drop=0.05,
    )
    interval = stats.ttest_1samp(means, 0.0, alternative="less").confidence_interval(0.95)
    assert verdict.stderr == pytest.approx(stats.sem(means))
    assert verdict.bound == pytest.approx(interval.high)
    assert (verdict.items, verdict.clusters) == (60, 12)


def test_stderr_is_the_leave_one_cluster_out_jackknife_of_the_ratio() -> None:
    rng = np.random.default_rng(2)
    documents = rng.integers(0, 9, size=50)
    count = rng.integers(1, 400, size=50).astype(float)
    difference = rng.normal(size=50) * count**0.5
    verdict = loss_verdict(difference, count, clusters=documents, max_drop=1.0)
    ratio = difference.sum() / count.sum()
    left_out = [difference[documents != c].sum() / count[documents != c].sum() for c in range(9)]
    assert verdict.drop == pytest.approx(ratio)
    assert verdict.stderr == pytest.approx(
        math.sqrt(8 / 9 * sum((value - ratio) ** 2 for value in left_out))
    )


def dense_degrees(sizes: NDArray, spread: NDArray) -> float:
    """Satterthwaite's degrees of freedom of the jackknife's quadratic form, by its matrix."""
    share = sizes / sizes.sum()
    rows = np.eye(sizes.size) - share
    product = rows.T @ np.diag((share / (1 - share)) ** 2) @ rows @ np.diag(spread)
    return np.trace(product) ** 2 / np.trace(product @ product)


@pytest.mark.parametrize("pairs", [1, 3, 8])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.5])
def test_degrees_of_freedom_against_dense_matrices(pairs: int, spread: float) -> None:
    rng = np.random.default_rng(pairs)
    sizes = np.repeat(np.round(30 * rng.lognormal(0, spread, pairs) + 1), 2)
    effects = np.tile([1.0, -1.0], pairs)  # in pairs of equal size: no skewness
    verdict = loss_verdict(sizes * effects, sizes, max_drop=1.0)
    degrees = min(dense_degrees(sizes, np.ones(2 * pairs)), dense_degrees(sizes, 1 / sizes))
    assert verdict.bound == pytest.approx(verdict.stderr * stats.t.ppf(0.95, degrees))
    if spread == 0:
        assert degrees == pytest.approx(2 * pairs - 1)


def test_the_smaller_degrees_of_freedom_are_used() -> None:
    sizes = np.repeat([1.0, 2.0, 30.0, 60.0], 2)
    effects = np.tile([1.0, -1.0], 4)
    verdict = loss_verdict(sizes * effects, sizes, max_drop=1.0)
    equal, shrinking = dense_degrees(sizes, np.ones(8)), dense_degrees(sizes, 1 / sizes)
    assert equal < shrinking - 0.5
    assert verdict.bound == pytest.approx(verdict.stderr * stats.t.ppf(0.95, equal))


def test_skewness_towards_losses_widens_the_certificate_and_towards_gains_the_violation() -> None:
    sample = np.random.default_rng(4).lognormal(0, 1, 30)
    sample -= sample.mean()
    se = stats.sem(sample)
    share = sample / math.sqrt(np.sum(sample**2))
    kappa = np.sum(share**3) + 8 * (
        share.max() ** 3 + share.min() ** 3
    )  # the extremes count nine times
    t = stats.t.ppf(0.95, 29)
    assert kappa > 0
    towards_losses = loss_verdict(sample, np.ones(30), max_drop=0.0)
    assert towards_losses.bound == pytest.approx(se * (t + kappa * (2 * t**2 + 1) / 6))
    assert loss_verdict(-sample, np.ones(30), max_drop=0.0).bound == pytest.approx(se * t)
    for sign, status in ((1, "VIOLATED"), (-1, "INCONCLUSIVE")):
        assert (
            loss_verdict(sign * sample + 2 * se * t, np.ones(30), max_drop=0.999 * se * t).status
            == status
        )


def test_the_three_verdicts_and_the_items_that_would_decide() -> None:
    noise = 0.1 * symmetric(100, seed=5)
    count = np.ones(100)
    se = stats.sem(noise)
    t = stats.t.ppf(0.95, 99)
    for drop, max_drop, status in (
        (0.0, 1.01 * t * se, "CERTIFIED"),
        (0.0, 0.99 * t * se, "INCONCLUSIVE"),
        (0.1 + 1.01 * t * se, 0.1, "VIOLATED"),
        (0.1 + 0.99 * t * se, 0.1, "INCONCLUSIVE"),
    ):
        verdict = loss_verdict(noise + drop, count, max_drop=max_drop)
        assert verdict.status == status
        assert (verdict.needed is None) == (status != "INCONCLUSIVE")
        if verdict.needed is not None:
            heaviest = noise.max() ** 2 / np.sum(noise**2)
            exact = (
                100 * (1 + 2 * heaviest) * ((t + stats.norm.ppf(0.8)) * se / (max_drop - drop)) ** 2
            )
            assert verdict.needed == math.ceil(exact) > 100


def test_needed_items_do_decide_with_the_promised_power() -> None:
    rng = np.random.default_rng(6)
    pilot = loss_verdict(0.1 * symmetric(60, seed=7), np.ones(60), max_drop=0.01)
    assert pilot.needed is not None
    spread = pilot.stderr * math.sqrt(60)
    runs = [
        loss_verdict(rng.normal(0, spread, pilot.needed), np.ones(pilot.needed), max_drop=0.01)
        for _ in range(400)
    ]
    share = np.mean([run.status == "CERTIFIED" for run in runs])
    assert 0.8 - 3 * math.sqrt(0.8 * 0.2 / 400) < share < 0.95


def test_a_drop_equal_to_the_budget_needs_no_number_of_items() -> None:
    verdict = loss_verdict(np.array([1.0, -1.0, 2.0, -2.0]), np.ones(4), max_drop=0.0)
    assert (verdict.status, verdict.drop, verdict.needed) == ("INCONCLUSIVE", 0.0, None)


def test_identical_differences_are_decided_by_their_value() -> None:
    # As many as show what hits one in twenty.
    count = np.tile([3.0, 5.0, 11.0, 2.0], 15)
    for max_drop, status in ((0.3, "CERTIFIED"), (0.29, "VIOLATED")):
        verdict = certify_loss(2.1 * count, 2.4 * count, count, max_drop=max_drop + 1e-9)
        assert (verdict.status, verdict.stderr) == (status, 0.0)
    same = certify_loss(count, count, count, max_drop=1e-9)
    assert (same.status, same.drop) == ("CERTIFIED", 0.0) and 0 < same.bound < 1e-14
    # That a loss is nowhere at all, no sample shows.
    assert certify_loss(count, count, count, max_drop=0.0).status == "INCONCLUSIVE"


def simulate_loss(clusters: int, spread: float, correlation: float, runs: int, seed: int) -> float:
    """Share of runs CERTIFIED at a true drop equal to the budget; lognormal cluster sizes, normal
    effects."""
    rng = np.random.default_rng(seed)
    accepted = 0
    for _ in range(runs):
        sizes = np.maximum(1, np.round(np.exp(rng.normal(3, spread, clusters))))
        effects = sizes * math.sqrt(correlation) * rng.normal(size=clusters)
        noise = np.sqrt(sizes * (1 - correlation)) * rng.normal(size=clusters)
        verdict = loss_verdict(
            0.1 * sizes + effects + noise, sizes, max_drop=0.1, clusters=np.arange(clusters)
        )
        accepted += verdict.status == "CERTIFIED"
    return accepted / runs


def within_error(rate: float, runs: int) -> bool:
    return rate <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


@pytest.mark.parametrize("clusters", [8, 20, 60])
@pytest.mark.parametrize("spread", [0.0, 1.2])
def test_wrong_certificates_of_loss_stay_below_the_nominal_rate(
    clusters: int, spread: float
) -> None:
    rate = simulate_loss(clusters, spread, 0.3, 1000, seed=clusters)
    assert within_error(rate, 1000) and rate > 0.002


@pytest.mark.parametrize(("clusters", "runs"), [(20, 1500), (150, 1500)])
def test_wrong_certificates_of_skewed_losses_stay_below_the_nominal_rate(
    clusters: int, runs: int
) -> None:
    """Lognormal documents (skewness 6) of unequal size; the bound of Johnson from the plain sample
    skewness fails."""
    rng = np.random.default_rng(clusters)
    sizes = np.maximum(1, np.round(10 * rng.lognormal(0, 0.7, clusters)))
    effects = (rng.lognormal(0, 1, (runs, clusters)) - math.exp(0.5)) / math.sqrt(
        (math.e - 1) * math.e
    )
    noise = rng.normal(size=(runs, clusters)) / np.sqrt(sizes)
    differences = sizes * (1.0 + math.sqrt(0.2) * effects + math.sqrt(0.8) * noise)
    rate = np.mean(
        [loss_verdict(d, sizes, max_drop=1.0).status == "CERTIFIED" for d in differences]
    )
    assert within_error(float(rate), runs) and rate > 0.01


def test_doubts_are_noted() -> None:
    rng = np.random.default_rng(0)
    assert loss_verdict(rng.normal(size=100), np.ones(100), max_drop=1.0).note == ""
    assert (
        "8 clusters are few"
        in loss_verdict(rng.normal(size=8), np.ones(8), max_drop=1.0, clusters=range(8)).note
    )
    spike = 0.01 * rng.normal(size=100)
    spike[3] = 5.0
    assert "one of the items makes up 9" in loss_verdict(spike, np.ones(100), max_drop=1.0).note
    assert loss_verdict(-spike, np.ones(100), max_drop=1.0).note == "", (
        "a large gain is no reason for doubt"
    )


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [3, 8, 20, 60, 300])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("correlation", [0.05, 0.5])
def test_wrong_certificates_of_loss_large(clusters: int, spread: float, correlation: float) -> None:
    assert within_error(simulate_loss(clusters, spread, correlation, 20_000, seed=clusters), 20_000)


def test_the_plain_cluster_robust_bound_would_not_be_honest() -> None:
    """The reason for the jackknife and Satterthwaite's degrees: the usual formula fails this very
    simulation."""
    rng = np.random.default_rng(8)
    sizes = np.maximum(1, np.round(np.exp(rng.normal(3, 1.2, (4000, 20)))))
    total = (
        sizes
        + sizes * math.sqrt(0.3) * rng.normal(size=sizes.shape)
        + np.sqrt(0.7 * sizes) * rng.normal(size=sizes.shape)
    )
    ratio = total.sum(1) / sizes.sum(1)
    residual = total - ratio[:, None] * sizes
    se = np.sqrt(20 / 19 * np.sum(residual**2, axis=1)) / sizes.sum(1)
    assert np.mean(ratio + stats.t.ppf(0.95, 19) * se <= 1.0) > 0.08


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1.0], [1.0, 1.0]), "lengths differ.*'compressed_sum': 1"),
        (([1.0, math.nan], [1.0, 1.0], [1.0, 1.0]), r"baseline_sum is not finite at items \[1\]"),
        (([1.0, 1.0], [1.0, math.inf], [1.0, 1.0]), r"compressed_sum is not finite at items \[1\]"),
        (([1.0, 1.0], [1.0, 1.0], [1.0, 0.0]), r"items \[1\] have none"),
        (([1.0], [1.0], [1.0]), "1 items.*at least 2"),
        (([], [], []), "0 items.*at least 2"),
        (([[1.0]], [[1.0]], [[1.0]]), "expected one number per item"),
    ],
)
def test_bad_losses(arguments: tuple[list, list, list], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify_loss(*arguments, max_drop=0.1)


def test_bad_clusters_and_limits() -> None:
    ones = [1.0, 1.0, 1.0]
    for clusters, message in (
        (["a"] * 3, "1 clusters.*finer"),
        (["a", "b"], "2 entries for 3 items"),
    ):
        with pytest.raises(ValueError, match=message):
            certify_loss(ones, ones, ones, clusters=clusters, max_drop=0.1)
        with pytest.raises(ValueError, match=message):
            certify_accuracy(ones, ones, clusters=clusters, max_drop=0.1)
    for limits in (
        {"max_drop": -0.1},
        {"max_drop": math.nan},
        {"max_drop": 0.1, "confidence": 95.0},
    ):
        with pytest.raises(ValueError, match=r"max_drop=|confidence="):
            certify_loss(ones, ones, ones, **limits)
        with pytest.raises(ValueError, match=r"max_drop=|confidence="):
            certify_accuracy(ones, ones, **limits)


def results(n01: int, n10: int, items: int) -> tuple[NDArray, NDArray]:
    """Baseline and compressed correctness with the given disagreements; the rest alternate right
    and wrong."""
    base = np.arange(items) % 2 == 0
    comp = base.copy()
    base[:n01], comp[:n01] = True, False
    base[n01 : n01 + n10], comp[n01 : n01 + n10] = False, True
    return base, comp


def accuracy_verdict(n01: int, n10: int, items: int, *, max_drop: float) -> Verdict:
    return certify_accuracy(*results(n01, n10, items), max_drop=max_drop)


def likeliest_gains(n01: NDArray, n10: NDArray, items: int, drop: float) -> NDArray:
    """P(only the compressed model is right) at which the outcome is likeliest, given the drop.

    That is where the slope of the log-likelihood, which falls, passes 0.
    """
    low = np.full(n01.shape, max(0.0, -drop))
    high = np.full(n01.shape, (1 - drop) / 2)
    for _ in range(60):
        gains = (low + high) / 2
        slope = n01 / np.maximum(gains + drop, 1e-300) + n10 / np.maximum(gains, 1e-300)
        slope -= 2 * (items - n01 - n10) / np.maximum(1 - drop - 2 * gains, 1e-300)
        low, high = np.where(slope > 0, gains, low), np.where(slope > 0, high, gains)
    return (low + high) / 2


def score_of(n01: NDArray, n10: NDArray, items: int, drop: float) -> NDArray:
    """Tango's score statistic, with the likelihood maximised by brute force."""
    gains = likeliest_gains(n01, n10, items, drop)
    return (n01 - n10 - items * drop) / np.sqrt(items * (2 * gains + drop * (1 - drop)))


@pytest.mark.parametrize("drop", [-0.2, -0.01, 0.01, 0.05, 0.3])
def test_brute_force_maximises_the_likelihood(drop: float) -> None:
    for n01, n10 in ((0, 4), (5, 2), (20, 11)):

        def negative(gains: float, n01: int = n01, n10: int = n10) -> float:
            parts = ((n01, gains + drop), (n10, gains), (60 - n01 - n10, 1 - drop - 2 * gains))
            return -sum(number * math.log(max(p, 1e-300)) for number, p in parts if number)

        bounds = max(0.0, -drop), (1 - drop) / 2
        best = optimize.minimize_scalar(negative, bounds=bounds, options={"xatol": 1e-10}).x
        found = likeliest_gains(np.array([n01]), np.array([n10]), 60, drop)
        assert found[0] == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("drop", [-0.3, -0.05, 0.0, 0.01, 0.1, 0.5])
def test_score_rises_with_losses_and_falls_with_gains(drop: float) -> None:
    """The exact p-value walks along this order, so it must hold everywhere."""
    b, c = np.meshgrid(np.arange(31), np.arange(31), indexing="ij")
    inside = b + c <= 30
    score = np.full(b.shape, np.nan)
    score[inside] = score_of(b[inside], c[inside], 30, drop)
    assert np.nanmin(np.diff(score, axis=0)) > 0 and np.nanmax(np.diff(score, axis=1)) < 0


@pytest.mark.parametrize(
    ("n01", "n10", "items", "drop"),
    [
        *((1, 2, 25, 0.1), (0, 0, 30, 0.08), (3, 1, 20, 0.3), (6, 9, 30, 0.02)),
        *((20, 11, 60, 0.3), (3, 9, 25, -0.05), (2, 14, 30, -0.2)),
    ],
)
def test_p_value_against_enumeration_of_every_outcome(
    n01: int, n10: int, items: int, drop: float
) -> None:
    b, c = np.meshgrid(np.arange(items + 1), np.arange(items + 1), indexing="ij")
    b, c = b[b + c <= items], c[b + c <= items]
    score = score_of(b, c, items, drop)
    extreme = score <= score[(b == n01) & (c == n10)] + 1e-9
    table = np.stack([b, c, items - b - c], axis=1)[extreme]
    low = stats.beta.ppf(5e-5, n10, items - n10 + 1) if n10 else 0.0
    low = max(low, 0.0, -drop)
    high = min(stats.beta.isf(5e-5, n10 + 1, items - n10), (1 - drop) / 2)
    worst = max(
        stats.multinomial.pmf(table, items, [gains + drop, gains, 1 - drop - 2 * gains]).sum()
        for gains in np.linspace(low, high, 400)
    )
    assert 1e-4 < worst < 0.9
    assert exact_p_value(n01, n10, items, drop) == pytest.approx(worst + 1e-4, abs=5e-5)


def test_accuracy_fields_and_consistency_of_bound_and_status() -> None:
    verdict = accuracy_verdict(12, 4, 400, max_drop=0.05)
    base, comp = results(12, 4, 400)
    assert (verdict.baseline, verdict.compressed) == (base.mean(), comp.mean())
    assert verdict.drop == pytest.approx(8 / 400)
    assert verdict.stderr == pytest.approx(math.sqrt((16 / 400 - 0.02**2) / 400))
    # At the bound the one-sided p-value passes alpha.
    over, under = (exact_p_value(12, 4, 400, verdict.bound + step) for step in (1e-4, -1e-4))
    assert over < ALPHA < under

    # Away from the corners exact and score interval agree.
    def beyond(drop: float) -> float:
        score = score_of(np.array([12]), np.array([4]), 400, drop)
        return float(score[0]) + stats.norm.ppf(0.95)

    tango = optimize.brentq(beyond, 0.02, 0.2)
    assert verdict.bound == pytest.approx(tango, rel=0.05)
    assert accuracy_verdict(12, 4, 400, max_drop=verdict.bound + 1e-5).status == "CERTIFIED"
    assert accuracy_verdict(12, 4, 400, max_drop=verdict.bound - 1e-4).status == "INCONCLUSIVE"
    assert accuracy_verdict(40, 4, 400, max_drop=0.01).status == "VIOLATED"
    assert accuracy_verdict(4, 40, 400, max_drop=0.0).status == "CERTIFIED"
    # Three losses in a hundred happen by chance in 8 % of the runs where one in a hundred is true.
    assert accuracy_verdict(3, 0, 100, max_drop=0.01).status == "INCONCLUSIVE"
    assert accuracy_verdict(7, 0, 100, max_drop=0.01).status == "VIOLATED"


def test_agreement_on_every_item_certifies_only_with_enough_items() -> None:
    """With no disagreement the exact bound is that of a binomial with none observed: 1 -
    alpha^(1/N)."""
    for items in (20, 299, 3000):
        verdict = accuracy_verdict(0, 0, items, max_drop=0.0)
        assert verdict.bound == pytest.approx(1 - (ALPHA - 1e-4) ** (1 / items), rel=1e-3)
    assert accuracy_verdict(0, 0, 280, max_drop=0.01).status == "INCONCLUSIVE"
    needed = accuracy_verdict(0, 0, 280, max_drop=0.01).needed
    assert needed is not None and 299 == math.ceil(math.log(0.05) / math.log(0.99)) <= needed < 330
    assert accuracy_verdict(0, 0, needed, max_drop=0.01).status == "CERTIFIED"
    assert accuracy_verdict(0, 0, 310, max_drop=0.01).status == "CERTIFIED"


def test_one_item_is_never_enough_but_is_no_error() -> None:
    assert certify_accuracy([True], [True], max_drop=0.5).status == "INCONCLUSIVE"


def test_needed_items_of_accuracy() -> None:
    verdict = accuracy_verdict(12, 9, 300, max_drop=0.02)
    assert verdict.status == "INCONCLUSIVE"
    assert verdict.needed == items_needed_for_accuracy(21 / 300, max_drop=0.02, drop=0.01)
    lucky = accuracy_verdict(9, 12, 300, max_drop=0.01)
    assert lucky.needed == items_needed_for_accuracy(21 / 300, max_drop=0.01), (
        "a gain is planned as no change"
    )
    assert accuracy_verdict(6, 0, 300, max_drop=0.02).status == "INCONCLUSIVE"
    over = accuracy_verdict(9, 0, 300, max_drop=0.02)
    assert over.status == "INCONCLUSIVE" and over.needed is not None
    more = accuracy_verdict(round(9 * over.needed / 300), 0, over.needed, max_drop=0.02)
    assert more.status == "VIOLATED"


@functools.cache
def certified(n01: int, n10: int, items: int, max_drop: float) -> bool:
    """What `certify_accuracy` says, without its bound, which takes much longer."""
    return n01 - n10 < items * max_drop and exact_p_value(n01, n10, items, max_drop) <= ALPHA


def most_losses(n10: int, items: int, max_drop: float, near: int) -> int:
    """The largest n01 that is certified, -1 if none is; sought from ``near`` on."""
    most = near
    while most < items - n10 and certified(most + 1, n10, items, max_drop):
        most += 1
    while most >= 0 and not certified(most, n10, items, max_drop):
        most -= 1
    return most


def test_the_exact_test_alone_is_the_verdict_on_accuracy() -> None:
    for n01, n10, items, max_drop in ((3, 0, 200, 0.05), (9, 2, 150, 0.1), (0, 0, 280, 0.01)):
        most = most_losses(n10, items, max_drop, n01)
        for lost in (most, most + 1):
            status = (
                accuracy_verdict(lost, n10, items, max_drop=max_drop).status if lost >= 0 else ""
            )
            assert (status == "CERTIFIED") == (0 <= lost == most)


def exact_power(items: int, max_drop: float, rho: float, drop: float = 0.0) -> float:
    """P(CERTIFIED), summed over outcomes."""
    gains, losses = (rho - drop) / 2, (rho + drop) / 2
    power, most = 0.0, -1
    first, last = stats.binom.ppf(1e-6, items, gains), stats.binom.isf(1e-6, items, gains)
    for n10 in range(int(first), int(last) + 1):
        most = most_losses(n10, items, max_drop, most)
        within = stats.binom.cdf(most, items - n10, losses / (1 - gains))
        power += stats.binom.pmf(n10, items, gains) * within
    return power


@pytest.mark.parametrize(
    ("max_drop", "rho", "drop"),
    [
        (0.05, 0.02, 0.0),
        (0.05, 0.1, 0.0),
        (0.02, 0.005, 0.0),
        (0.05, 0.03, 0.02),
        (0.0, 0.1, -0.04),
    ],
)
def test_items_needed_for_accuracy_give_the_promised_power_exactly(
    max_drop: float, rho: float, drop: float
) -> None:
    items = items_needed_for_accuracy(rho, max_drop=max_drop, drop=drop)
    assert 0.8 <= exact_power(items, max_drop, rho, drop) <= 0.93
    assert power_for_accuracy(items, rho, max_drop=max_drop, drop=drop) == pytest.approx(
        0.8, abs=0.01
    )
    assert power_for_accuracy(items / 3, rho, max_drop=max_drop, drop=drop) < 0.5


def test_items_needed_for_accuracy_near_the_textbook_formula_when_many_disagree() -> None:
    assert items_needed_for_accuracy(0.1, max_drop=0.01) == pytest.approx(
        items_needed(math.sqrt(0.1), max_drop=0.01), 0.02
    )
    assert power_for_accuracy(250, 0.0, max_drop=0.01) == 0.0, "not even full agreement certifies"
    for arguments in ({"drop": 0.02}, {"power": 0.2}, {"drop": -0.2}):
        with pytest.raises(ValueError, match="items_needed_for_accuracy"):
            items_needed_for_accuracy(0.05, max_drop=0.02, **arguments)


def exact_size(items: int, max_drop: float, rho: float) -> tuple[float, float]:
    """P(CERTIFIED) at true drop == max_drop, summed over outcomes: (this test, plain score
    test)."""
    gains, losses = (rho - max_drop) / 2, (rho + max_drop) / 2
    ours = plain = 0.0
    most = -1
    for n10 in range(items + 1):
        weight = stats.binom.pmf(n10, items, gains)
        if weight < 1e-9:
            continue
        given = losses / (1 - gains)
        most = most_losses(n10, items, max_drop, most)
        ours += weight * stats.binom.cdf(most, items - n10, given)
        lost = np.arange(items - n10 + 1)
        score = score_of(lost, np.full(lost.shape, n10), items, max_drop)
        passes = score <= -stats.norm.ppf(0.95)
        plain += weight * stats.binom.pmf(lost[passes], items - n10, given).sum()
    return ours, plain


@pytest.mark.parametrize(
    ("items", "max_drop", "rho"), [(270, 0.01, 0.01), (200, 0.02, 0.03), (300, 0.02, 0.02)]
)
def test_wrong_certificates_of_accuracy_exactly(items: int, max_drop: float, rho: float) -> None:
    assert exact_size(items, max_drop, rho)[0] <= ALPHA


def test_the_plain_score_test_would_exceed_the_nominal_rate() -> None:
    ours, plain = exact_size(270, 0.01, 0.01)
    assert plain > 0.06 and ours <= ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("items", [200, 300, 1000, 5000])
@pytest.mark.parametrize("max_drop", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("rho", [0.01, 0.05, 0.1, 0.2])
def test_wrong_certificates_of_accuracy_large(items: int, max_drop: float, rho: float) -> None:
    rng = np.random.default_rng(items)
    runs, rho = 2000, max(rho, max_drop)
    split = [(rho + max_drop) / 2, (rho - max_drop) / 2, 1 - rho]
    draws = rng.multinomial(items, split, size=runs)
    rate = float(np.mean([certified(int(b), int(c), items, max_drop) for b, c, _ in draws]))
    assert within_error(rate, runs)


def clustered_answers(
    rng: np.random.Generator, clusters: int, correlation: float
) -> tuple[NDArray, NDArray, NDArray]:
    """Whether baseline and compressed model are right, and the cluster of every item; the true drop
    is 0.03."""
    scale = 1 / correlation - 1
    sizes = np.maximum(1, np.round(20 * np.exp(rng.normal(0, 0.7, clusters)))).astype(int)
    lost = rng.binomial(sizes, rng.beta(0.05 * scale, 0.95 * scale, clusters))
    won = rng.binomial(sizes, rng.beta(0.02 * scale, 0.98 * scale, clusters))
    won = np.minimum(won, sizes - lost)
    columns = [results(int(b), int(c), int(n)) for b, c, n in zip(lost, won, sizes, strict=True)]
    base = np.concatenate([column[0] for column in columns])
    comp = np.concatenate([column[1] for column in columns])
    return base, comp, np.repeat(np.arange(clusters), sizes)


def mean_certified(worse: NDArray, groups: NDArray, max_drop: float) -> bool:
    """Whether the bound over clusters, one of the two that must hold, is within the budget."""
    return loss_verdict(worse, np.ones(worse.size), clusters=groups, max_drop=max_drop).status == (
        "CERTIFIED"
    )


def simulate_clustered_accuracy(clusters: int, correlation: float, runs: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    accepted = 0
    for _ in range(runs):
        base, comp, groups = clustered_answers(rng, clusters, correlation)
        if mean_certified(base.astype(float) - comp, groups, 0.03):
            verdict = certify_accuracy(base, comp, clusters=groups, max_drop=0.03)
            accepted += verdict.status == "CERTIFIED"
    return accepted / runs


def test_clustered_accuracy_needs_the_bound_over_clusters_too() -> None:
    """What the simulations rely on, which ask the quicker of the two bounds first."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        base, comp, groups = clustered_answers(rng, 12, 0.2)
        difference = base.astype(float) - comp
        verdict = certify_accuracy(base, comp, clusters=groups, max_drop=0.03)
        bound = loss_verdict(difference, np.ones(base.size), clusters=groups, max_drop=0.03).bound
        assert verdict.bound >= bound
        assert (verdict.status == "CERTIFIED") == (verdict.bound <= 0.03)


@pytest.mark.parametrize("clusters", [10, 60])
def test_wrong_certificates_of_clustered_accuracy(clusters: int) -> None:
    assert within_error(simulate_clustered_accuracy(clusters, 0.2, 200, seed=clusters), 200)


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [10, 20, 60])
@pytest.mark.parametrize("correlation", [0.02, 0.1, 0.3])
def test_wrong_certificates_of_clustered_accuracy_large(clusters: int, correlation: float) -> None:
    assert within_error(
        simulate_clustered_accuracy(clusters, correlation, 1000, seed=clusters), 1000
    )


def test_clusters_cannot_certify_what_independent_items_would_not() -> None:
    base, comp = results(0, 0, 400)
    documents = np.repeat(np.arange(8), 50)
    assert certify_accuracy(base, comp, max_drop=0.01).status == "CERTIFIED"
    verdict = certify_accuracy(base, comp, clusters=documents, max_drop=0.01)
    # Design effect 1 + 0.1 * 49 = 5.9, so 400 items count as 67.
    assert verdict.status == "INCONCLUSIVE" and verdict.clusters == 8
    assert verdict.bound == pytest.approx(1 - (ALPHA - 1e-4) ** (1 / 67), rel=1e-3)
    assert verdict.needed == pytest.approx(
        5.9 * items_needed_for_accuracy(0.0, max_drop=0.01), abs=6
    )
    singles = certify_accuracy(*results(12, 4, 400), clusters=np.arange(400), max_drop=0.05)
    assert singles.bound == pytest.approx(
        accuracy_verdict(12, 4, 400, max_drop=0.05).bound, rel=0.1
    )


def test_effective_counts_are_rounded_against_the_compressed_model() -> None:
    """Clusters of 11 items have a design effect of 2: of 3 losses, 3 gains and 110 items count 2, 1
    and 55."""
    base, comp = np.ones((10, 11), dtype=bool), np.ones((10, 11), dtype=bool)
    comp[:3, 0] = base[3:6, 0] = False
    documents = np.repeat(np.arange(10), 11)
    verdict = certify_accuracy(base.ravel(), comp.ravel(), clusters=documents, max_drop=0.05)
    assert verdict.bound == accuracy_verdict(2, 1, 55, max_drop=0.05).bound
    # At least one item counts, however unequal the clusters.
    base, comp = results(1, 0, 1001)
    verdict = certify_accuracy(base, comp, clusters=[0] + [1] * 1000, max_drop=0.05)
    assert verdict.status == "INCONCLUSIVE" and verdict.bound >= 1


def test_clustered_losses_violate() -> None:
    base = np.ones(600, dtype=bool)
    comp = np.arange(600) % 3 != 0
    verdict = certify_accuracy(base, comp, clusters=np.repeat(np.arange(30), 20), max_drop=0.05)
    assert verdict.status == "VIOLATED" and verdict.drop == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("base", "comp", "message"),
    [
        ([1, 0], [1], "lengths differ"),
        ([1, 0.5], [1, 1], "booleans or 0/1"),
        ([1, math.nan], [1, 1], "baseline_correct is not finite"),
        ([], [], "no items"),
    ],
)
def test_bad_accuracies(base: list, comp: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify_accuracy(base, comp, max_drop=0.1)
    with pytest.raises(ValueError, match=r"0\.01 for one percentage point"):
        certify_accuracy([1, 0], [1, 0], max_drop=1.0)


def test_probability_of_certifying_against_simulation() -> None:
    rng = np.random.default_rng(9)
    truth = rng.normal(0.01, 0.004, 200_000)
    seen = truth + rng.normal(0, 0.003, truth.size)
    share = np.mean(seen + stats.norm.ppf(0.9) * 0.003 <= 0.02)
    assert probability_of_certifying(
        0.01, 0.004, 0.003, max_drop=0.02, confidence=0.9
    ) == pytest.approx(share, abs=0.005)
    assert probability_of_certifying(0.01, 0.0, 0.0, max_drop=0.02) == 1.0
    assert probability_of_certifying(0.03, 0.0, 0.0, max_drop=0.02) == 0.0
    for bad in ((math.nan, 0.1, 0.1), (0.0, -0.1, 0.1), (0.0, 0.1, math.inf)):
        with pytest.raises(ValueError, match="probability_of_certifying"):
            probability_of_certifying(*bad, max_drop=0.02)


def test_items_needed_are_the_published_numbers() -> None:
    numbers = [items_needed(math.sqrt(rho), max_drop=0.01) for rho in (0.02, 0.05, 0.10)]
    for found, published in zip(numbers, (1237, 3092, 6183), strict=True):
        assert published < found < 1.03 * published, "and what the correction for skewness costs"
    assert items_needed(0.5, max_drop=0.02, drop=0.01) == items_needed(1.0, max_drop=0.02)
    assert items_needed(1e-9, max_drop=0.02) == 5, "with fewer nothing is decided"
    assert items_needed(0.0, max_drop=0.02) == 59, "nor with fewer that are all alike"
    for arguments in ({"drop": 0.02}, {"drop": 0.03}, {"power": 1.0}, {"power": 0.2}):
        with pytest.raises(ValueError, match="items_needed"):
            items_needed(0.1, max_drop=0.02, **arguments)
    with pytest.raises(ValueError, match="sd=-1"):
        items_needed(-1.0, max_drop=0.02)


def test_items_needed_give_the_promised_power() -> None:
    items = items_needed(0.3, max_drop=0.05, drop=0.01, power=0.9)
    rng = np.random.default_rng(10)
    runs = [
        loss_verdict(rng.normal(0.01, 0.3, items), np.ones(items), max_drop=0.05)
        for _ in range(1000)
    ]
    error = 3 * math.sqrt(0.9 * 0.1 / 1000)
    assert np.mean([run.status == "CERTIFIED" for run in runs]) == pytest.approx(0.9, abs=error)


def test_fixed_sequence_stops_at_the_first_failure() -> None:
    passed = loss_verdict(symmetric(40), np.ones(40), max_drop=1.0)
    failed = loss_verdict(np.array([1.0, -1.0, 2.0, -2.0]), np.ones(4), max_drop=0.1)
    assert (passed.status, failed.status) == ("CERTIFIED", "INCONCLUSIVE")
    assert fixed_sequence([]) is None
    assert fixed_sequence([failed, passed]) is None
    assert fixed_sequence([passed, passed, failed, passed]) == 1
    assert fixed_sequence([passed, passed]) == 1


def test_fixed_sequence_keeps_the_error_rate_over_many_plans() -> None:
    """Of ten plans the last seven are at the budget: a false certificate in at most 5 % of the
    runs."""
    rng = np.random.default_rng(11)
    drops = np.array([-1.0, -0.5, -0.2] + [0.0] * 7)
    wrong, runs = 0, 400
    for _ in range(runs):
        sequence: list[Verdict] = []
        for drop in drops:
            difference = 0.2 + drop + 0.3 * rng.normal(size=25)
            sequence.append(loss_verdict(difference, np.ones(25), max_drop=0.2))
            if sequence[-1].status != "CERTIFIED":
                break  # testing stops at the first failure
        last = fixed_sequence(sequence)
        wrong += last is not None and drops[last] >= 0
    assert within_error(wrong / runs, runs)


def test_verdict_round_trips_through_json() -> None:
    for verdict in (
        loss_verdict(
            symmetric(10), np.full(10, 2), max_drop=0.1, clusters=[f"d{i}" for i in range(10)]
        ),
        accuracy_verdict(3, 1, 50, max_drop=0.1),
    ):
        record = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
        assert Verdict.from_dict(record) == verdict
    record["stderr"] = None
    assert math.isnan(Verdict.from_dict(record).stderr)
    with pytest.raises(ValueError, match="p_value"):
        Verdict.from_dict(record | {"p_value": 0.1})


def test_values_without_bounds_are_the_paired_t_test_in_either_direction() -> None:
    base, step = np.random.default_rng(0).normal(size=40), 0.1 * symmetric(40)
    for sign in (True, False):
        worse = base - step if sign else base + step
        verdict = certify_values(
            base, worse, max_drop=0.2, higher_is_better=sign, metric="rouge", unit="points"
        )
        interval = stats.ttest_rel(base, base - step, alternative="less").confidence_interval(0.95)
        assert verdict.bound == pytest.approx(interval.high)
        assert (verdict.metric, verdict.measure, verdict.items) == ("rouge", "points", 40)
        assert verdict.baseline == pytest.approx(
            base.mean()
        ) and verdict.compressed == pytest.approx(worse.mean())


def test_values_of_zero_and_one_are_accuracy() -> None:
    base, comp = results(12, 4, 400)
    expected = certify_accuracy(base, comp, max_drop=0.05)
    right = certify_values(base, comp, max_drop=0.05, bounds=(0, 1), metric="exact match")
    wrong = certify_values(~base, ~comp, max_drop=0.05, bounds=(0, 1), higher_is_better=False)
    assert (right.bound, right.status, right.method) == (
        expected.bound,
        expected.status,
        expected.method,
    )
    assert wrong.bound == expected.bound and wrong.baseline == pytest.approx(1 - expected.baseline)


@pytest.mark.parametrize(("lost", "items"), [(0, 50), (3, 50), (12, 1000)])
def test_bounded_values_are_clopper_and_pearson_where_differences_are_zero_or_one(
    lost: int, items: int
) -> None:
    """Scores of 2, of which some fall to 0: the differences are 0 or all that there is."""
    compressed = np.where(np.arange(items) < lost, 0.0, 2.0)
    verdict = certify_values(np.full(items, 2.0), compressed, max_drop=0.5, bounds=(0, 2))
    exact = float(stats.beta.isf(ALPHA, lost + 1, items - lost))
    assert exact <= verdict.bound / 2 == pytest.approx(exact, rel=0.01)


def test_bounded_values_against_monte_carlo_of_the_dirichlet_quantile() -> None:
    rng = np.random.default_rng(0)
    base, comp = rng.uniform(2, 4, 60), rng.uniform(2, 4, 60)
    weights = rng.dirichlet(np.ones(61), 200_000)
    expected = np.quantile(weights @ np.append(base - comp, 2.0), 0.95)
    verdict = certify_values(base, comp, max_drop=1.0, bounds=(2, 4))
    assert verdict.bound == pytest.approx(expected, abs=0.005)
    assert (
        certify_values(base, comp, max_drop=verdict.bound + 1e-6, bounds=(2, 4)).status
        == "CERTIFIED"
    )
    assert (
        certify_values(base, comp, max_drop=verdict.bound - 1e-4, bounds=(2, 4)).status
        == "INCONCLUSIVE"
    )
    assert certify_values(base, np.full(60, 2.0), max_drop=0.1, bounds=(2, 4)).status == "VIOLATED"


def test_bounded_values_do_not_miss_rare_large_losses() -> None:
    """One item in fifty loses everything; of 200 often too few are seen, and a t bound accepts
    often."""
    rng = np.random.default_rng(1)
    runs, items, share = 1000, 200, 0.02
    lost = rng.binomial(items, share, runs)

    @functools.cache
    def statuses(lost: int) -> tuple[str, bool]:
        base, comp = np.full(items, 0.9), np.full(items, 0.9)
        comp[:lost] = 0.0
        bound = 0.9 * lost / items + stats.t.ppf(0.95, items - 1) * stats.sem(base - comp)
        return certify_values(
            base, comp, max_drop=0.9 * share, bounds=(0, 1)
        ).status, bound <= 0.9 * share

    assert within_error(np.mean([statuses(int(n))[0] == "CERTIFIED" for n in lost]), runs)
    assert np.mean([statuses(int(n))[1] for n in lost]) > 0.08
    unseen = certify_values(np.full(200, 0.9), np.full(200, 0.9), max_drop=0.01, bounds=(0, 1))
    assert unseen.status == "INCONCLUSIVE" and unseen.needed is not None
    enough = np.full(unseen.needed, 0.9)
    assert certify_values(enough, enough, max_drop=0.01, bounds=(0, 1)).status == "CERTIFIED"


def test_wrong_certificates_of_clustered_bounded_values() -> None:
    rng = np.random.default_rng(2)
    runs, accepted, documents = 300, 0, np.repeat(np.arange(60), 10)
    for _ in range(runs):
        share = rng.beta(0.1 * 9, 0.9 * 9, 60)[documents]  # correlation 0.1
        loss = (rng.random(600) < share) * rng.random(600)
        if mean_certified(loss, documents, 0.05):
            verdict = certify_values(
                np.ones(600), 1 - loss, max_drop=0.05, bounds=(0, 1), clusters=documents
            )
            accepted += verdict.status == "CERTIFIED"
    assert within_error(accepted / runs, runs)
    assert verdict.clusters == 60 and "Gaffke" in verdict.method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (1, 0)}, "lowest and the highest"),
        ({"bounds": (0, 0.5)}, r"baseline is outside bounds=\(0, 0.5\) at items \[0\]"),
        ({"bounds": (0, 1), "max_drop": 1.0}, "no drop of a score"),
        ({"clusters": ["a", "a"], "bounds": (0, 1)}, "1 clusters"),
    ],
)
def test_bad_values(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify_values([0.7, 0.2], [0.1, 0.3], **{"max_drop": 0.1, **arguments})
    with pytest.raises(ValueError, match="no items"):
        certify_values([], [], max_drop=0.1, bounds=(0, 1))


@pytest.mark.parametrize("count", [[1, 1e4], [1, 1, 1e6], [1.0] * 20 + [1e6]])
def test_one_item_among_much_smaller_ones_decides_nothing(count: list[float]) -> None:
    verdict = loss_verdict(0.05 * np.array(count), np.array(count), max_drop=0.1)
    assert verdict.drop == pytest.approx(0.05) and not math.isnan(verdict.bound)
    other = np.array(count) * np.random.default_rng(0).normal(0.05, 0.1, len(count))
    assert not math.isnan(loss_verdict(other, np.array(count), max_drop=0.1).bound)
