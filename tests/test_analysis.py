"""What an analysis hands over: refused settings, records, and parts that an interrupted one left
behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.curvature import (
    Analysis,
    AnalysisRecord,
    AnalysisSettings,
    Estimate,
    LayerCurvature,
    analyze_curvature,
    probe_layers,
)
from curvprune.model import Batch, Classification, find_layers
from curvprune.schema import Json, decode, encode

R = TypeVar("R")


def classifier() -> tuple[nn.Module, list[Batch]]:
    """A network whose first layer is probed, and whose others are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    ).double()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.mul_(2)
    return model, [(torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 3, (8,)))]


@dataclass
class Notebook:
    """Keeps the parts of an analysis as JSON texts, as a run's folder does; after ``last`` computed
    parts it is interrupted."""

    last: int = 1000
    pages: dict[str, str] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)

    def __call__(self, key: str, kind: type[R], compute: Callable[[], R]) -> R:
        if key in self.pages:
            kept: Json = json.loads(self.pages[key])
            return decode(kind, kept, source=key)
        if len(self.computed) == self.last:
            raise KeyboardInterrupt
        self.computed.append(key)
        value = compute()
        self.pages[key] = json.dumps(encode(value))
        return value


def analyzed(asked: AnalysisSettings, notebook: Notebook | None = None) -> Analysis:
    model, data = classifier()
    layers = find_layers(model)
    return analyze_curvature(model, Classification(), data, layers, asked, remember=notebook)


def test_an_interrupted_analysis_goes_on_to_the_same_record() -> None:
    """Every part is computed once, wherever it is interrupted."""
    quantities = ("trace", "diagonal", "eigenvalues", "density", "layer-densities")
    asked = AnalysisSettings(quantities=quantities, max_products=8)
    notebook = Notebook()
    fresh = analyzed(asked, notebook)
    whole = fresh.to_record()
    layers = ("exact", "traces-0", "eigenvalues-0", "density-0", "density-1", "density-2")
    parts = [*layers, "model-eigenvalues", "model-trace", "model-density"]
    assert notebook.computed == parts

    notebook = Notebook(last=4)
    with pytest.raises(KeyboardInterrupt):
        analyzed(asked, notebook)
    assert notebook.computed == parts[:4]
    notebook.last = 1000
    resumed = analyzed(asked, notebook)
    assert notebook.computed == parts
    assert resumed.to_record() == whole
    # What was found on disk has no tensors of diagonals; what was computed keeps its own.
    assert all(layer.diagonal is None for layer in resumed.layers.values())
    assert all(layer.diagonal is not None for layer in fresh.layers.values())
    for name in ("2", "4"):
        assert torch.equal(fresh.layers[name].spectrum, resumed.layers[name].spectrum)


def test_what_an_analysis_writes_is_read_back_as_the_same_record() -> None:
    analysis = analyzed(AnalysisSettings(max_products=12))
    record = analysis.to_record()
    written = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    assert written == encode(record) and written["measure"] == "nats/example"
    assert decode(AnalysisRecord, written, source="analysis.json") == record
    for name, layer in analysis.layers.items():
        found = record.layers[name]
        assert found.parameters == layer.diagonal.numel() and found.shape == layer.shape
        flat = layer.diagonal.flatten().sort().values
        assert found.diagonal.mean == pytest.approx(float(flat.mean()))
        assert found.diagonal.max == float(flat[-1])
        assert found.diagonal.q50 == float(flat[len(flat) // 2 - 1])
        assert found.trace.value == layer.trace.value and found.trace.method == layer.method
    diagnosis = record.diagnosis
    assert diagnosis.sharpness == diagnosis.lambda_max == max(record.model.eigenvalues.values)


def test_numbers_that_are_not_finite_are_written_as_none() -> None:
    """A standard error over one item is infinite."""
    layer = LayerCurvature(
        trace=Estimate(value=2.0, stderr=math.inf),
        diagonal=torch.ones(1, 2),
        shape=(1, 2),
    )
    written = Analysis(matrix="Fisher", layers={"fc": layer}).to_dict()["layers"]["fc"]
    assert written["trace"]["value"] == 2.0 and written["trace"]["stderr"] is None
    assert written["diagonal"]["error"] is None


def test_layers_where_hessian_and_gauss_newton_part_are_listed() -> None:
    """Of the first layer, whose path to the loss is curved; against dense matrices."""
    model, data = classifier()
    quantities = ["trace", "density"]
    analysis = cp.analyze(
        model,
        data,
        quantities=quantities,
        rtol=0.01,
        max_products=100,
        objective="classification",
    )
    (listed,) = analysis.diagnosis.disagreements
    traces = []
    for operator in (cp.hessian, cp.gauss_newton):
        block = operator(model, data, objective="classification", parameters="0.weight")
        traces.append(float(block.to_dense().trace()))
    hessian, gauss_newton = traces
    error = analysis.layers["0"].trace.stderr
    assert listed.layer == "0" and abs(hessian - gauss_newton) > 0.2 * gauss_newton + 2 * error
    assert listed.hessian == pytest.approx(hessian, abs=4 * error)
    assert listed.gauss_newton == pytest.approx(gauss_newton, rel=1e-6)
    assert listed.ratio == listed.hessian / listed.gauss_newton
    assert (
        "In 1 of 3 layers the Hessian and Gauss–Newton traces differ" in analysis.diagnosis.text[-1]
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"matrix": "magic"}, "matrix='magic': expected one of hessian, ggn"),
        ({"quantities": ["trace", "rank"]}, "quantity 'rank': expected some of trace"),
        ({"rtol": 0.0}, "rtol must be positive and max_products at least 8, got 0.0 and 32"),
        ({"max_products": 7}, "rtol must be positive and max_products at least 8, got 0.05 and 7"),
        ({"matrix": "fisher", "quantities": ["density"]}, "pass matrix='ggn'"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, object], message: str) -> None:
    model, data = classifier()
    with pytest.raises(ValueError, match=message):
        cp.analyze(model, data, objective="classification", **wrong)


def test_a_restricted_probe_never_stands_on_a_few_samples() -> None:
    """Two or three samples can agree by chance and would outweigh eight joint ones. Of a second
    kind of probe there are at least eight, or none."""
    model, data = classifier()
    names = {n: f"{n}.weight" for n in find_layers(model)}
    operator = cp.hessian(model, data, objective="classification", parameters=list(names.values()))
    restricted = set()
    for most in (9, 15, 16, 18, 40):
        generator = torch.Generator().manual_seed(0)
        probe = partial(probe_layers, operator, names, generator=generator)
        for found in probe(rtol=1e-6, max_products=most).values():
            restricted.add(found.restricted)
            assert found.restricted == 0 or found.restricted >= 8
            assert found.joint + found.restricted == most and not found.trace.converged
    assert 0 in restricted and len(restricted) > 1
