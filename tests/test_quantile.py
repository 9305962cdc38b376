"""Budgets of KL divergence, top-1 agreement and quantiles: against binomial theory, by simulation,
by hand, and on the road of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import curvprune as cp
from curvprune.certificate import (
    certify_quantile,
    documents_needed,
    foreseen_quantile,
)
from curvprune.run import RecipeError, check, load_recipe, run
from tests import tiny


def exceeding(documents: int, number: int) -> np.ndarray:
    """Values of which so many lie above 1."""
    values = np.linspace(0.1, 0.9, documents)
    values[:number] = np.linspace(1.1, 2, max(number, 1))[:number]
    return values


def status_of(documents: int, number: int, quantile: float) -> str:
    return certify_quantile(exceeding(documents, number), quantile=quantile, max_drop=1.0).status


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_fewest_documents(quantile: float, confidence: float) -> None:
    least = documents_needed(quantile, confidence)
    # All of them lie below the quantile, and a certificate is wrong, so often:
    assert quantile**least <= 1 - confidence + 1e-12 < quantile ** (least - 1)


@pytest.mark.parametrize(("documents", "quantile"), [(30, 0.8), (100, 0.9), (299, 0.99), (7, 0.5)])
def test_the_level_is_the_binomials(documents: int, quantile: float) -> None:
    """With the quantile at the budget, how many exceed it is binomial: errors can be counted."""
    counts = np.arange(documents + 1)
    found = [status_of(documents, k, quantile) for k in counts]
    chance = stats.binom.pmf(counts, documents, 1 - quantile)
    for status in ("CERTIFIED", "VIOLATED"):
        error = sum(p for p, s in zip(chance, found, strict=True) if s == status)
        assert error <= 0.05 + 1e-12
    # As much as is allowed: one more exceeding, or one fewer, would be too many.
    last = max((k for k in counts if found[k] == "CERTIFIED"), default=-1)
    first = min((k for k in counts if found[k] == "VIOLATED"), default=documents + 1)
    assert chance[: last + 2].sum() > 0.05 and chance[first - 1 :].sum() > 0.05
    assert all(s == "CERTIFIED" for s in found[: last + 1])
    assert all(s == "VIOLATED" for s in found[first:])


@pytest.mark.parametrize("draw", ["lognormal", "two values"])
def test_the_bound_covers_the_quantile(draw: str) -> None:
    rng, missed, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        if draw == "lognormal":
            values, true = rng.lognormal(0, 1, 100), math.exp(stats.norm.ppf(0.9))
        else:
            # Ties: the 90 % quantile of values that are 1 with probability 0.12 is 1.
            values, true = (rng.random(100) < 0.12).astype(float), 1.0
        verdict = certify_quantile(values, quantile=0.9, max_drop=1.0)
        missed += verdict.bound < true
        assert (verdict.status == "CERTIFIED") == (verdict.bound <= 1.0)
    expected = 0.05 if draw == "lognormal" else 0.02
    assert missed / runs <= expected + 3 * math.sqrt(0.05 * 0.95 / runs)
    if draw == "lognormal":
        assert missed / runs > 0.01


def test_too_few_documents_say_how_many_it_takes() -> None:
    verdict = certify_quantile(np.zeros(100), quantile=0.99, max_drop=0.1)
    assert verdict.status == "INCONCLUSIVE" and verdict.bound == math.inf
    assert verdict.needed == 299 and "299" in verdict.note
    # A violation may be seen in few.
    assert certify_quantile(np.ones(10), quantile=0.99, max_drop=0.1).status == "VIOLATED"
    written = json.loads(json.dumps(verdict.to_dict()))
    assert written["bound"] is None and written["needed"] == 299


@pytest.mark.parametrize(("documents", "number"), [(100, 7), (400, 31), (100, 13), (400, 50)])
def test_the_needed_documents_decide_four_times_in_five(documents: int, number: int) -> None:
    verdict = certify_quantile(exceeding(documents, number), quantile=0.9, max_drop=1.0)
    assert verdict.status == "INCONCLUSIVE" and verdict.needed > documents
    share = number / documents
    counts = np.arange(verdict.needed + 1)
    chance = stats.binom.pmf(counts, verdict.needed, share)
    low = stats.binom.cdf(counts, verdict.needed, 0.1) <= 0.05
    high = stats.binom.sf(counts - 1, verdict.needed, 0.1) <= 0.05
    assert float(chance[low | high].sum()) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("quantile", [0.0, 1.0, math.nan, -1])
def test_what_is_no_quantile(quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        certify_quantile([1.0, 2.0], quantile=quantile, max_drop=1.0)
    with pytest.raises(ValueError, match="quantile"):
        cp.Budget("kl", max_drop=0.1, quantile=quantile)


def test_values_that_are_none() -> None:
    with pytest.raises(ValueError, match="no documents"):
        certify_quantile([], quantile=0.5, max_drop=1.0)
    with pytest.raises(ValueError, match="not finite at items"):
        certify_quantile([1.0, math.nan], quantile=0.5, max_drop=1.0)


def test_what_few_documents_foresee_is_what_many_show() -> None:
    rng = np.random.default_rng(0)
    bounds = []
    for _ in range(200):
        many = rng.lognormal(-3, 0.7, 400)
        bounds.append(certify_quantile(many, quantile=0.99, max_drop=1.0).bound)
    seen = foreseen_quantile(
        rng.lognormal(-3, 0.7, 5000), quantile=0.99, confidence=0.95, documents=400
    )
    assert seen.bound == pytest.approx(np.median(bounds), rel=0.1)
    assert seen.value == pytest.approx(math.exp(-3 + 0.7 * stats.norm.ppf(0.99)), rel=0.05)
    # Its error is how far the two are apart from sample to sample.
    apart, errors = [], []
    for bound in bounds:
        few = foreseen_quantile(
            rng.lognormal(-3, 0.7, 20), quantile=0.99, confidence=0.95, documents=400
        )
        apart.append(math.log(bound / few.bound))
        errors.append(few.stderr / few.bound)
    assert np.std(apart) == pytest.approx(np.mean(errors), rel=0.2)


# ------------------------------------------------------------------------------------- the budget


def test_budgets_that_cannot_be() -> None:
    for metric in ("loss", "accuracy", "top1"):
        with pytest.raises(ValueError, match="a quantile is of the KL divergence"):
            cp.Budget(metric, max_drop=0.1, quantile=0.99)
    with pytest.raises(ValueError, match="a quantile is of the KL divergence"):
        cp.Budget("kl", max_bytes=10, quantile=0.99)
    with pytest.raises(ValueError, match="top1 drops are fractions"):
        cp.Budget("top1", max_drop=2)
    with pytest.raises(ValueError, match="loss, accuracy, kl or top1"):
        cp.Budget("perplexity", max_drop=2)
    assert "quantile" not in cp.Budget("kl", max_drop=0.1).to_dict()
    assert cp.Budget("kl", max_drop=3, quantile=np.float64(0.5)).to_dict()["quantile"] == 0.5


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 5)) for _ in range(2))
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b[2].weight += 0.05 * torch.randn(5, 24)
    return a, b


def test_agreement_of_independent_items_is_the_exact_test() -> None:
    a, b = pair()
    x = torch.randn(300, 8)
    verdict = cp.certify(
        a, b, [(x, torch.zeros(300, dtype=torch.long))], cp.Budget("top1", max_drop=0.1)
    )
    same = a(x).argmax(1) == b(x).argmax(1)
    expected = cp.certify_values(np.ones(300), same.numpy(), max_drop=0.1, bounds=(0, 1))
    assert verdict.drop == pytest.approx(float((~same).double().mean()))
    assert (verdict.bound, verdict.status) == (expected.bound, expected.status)
    assert (verdict.metric, verdict.measure, verdict.baseline) == ("top1", "fraction", 1.0)


def test_quantiles_are_over_documents_and_count_what_counts() -> None:
    a, b = pair()
    x, y = torch.randn(120, 8), torch.zeros(120, dtype=torch.long)
    y[::3] = -100
    items = [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(120)]

    class Named(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    split = cp.Split(items=tuple(items), documents=tuple(f"d{i // 6}" for i in range(120)))
    budget = cp.Budget("kl", max_drop=1.0, quantile=0.8)
    found = cp.certify(Named(a), Named(b), split, budget, loss="classification")
    with torch.no_grad():
        p, q = a(x).double().log_softmax(1), b(x).double().log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).view(20, 6)[:, [1, 2, 4, 5]].mean(1).numpy()
    assert found.drop == pytest.approx(np.sort(kl)[15], abs=1e-6)
    assert (found.items, found.clusters, found.status) == (80, 20, "CERTIFIED")
    few = cp.certify(
        Named(a),
        Named(b),
        split,
        cp.Budget("kl", max_drop=1.0, quantile=0.99),
        loss="classification",
    )
    assert few.needed == 299 * 4 and few.status == "INCONCLUSIVE"


@pytest.mark.parametrize(
    "budget",
    [
        cp.Budget("kl", max_drop=0.03),
        cp.Budget("top1", max_drop=0.15),
        cp.Budget("kl", max_drop=0.2, quantile=0.9),
    ],
)
def test_compress_searches_and_certifies_by_the_metric(budget: cp.Budget) -> None:
    a, _ = pair()
    torch.manual_seed(1)
    data = [(torch.randn(32, 8), torch.randint(0, 5, (32,))) for _ in range(16)]
    options = [cp.Quantize(bits=bits) for bits in (2, 3, 4, 8)]
    result = cp.compress(a, data, options=options, budget=budget)
    assert result.verdict is not None and result.verdict.status == "CERTIFIED"
    assert result.verdict.metric.endswith(budget.metric)
    # It went as far as it could: some layer has fewer than 8 bits.
    assert any("int8" not in key for key in result.plan.choices.values())
    # The certify split's figure is that of the shipped model.
    fresh = [(torch.randn(400, 8), torch.randint(0, 5, (400,)))]
    again = cp.certify(a, result.model, fresh, budget)
    assert again.drop < 2 * budget.max_drop


def test_a_recipe_runs_by_the_metric(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, budget="budget: {metric: kl, max_drop: 0.05}")
    done = run(recipe, tmp_path / "run", progress=False)
    assert done.exit_code == 0 and done.record is not None
    verdict = done.record.verdict
    assert verdict.metric == "kl" and verdict.measure == "nats/token"
    assert "mean KL divergence of the compressed model from the uncompressed one" in done.summary
    page = (tmp_path / "run/report.html").read_text()
    assert "mean KL divergence" in page
    from curvprune.run import compare_folders

    found = compare_folders(tmp_path / "tiny", tmp_path / "run/model", recipe, progress=False)
    assert found.record.kl.value == pytest.approx(verdict.drop, rel=1e-4)
    # What a run of another loss has measured does not fit.
    text = recipe.read_text().replace("metric: kl", "metric: loss")
    other = tmp_path / "other.yaml"
    other.write_text(text)
    with pytest.raises(RecipeError, match="measured another loss"):
        run(other, tmp_path / "again", progress=False, reuse=tmp_path / "run")


def test_a_recipe_with_too_few_documents_for_its_quantile(tmp_path: Path) -> None:
    budget = "budget: {metric: kl, max_drop: 0.3, quantile: 0.99}"
    recipe = tiny.write_recipe(tmp_path, budget=budget)
    assert load_recipe(recipe).budget.quantile == 0.99
    with pytest.raises(RecipeError, match=r"budget\.quantile: .* takes 299 at least"):
        check(recipe)
    median = recipe.read_text().replace("0.99", "0.5")
    recipe.write_text(median)
    power = check(recipe).power
    assert power is not None and power.chance == 1.0


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("{metric: loss, max_drop: 0.1, quantile: 0.9}", "budget.quantile"),
        ("{metric: kl, max_bytes: 1000, quantile: 0.9}", "budget.quantile"),
        ("{metric: kl, max_drop: 0.1, quantile: 2}", "budget.quantile"),
        ("{metric: top1, max_drop: 5}", "is not a fall of top1"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, budget: str, message: str) -> None:
    path = tiny.write_recipe(tmp_path, budget=f"budget: {budget}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
