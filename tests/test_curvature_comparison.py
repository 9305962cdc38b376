"""Two models' curvature on the same items: against dense matrices of every item, and figures."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import nn

import curvprune as cp
from curvprune.curvature import CurvatureComparison
from curvprune.model import Classification
from curvprune.schema import decode
from tests.dense_curvature import dense
from tests.networks import mlp, seeded

LOSS = Classification()


def data(n: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [(x, (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 0.5).long())]


def trained(steps: int) -> nn.Module:
    model = mlp().eval()
    for _ in range(steps):
        model.zero_grad()
        ((x, y),) = data()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    return model


@cache
def compared() -> CurvatureComparison:
    return cp.compare_curvature(trained(0), trained(200), data())


def each(model: nn.Module) -> torch.Tensor:
    """The dense Hessian of every item."""
    names = [n for n, _ in model.named_parameters()]
    ((x, y),) = data()
    found = []
    for i in range(len(x)):
        found.append(dense(model, [(x[i : i + 1], y[i : i + 1])], LOSS, "hessian", names).detach())
    return torch.stack(found)


def test_values_and_paired_errors_are_those_of_brute_force() -> None:
    found = compared()
    hessians = [each(trained(0)), each(trained(200))]
    values = [torch.linalg.eigvalsh(h.mean(0)).numpy() for h in hessians]
    size = max(np.abs(v).max() for v in values)
    assert found.threshold == pytest.approx(1e-3 * size) and found.num_items == 40
    t = found.threshold
    truth = {
        "lambda_max": [v[-1] for v in values],
        "lambda_min": [v[0] for v in values],
        "trace": [v.sum() for v in values],
        "below": [(v < -t).mean() for v in values],
        "within": [(np.abs(v) <= t).mean() for v in values],
        "above": [(v > t).mean() for v in values],
    }
    for name, (a, b) in truth.items():
        assert (found[name].a.value, found[name].b.value) == pytest.approx((a, b), abs=1e-9)
        assert found[name].difference.value == pytest.approx(b - a, abs=1e-9)
        assert found[name].difference.stderr < 1e-9
    # The trace: by the items' own differences, up to the noise of probes.
    traces = [h.diagonal(dim1=1, dim2=2).sum(1) for h in hessians]
    paired = float((traces[1] - traces[0]).std()) / math.sqrt(40)
    assert found["trace"].difference.over_items == pytest.approx(paired, rel=0.25)
    # Shares: without every fifth item, as a jackknife.
    for name, inside in (("below", lambda v: v < -t), ("above", lambda v: v > t)):
        shares = []
        for fold in range(5):
            kept = [i for i in range(40) if i % 5 != fold]
            left = [torch.linalg.eigvalsh(h[kept].mean(0)).numpy() for h in hessians]
            shares.append([inside(v).mean() for v in left])
        apart = np.array(shares)[:, 1] - np.array(shares)[:, 0]
        error = math.sqrt(4 / 5 * ((apart - apart.mean()) ** 2).sum())
        expected = error * student.ppf(0.975, 4) / 2
        assert found[name].difference.over_items == pytest.approx(expected, rel=1e-6)


def test_what_both_models_share_cancels() -> None:
    model = trained(50)
    near = copy.deepcopy(model)
    with torch.no_grad():
        near[0].weight.mul_(1.02)
    found = cp.compare_curvature(model, near, data())
    top = found["lambda_max"]
    assert top.difference.over_items < 0.3 * math.hypot(top.a.over_items, top.b.over_items)
    same = cp.compare_curvature(model, copy.deepcopy(model), data())
    for one in same.quantities:
        assert one.difference.value == 0 and one.difference.over_items == 0
        assert one.distinguishable is False
    assert all("not distinguishable" in sentence for sentence in same.text)


def test_sentences_say_what_is_distinguishable() -> None:
    found = compared()
    for one, sentence in zip(found.quantities, found.text, strict=True):
        error = math.hypot(one.difference.stderr, one.difference.over_items)
        assert one.distinguishable == (abs(one.difference.value) > 2 * error)
        assert ("not distinguishable" in sentence) != one.distinguishable
        assert ("higher" in sentence or "lower" in sentence) == one.distinguishable
    assert any(one.distinguishable for one in found.quantities)
    ((x, y),) = data()
    few = cp.compare_curvature(trained(0), trained(200), [(x[:2], y[:2])])
    assert few["trace"].distinguishable is None and "too few items" in few.text[0]


@pytest.mark.slow
def test_models_of_other_shapes_with_too_many_parameters_for_all_eigenvalues() -> None:
    def wide(width: int) -> nn.Module:
        make = lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))  # noqa: E731
        return seeded(lambda: make().double())

    a, b = wide(140), wide(135)
    found = cp.compare_curvature(a, b, data(), max_products=32)
    assert found.parameters == (1123, 1083)
    assert any("different numbers of parameters" in note for note in found.notes)
    names = [n for n, _ in a.named_parameters()]
    values = torch.linalg.eigvalsh(dense(a, data(), LOSS, "hessian", names).detach()).numpy()
    assert found["lambda_max"].a.value == pytest.approx(values[-1], rel=0.01)
    t = found.threshold
    truth = {"below": (values < -t).mean(), "above": (values > t).mean(), "trace": values.sum()}
    for name, share in truth.items():
        estimate = found[name].a
        assert abs(estimate.value - share) <= 2 * estimate.stderr + 1e-9
        assert estimate.stderr > 0 and estimate.over_items > 0


def test_a_comparison_is_a_record() -> None:
    found = compared()
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert decode(CurvatureComparison, written, source="comparison.json") == found
    with pytest.raises(KeyError, match="'rank': expected one of"):
        found["rank"]


def test_items_that_come_one_by_one_are_dealt_into_folds_as_well() -> None:
    ((x, y),) = data(10)
    single = [(x[i : i + 1], y[i : i + 1]) for i in range(10)]
    found = cp.compare_curvature(trained(0), trained(50), single)
    whole = cp.compare_curvature(trained(0), trained(50), [(x, y)])
    for one in found.quantities:
        other = whole[one.name]
        assert one.difference.value == pytest.approx(other.difference.value, abs=1e-9)
        if one.name in ("below", "within", "above"):
            paired = other.difference.over_items
            assert one.difference.over_items == pytest.approx(paired, abs=1e-9)


def test_arguments_that_make_no_sense() -> None:
    model = trained(0)
    with pytest.raises(ValueError, match="compare_curvature: the data is empty"):
        cp.compare_curvature(model, model, [])
    with pytest.raises(ValueError, match="max_products=2; expected at least 8"):
        cp.compare_curvature(model, model, data(), max_products=2)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[3].bias[0] = math.nan
    with pytest.raises(ValueError, match=r"3.bias of model b holds NaN"):
        cp.compare_curvature(model, broken, data())


# ------------------------------------------------------------------------------------------ figures


def test_figures_have_what_the_records_have() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    found = compared()
    (ax,) = found.plot(names=("before", "after")).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "after"]
    assert ax.get_xscale() == "asinh" and "Hessian" in ax.get_xlabel()
    # A curve's area, on the axis that is drawn, is 1.
    for line in ax.get_lines()[:2]:
        x, y = line.get_data()
        assert np.trapezoid(y, np.arcsinh(x / found.threshold)) == pytest.approx(1, abs=0.01)

    analysis = cp.analyze(trained(50), data(), max_products=16)
    bars, curve = analysis.plot().axes
    shown = [bar.get_width() for bar in bars.patches]
    assert shown == pytest.approx([layer.trace.value for layer in analysis.layers.values()])
    assert len(curve.get_lines()) == 2
    with pytest.raises(ValueError, match="neither traces nor a density"):
        cp.Analysis(matrix="Hessian", layers={}).plot()

    options = [
        cp.Keep(),
        cp.Quantize(bits=4, group_size=None),
        cp.Quantize(bits=2, group_size=None),
    ]
    ledger = cp.price(trained(0).float(), [(x.float(), y) for x, y in data()], options=options)
    heat = ledger.plot().axes[0]
    labels = [text.get_text() for text in heat.get_yticklabels()]
    assert labels == list(dict.fromkeys(row.layer for row in ledger.rows))


def test_without_matplotlib_the_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, curvprune as cp\n"
        "data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "found = cp.analyze(model, data, quantities=['trace'])\n"
        "try: found.plot()\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'curvprune[plot]'" in done.stdout, done.stderr
