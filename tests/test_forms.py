"""Quadratic forms of other curvatures against dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import curvprune as cp
from curvprune.curvature import Change, kfac
from curvprune.model import Batch, Classification, Layer, find_layers
from curvprune.pricing import Forms, Parts, quadratic_forms


@dataclass(frozen=True)
class Small:
    """A small model with two changes of each layer."""

    model: nn.Module
    items: list[Batch]
    layers: dict[str, Layer]
    deltas: dict[str, list[Tensor]]
    changes: dict[str, list[Change]]


def small() -> Small:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    items = [(torch.randn(1, 3, dtype=torch.float64), torch.tensor([i % 3])) for i in range(5)]
    layers = find_layers(model)
    deltas: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        deltas[name] = [torch.randn(layer.shape, dtype=torch.float64) for _ in range(2)]
    changes = {n: list(map(Change.of, ds)) for n, ds in deltas.items()}
    return Small(model, items, layers, deltas, changes)


def loss_along(t: Tensor, case: Small, item: Batch, name: str, delta: Tensor) -> Tensor:
    """The loss of one item with a layer's weight moved by ``t · δ``."""
    x, y = item
    weights = {f"{name}.weight": case.layers[name].weight.detach() + t * delta}
    return nn.functional.cross_entropy(torch.func.functional_call(case.model, weights, (x,)), y)


def test_the_hessian_form_is_the_second_derivative_along_the_change() -> None:
    case = small()
    forms = quadratic_forms(
        "hessian", case.model, Classification(), case.items, case.layers, case.changes
    )
    assert forms.count.tolist() == [1] * 5
    zero = torch.zeros((), dtype=torch.float64)
    for name, deltas in case.deltas.items():
        for k, delta in enumerate(deltas):
            for i, item in enumerate(case.items):
                loss = partial(loss_along, case=case, item=item, name=name, delta=delta)
                exact = 0.5 * float(torch.autograd.functional.hessian(loss, zero))
                found = float(forms.sums[name][i, k])
                assert found == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_input_and_kfac_forms_are_those_of_the_dense_factors() -> None:
    case = small()

    def forms_of(kind: str, parts: Parts) -> Forms:
        return quadratic_forms(
            kind, case.model, Classification(), case.items, case.layers, case.changes, parts=parts
        )

    # Half the squared error of the outputs.
    x = torch.cat([x for x, _ in case.items])
    squares = [float((x @ delta.T).square().sum()) for delta in case.deltas["0"]]
    whole = forms_of("input", Parts(count=1))
    assert whole.sums["0"][0].tolist() == pytest.approx([0.5 * s for s in squares])
    # Interleaved parts add up to the same.
    parts = forms_of("input", Parts(count=2))
    assert parts.count.tolist() == [3, 2]
    assert sum(parts.sums["0"]).tolist() == pytest.approx([0.5 * s for s in squares])
    # The Kronecker product itself.
    whole = forms_of("kfac", Parts(count=1, seed=3))
    blocks = kfac(case.model, Classification(), case.items, case.layers, seed=3).blocks
    for name, deltas in case.deltas.items():
        dense = blocks[name].to_dense()
        for k, delta in enumerate(deltas):
            exact = 0.5 * float(delta.flatten() @ dense @ delta.flatten())
            assert float(whole.sums[name][0, k]) / 5 == pytest.approx(exact)


def test_every_curvature_prices_through_the_public_door_and_bad_ones_are_refused() -> None:
    case = small()
    options = [cp.Quantize(bits=2), cp.Quantize(bits=6)]
    price = partial(cp.price, case.model, case.items, options=options, objective="classification")
    for curvature in ("fisher", "diagonal", "kfac", "hessian", "input"):
        ledger = price(curvature=curvature)
        assert len(ledger.rows) == 4 and ("no unit" in ledger.measure) == (curvature == "input")
        assert cp.Ledger.from_dict(ledger.to_dict()).rows == ledger.rows
        coarse, fine = (ledger.predict(dict.fromkeys(("0", "2"), o)).value for o in options)
        assert abs(coarse) > abs(fine)
    with pytest.raises(ValueError, match="curvature='magic' is unknown"):
        price(curvature="magic")
    with pytest.raises(ValueError, match="cannot plan for max_drop"):
        cp.compress(
            case.model,
            case.items * 8,
            options=options,
            budget=cp.Budget("loss", max_drop=0.1),
            objective="classification",
            settings=cp.Settings(curvature="input"),
        )
