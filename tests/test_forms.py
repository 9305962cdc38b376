"""Quadratic forms of other curvatures against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.curvature import Change, kfac
from curvprune.model import Classification, find_layers
from curvprune.pricing import Parts, quadratic_forms


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    items = [(torch.randn(1, 3, dtype=torch.float64), torch.tensor([i % 3])) for i in range(5)]
    layers = find_layers(model)
    deltas = {
        n: [torch.randn(layer.shape, dtype=torch.float64) for _ in range(2)]
        for n, layer in layers.items()
    }
    return model, items, layers, deltas, {n: [Change.of(d) for d in ds] for n, ds in deltas.items()}


def test_the_hessian_form_is_the_second_derivative_along_the_change():
    model, items, layers, deltas, changes = small()
    forms = quadratic_forms("hessian", model, Classification(), items, layers, changes)
    assert forms.count.tolist() == [1] * 5
    for name, layer in layers.items():
        for k, delta in enumerate(deltas[name]):
            for i, (x, y) in enumerate(items):

                def loss(
                    t: torch.Tensor, name=name, delta=delta, layer=layer, x=x, y=y
                ) -> torch.Tensor:
                    weights = {f"{name}.weight": layer.weight.detach() + t * delta}
                    return nn.functional.cross_entropy(
                        torch.func.functional_call(model, weights, (x,)), y
                    )

                exact = torch.autograd.functional.hessian(
                    loss, torch.zeros((), dtype=torch.float64)
                )
                assert float(forms.sums[name][i, k]) == pytest.approx(
                    0.5 * float(exact), rel=1e-6, abs=1e-12
                )


def test_input_and_kfac_forms_are_those_of_the_dense_factors():
    model, items, layers, deltas, changes = small()
    whole = quadratic_forms("input", model, Classification(), items, layers, changes, parts=Parts(count=1))
    x = torch.cat([x for x, _ in items])
    for k, delta in enumerate(deltas["0"]):
        exact = 0.5 * float((x @ delta.T).square().sum(1).mean())
        assert float(whole.sums["0"][0, k]) / 5 == pytest.approx(exact)
    whole = quadratic_forms(
        "kfac", model, Classification(), items, layers, changes, parts=Parts(count=1, seed=3)
    )
    blocks = kfac(model, Classification(), items, layers, seed=3).blocks
    for name in layers:
        for k, delta in enumerate(deltas[name]):
            exact = 0.5 * float(blocks[name].quad(delta.flatten()))
            assert float(whole.sums[name][0, k]) / 5 == pytest.approx(exact)
    parts = quadratic_forms("input", model, Classification(), items, layers, changes, parts=Parts(count=2))
    assert parts.count.tolist() == [3, 2]
    torch.testing.assert_close(
        sum(parts.sums["0"]),
        whole.sums["0"][0] * 0 + 0.5 * torch.stack([(x @ d.T).square().sum() for d in deltas["0"]]),
    )


def test_every_curvature_prices_through_the_public_door_and_bad_ones_are_refused():
    model, items, _, _, _ = small()
    options = [cp.Quantize(bits=2), cp.Quantize(bits=6)]
    for curvature in ("fisher", "diagonal", "kfac", "hessian", "input"):
        ledger = cp.price(
            model, items, options=options, curvature=curvature, objective="classification"
        )
        assert len(ledger.rows) == 4 and ("no unit" in ledger.measure) == (curvature == "input")
        assert cp.Ledger.from_dict(ledger.to_dict()).rows == ledger.rows
        coarse, fine = (ledger.predict(dict.fromkeys(("0", "2"), o)).value for o in options)
        assert abs(coarse) > abs(fine)
    with pytest.raises(ValueError, match="curvature='magic' is unknown"):
        cp.price(model, items, options=options, curvature="magic", objective="classification")
    with pytest.raises(ValueError, match="cannot plan for max_drop"):
        cp.compress(
            model, items * 8, options=options, budget=cp.Budget("loss", max_drop=0.1), objective="classification",
            settings=cp.Settings(curvature="input"),
        )  # fmt: skip
