"""Prices against closed forms: the draws behind them, the shrinkage, and predictions of plans with
their errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from curvprune.curvature import Change, Draws, FisherPass, fisher_pass, ratio_estimate
from curvprune.model import Classification, find_layers
from curvprune.pricing import Ledger, build_ledger


def measured(along: torch.Tensor, diagonal: torch.Tensor) -> FisherPass:
    """A pass over ``(items, layers)`` with one change per layer and one position per item."""
    signs = torch.randint(0, 2, along.shape, generator=torch.Generator().manual_seed(9)) * 2 - 1
    names = [f"layer{i}" for i in range(along.shape[1])]
    return FisherPass(
        count=torch.ones(len(along), dtype=torch.float64),
        along={
            n: (2 * along[:, i : i + 1]).sqrt()[:, :, None] * signs[:, i, None, None]
            for i, n in enumerate(names)
        },
        diagonals={n: diagonal[:, i : i + 1] for i, n in enumerate(names)},
        traces={n: torch.ones(len(along), dtype=torch.float64) for n in names},
        diagonal={n: torch.ones(1, 1) for n in names},
        labels=1,
        slopes={},
    )


def ledger_of(along: torch.Tensor, diagonal: torch.Tensor) -> Ledger:
    found = measured(along, diagonal)
    return build_ledger(
        found,
        {n: {"o": 1} for n in found.along},
        changed={n: ["o"] for n in found.along},
        measure="nats",
    )


def simulated(generator: torch.Generator, *, spread: float, layers: int = 60, items: int = 40):
    """True prices around a known diagonal, seen through one squared normal per item."""
    diagonal = torch.rand(layers, generator=generator, dtype=torch.float64) + 0.5
    true = diagonal * (
        1.2 + spread * torch.randn(layers, generator=generator, dtype=torch.float64)
    ).clamp_min(0.1)
    noise = torch.randn(items, layers, generator=generator, dtype=torch.float64) ** 2
    return true, true * noise, diagonal.expand(items, layers)


def test_what_signs_back_propagate_has_the_covariance_of_the_softmax():
    logits = torch.randn(
        2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    generator, draws = torch.Generator().manual_seed(0), 8000
    total = torch.zeros(8, 8, dtype=torch.float64)
    for _ in range(draws):
        drawn = Classification().draw(logits, {}, generator).sum()
        (g,) = torch.autograd.grad(drawn, logits)
        total += torch.outer(g.flatten(), g.flatten()) / draws
    p = logits.detach().softmax(-1)
    expected = torch.block_diag(*(row.diag() - torch.outer(row, row) for row in p))
    torch.testing.assert_close(total, expected, rtol=0, atol=0.012)


def test_signs_vary_less_than_labels_where_a_class_is_rare():
    """One position, p = (.98, .02): a label gives (u₁ − u₂)² p₂² or p₁², signs almost always p₁p₂
    times that."""
    logits = torch.tensor(
        [[math.log(0.98), math.log(0.02)]], dtype=torch.float64, requires_grad=True
    )
    squares = []
    for seed in range(200):
        drawn = Classification().draw(logits, {}, torch.Generator().manual_seed(seed)).sum()
        (g,) = torch.autograd.grad(drawn, logits)
        squares.append(float(g[0, 0] ** 2))
    values = torch.tensor(squares, dtype=torch.float64)
    labels = math.sqrt(0.98 * 0.02**4 + 0.02 * 0.98**4 - (0.98 * 0.02) ** 2)
    assert values.mean() == pytest.approx(0.98 * 0.02, rel=0.05)
    assert values.std() < 0.3 * labels


def test_shrinking_lowers_the_error_whether_ratios_scatter_little_or_much():
    generator = torch.Generator().manual_seed(0)
    for spread, gain in ((0.05, 0.5), (0.2, 0.85), (2.0, 1.03)):
        before = after = 0.0
        for _ in range(20):
            true, along, diagonal = simulated(generator, spread=spread)
            priced = torch.tensor(
                [row.price for row in ledger_of(along, diagonal).rows], dtype=torch.float64
            )
            before += float((along.mean(0) - true).square().sum())
            after += float((priced - true).square().sum())
        assert after < gain * before, f"spread {spread}: {after / before}"


def test_a_layer_unlike_the_others_keeps_its_price_within_one_standard_error():
    _, along, diagonal = simulated(torch.Generator().manual_seed(1), spread=0.05)
    along[:, 7] *= 8
    row = ledger_of(along, diagonal).rows[7]
    assert row.price > 0.7 * float(along[:, 7].mean())


def test_errors_are_those_of_the_prices_and_of_a_plan():
    """Coverage over repeated simulations, rows and plans of all layers."""
    generator = torch.Generator().manual_seed(2)
    rows, plans = [], []
    for _ in range(40):
        true, along, diagonal = simulated(generator, spread=0.25)
        ledger = ledger_of(along, diagonal)
        rows += [(r.price - float(t)) / r.stderr for r, t in zip(ledger.rows, true, strict=True)]
        plan = ledger.predict({r.layer: "o" for r in ledger.rows})
        plans.append((plan.value - float(true.sum())) / plan.stderr)
        alone = sum(r.price for r in ledger.rows)
        assert alone == pytest.approx(float(along.sum()) / len(along)), "what was measured in all"
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict(), allow_nan=False)))
    assert again.rows == ledger.rows
    assert 0.8 < torch.tensor(rows).square().mean().sqrt() < 1.35
    assert 0.5 < torch.tensor(plans).square().mean().sqrt() < 1.5


def test_few_layers_and_changes_of_nothing_keep_the_measured_price():
    _, along, diagonal = simulated(torch.Generator().manual_seed(3), spread=0.1, layers=5)
    along[:, 2], diagonal = 0.0, diagonal.clone()
    diagonal[:, 2] = 0.0
    for i, row in enumerate(ledger_of(along, diagonal).rows):
        expected = ratio_estimate(along[:, i], torch.ones(len(along), dtype=torch.float64))
        assert row.price == pytest.approx(expected.value)
        assert row.stderr == pytest.approx(expected.stderr) and row.model_stderr == 0.0
    _, along, diagonal = simulated(torch.Generator().manual_seed(3), spread=0.1, layers=20)
    along[:, 2], diagonal = 0.0, diagonal.clone()
    diagonal[:, 2] = 0.0
    ledger = ledger_of(along, diagonal)
    assert ledger.rows[2].price == 0.0
    assert all(math.isfinite(r.price) and r.stderr > 0 for r in ledger.rows[3:])


@pytest.mark.slow
def test_pairs_of_layers_count_as_far_as_they_are_no_noise():
    """A plan of two layers against the exact Fisher of both together, and layers that have nothing
    to do with each other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)
    ).double()
    items = [(torch.randn(1, 3, dtype=torch.float64), torch.tensor([0])) for _ in range(4)]
    layers = find_layers(model)
    deltas = {n: torch.randn(layer.shape, dtype=torch.float64) for n, layer in layers.items()}
    found = fisher_pass(
        model,
        Classification(),
        items,
        layers,
        {n: [Change.of(d)] for n, d in deltas.items()},
        draws=Draws(labels=1500),
    )
    ledger = build_ledger(
        found, {n: {"o": 1} for n in layers}, changed={n: ["o"] for n in layers}, measure="nats"
    )
    exact = apart = 0.0
    for x, _ in items:
        log_p = model(x)[0].log_softmax(0)
        for value in log_p:
            grads = torch.autograd.grad(
                value, [layer.weight for layer in layers.values()], retain_graph=True
            )
            parts = [float((g * d).sum()) for g, d in zip(grads, deltas.values(), strict=True)]
            weight = 0.5 * float(value.detach().exp()) / len(items)
            exact += weight * sum(parts) ** 2
            apart += weight * sum(p**2 for p in parts)
    plan = dict.fromkeys(layers, "o")
    assert abs(exact - apart) > 0.1 * exact, "the pair must matter"
    assert 0.95 < ledger.kept <= 1
    assert ledger.predict(plan).value == pytest.approx(exact, rel=0.06)
    assert Ledger.from_dict(ledger.to_dict()).predict(plan) == ledger.predict(plan)
    quadratic = ledger.quadratic()
    assert quadratic is not None
    assert quadratic.value(plan) == pytest.approx(ledger.predict(plan).value, rel=1e-9)
    assert replace(ledger, kept=0.0).quadratic() is None
    assert replace(ledger, along=None).quadratic() is None
    _, along, diagonal = simulated(torch.Generator().manual_seed(5), spread=0.2)
    assert ledger_of(along, diagonal).kept < 0.1


def test_a_standard_error_that_one_item_cannot_tell_is_null_in_the_file():
    _, along, diagonal = simulated(torch.Generator().manual_seed(6), spread=0.1, layers=2, items=1)
    ledger = ledger_of(along, diagonal)
    assert math.isinf(ledger.rows[0].stderr)
    written = json.loads(json.dumps(ledger.to_dict(), allow_nan=False))
    assert written["rows"][0]["stderr"] is None
    assert list(written["rows"][0])[:4] == ["layer", "option", "bytes", "price"]
    assert Ledger.from_dict(written).rows == ledger.rows
    with pytest.raises(ValueError, match=r"this ledger does not hold.*rows\.1\.price"):
        del written["rows"][1]["price"]
        Ledger.from_dict(written)
