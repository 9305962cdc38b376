"""Measured prices against torch's own divergence, and where they take the place of quadratic
ones."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune import run as runs
from curvprune.compression import Moments, solve_layer, visit_layers
from curvprune.model import (
    BROKEN,
    PURPOSES,
    CausalLM,
    Classification,
    Layer,
    Splits,
    as_split,
    collate,
    find_layers,
    split_items,
)
from curvprune.pricing import (
    MEASURED_ROWS,
    MEASURED_TOGETHER,
    Forms,
    Ledger,
    Row,
    build_ledger,
    divergences,
    measure_highest,
)
from curvprune.run import RecipeError
from tests import tiny
from tests.networks import seeded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


def kl(before: torch.Tensor, after: torch.Tensor) -> float:
    return float(
        nn.functional.kl_div(
            after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum"
        )
    )


def test_each_change_alone_is_measured_and_the_weights_come_back():
    torch.manual_seed(0)
    model = Net().double().train()  # dropout and statistics must not matter
    model.norm.running_var.uniform_(0.5, 2)
    items = [(torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.tensor([i])) for i in range(3)]
    layers = find_layers(model)
    changed = [
        (n, torch.randn(layers[n].shape, dtype=torch.float64)) for n in ("conv", "fc", "conv")
    ]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = divergences(model, Classification(), items, layers, changed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    model.eval()
    for i, (x, _) in enumerate(items):
        for k, (name, weight) in enumerate(changed):
            other = copy.deepcopy(model)
            find_layers(other)[name].write_(weight)
            assert float(found[i, k]) == pytest.approx(kl(model(x), other(x)), rel=1e-9)


def test_padding_and_ignored_labels_do_not_count():
    model = tiny.llama()
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[:, 9:], labels[:, 9:], labels[:, :4] = 0, -100, -100
    item = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    layers = find_layers(model, "model.layers.*")
    name = next(iter(layers))
    weight = layers[name].weight.detach() * 2
    (found,) = divergences(model, CausalLM(), [item], layers, [(name, weight)])
    other = copy.deepcopy(model)
    find_layers(other)[name].write_(weight)
    with torch.no_grad():
        at = slice(3, 8)  # the positions whose next token has a label
        expected = kl(model(ids[:, :9]).logits[0, at], other(ids[:, :9]).logits[0, at])
    assert float(found[0]) == pytest.approx(expected, rel=1e-4)


def test_an_item_that_fails_leaves_the_weights_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    items = [(torch.randn(1, 3), torch.tensor([0]))]
    before, calls = model[0].weight.clone(), []

    def fail(*_) -> None:
        calls.append(1)
        if len(calls) == 2:  # the changed model
            raise RuntimeError("out of memory")

    model[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        divergences(model, Classification(), items, find_layers(model), [("0", torch.randn(4, 3))])
    assert torch.equal(model[0].weight, before)


def ledger_of(prices: dict[str, float], *, scatter: float = 0.0) -> Ledger:
    """Layers with one option each, and quadratic prices from four items that scatter as asked."""
    items = 1 + scatter * torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    forms = Forms(
        count=torch.ones(4, dtype=torch.float64),
        sums={name: (price * items).unsqueeze(1) for name, price in prices.items()},
    )
    keys = {name: ["o"] for name in prices}
    sizes = {name: {"o": 1} for name in prices}
    return build_ledger(forms, sizes, changed=keys, measure="nats", curvature="kfac")


@dataclass
class Costs:
    """What changes cost when they are measured: their quadratic prices times ``ratios``, by the
    number of the block; remembers the rows that it was asked for."""

    ratios: list[float]
    asked: list[list[str]] = field(default_factory=list)

    def __call__(self, rows: Sequence[Row], before: int) -> dict[tuple[str, str], np.ndarray]:
        assert before == sum(map(len, self.asked))
        ratio = self.ratios[min(len(self.asked), len(self.ratios) - 1)]
        self.asked.append([row.layer for row in rows])
        return {(row.layer, row.option): np.full(4, ratio * row.price) for row in rows}


# Prices from 12 down to 1, in no order.
TWELVE = {f"layer{i}": float(1 + 5 * i % 12) for i in range(12)}
HIGHEST_FIRST = sorted(TWELVE, key=lambda name: -TWELVE[name])


@pytest.mark.parametrize(
    ("ratios", "blocks"),
    [([1.1], 1), ([0.9], 1), ([3.0, 1.1], 2), ([0.5, 0.9], 2), ([3.0, 0.5, 1.0], 3), ([2.0], 3)],
)
def test_the_highest_prices_are_measured_until_they_agree(ratios: list[float], blocks: int) -> None:
    quadratic, costs = ledger_of(TWELVE), Costs(ratios)
    ledger, note = measure_highest(quadratic, costs, least=0.0)
    assert [len(names) for names in costs.asked] == [MEASURED_TOGETHER] * blocks
    asked = list(chain.from_iterable(costs.asked))
    assert asked == HIGHEST_FIRST[: MEASURED_TOGETHER * blocks] and note == ""
    for row, before in zip(ledger.rows, quadratic.rows, strict=True):
        if row.layer not in asked:
            assert row == before and not row.measured
            continue
        block = asked.index(row.layer) // MEASURED_TOGETHER
        assert row.measured and row.model_stderr == 0
        ratio = ratios[min(block, len(ratios) - 1)]
        assert row.price == pytest.approx(ratio * before.price)
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert again.rows == ledger.rows


@pytest.mark.parametrize(("scatter", "ratio", "blocks"), [(0.1, 2, 3), (3.0, 2, 1), (3.0, 2.5, 3)])
def test_what_the_items_scatter_is_no_disagreement(
    scatter: float, ratio: float, blocks: int
) -> None:
    """Four items of 1 ± 3 have a standard error of √3, and a block of four such prices 2√3 in 4."""
    costs = Costs([float(ratio)])
    equal = ledger_of(dict.fromkeys(TWELVE, 1.0), scatter=scatter)
    assert equal.rows[0].stderr == pytest.approx(scatter / math.sqrt(3))
    measure_highest(equal, costs, least=0.0)
    assert len(costs.asked) == blocks


def test_none_below_the_threshold_is_measured() -> None:
    costs = Costs([9.0])
    ledger, note = measure_highest(ledger_of(TWELVE), costs, least=TWELVE[HIGHEST_FIRST[6]])
    assert {row.layer for row in ledger.rows if row.measured} == set(HIGHEST_FIRST[:6])
    assert [len(names) for names in costs.asked] == [4, 2] and note == ""


def test_of_very_many_the_highest_are_measured_and_a_note_says_so() -> None:
    prices = {f"layer{i}": float(i + 1) for i in range(MEASURED_ROWS)}
    _, note = measure_highest(ledger_of(prices), Costs([3.0]), least=0.0)
    assert note == "", "no price is left"
    ledger, note = measure_highest(ledger_of({**prices, "low": 0.5}), Costs([3.0]), least=0.0)
    assert [row.layer for row in ledger.rows if not row.measured] == ["low"]
    assert f"the {MEASURED_ROWS} highest prices were measured, and the last of them" in note
    assert "are 3 times what the quadratic model says" in note


def test_what_a_measured_row_does_with_others_grows_with_the_root_of_its_price() -> None:
    ledger = priced(None)
    first, second = (r for r in ledger.rows if "prune" in r.option)
    sums = ledger.sums[:, list(ledger.rows).index(first)] * 4
    changed = replace(ledger, kept=1.0).with_measured({(first.layer, first.option): sums})
    plan = {r.layer: r.option for r in (first, second)}

    def pairs(one: Ledger) -> float:
        alone = [r.price for r in one.rows if plan[r.layer] == r.option]
        return one.predict(plan).value - sum(alone)

    assert pairs(changed) == pytest.approx(2 * pairs(replace(ledger, kept=1.0)), rel=1e-6)
    with pytest.raises(KeyError):
        ledger.with_measured({("0", "int7"): sums})


OPTIONS = [cp.Prune(sparsity=0.9), cp.Quantize(bits=2)]


def two_layers() -> tuple[nn.Module, Splits]:
    """A model with large weights: changes of it are too large for a quadratic model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(4)
    data = [(torch.randn(4, 8), torch.randint(0, 6, (4,))) for _ in range(12)]
    return model, split_items(data, seed=0)


def priced(measure_above: float | None, *, curvature: str = "fisher") -> Ledger:
    model, data = two_layers()
    return cp.price(model, data, options=OPTIONS, measure_above=measure_above, curvature=curvature)


def test_the_measured_price_is_the_loss_of_the_model_with_that_change() -> None:
    """Every change solved from the calibration items here, put into a copy, and run on the price
    items."""
    model, splits = two_layers()
    weights: dict[tuple[str, str], torch.Tensor] = {}

    def solve(layer: Layer, moments: Callable[[], Moments | None]) -> None:
        for solved in solve_layer(layer, OPTIONS, moments()):
            weights[layer.name, solved.option.key] = solved.weight

    batch = collate(splits.calibrate.items)
    visit_layers(model, Classification(), batch, find_layers(model), solve)
    ledger = priced(0.0)
    assert len(ledger.rows) == 4 and all(row.measured for row in ledger.rows)
    for row in ledger.rows:
        other = copy.deepcopy(model)
        find_layers(other)[row.layer].write_(weights[row.layer, row.option])
        with torch.no_grad():
            costs = torch.tensor([kl(model(x), other(x)) for x, _ in splits.price.items]).double()
        assert row.price == pytest.approx(float(costs.mean()), rel=1e-3, abs=1e-7)
        spread = float(costs.std()) / len(costs) ** 0.5
        assert row.stderr == pytest.approx(spread, rel=1e-3, abs=1e-7)
    quadratic = {(r.layer, r.option): r.price for r in priced(None).rows}
    far = [abs(r.price - quadratic[r.layer, r.option]) > 0.2 * r.price for r in ledger.rows]
    assert any(far), "the quadratic model must be wrong somewhere"


def test_prices_that_are_not_asked_for_or_not_in_nats_are_not_measured() -> None:
    assert not any(row.measured for row in priced(None).rows)
    assert not any(row.measured for row in priced(0.0, curvature="input").rows)


class Divided(nn.Module):
    """Divides by the norm of a layer's outputs, which pruning makes zero for some items."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 4)
        with torch.no_grad():
            self.b.weight.uniform_(0.001, 0.02)
            self.b.weight[:, :4] += 1.0

    def forward(self, x):
        z = self.b(self.a(x).relu())
        return self.c(z / z.norm(dim=-1, keepdim=True))


def divided() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    net, x = Divided().eval(), torch.randn(512, 16)
    with torch.no_grad():
        y = (net(x) + 0.3 * torch.randn(512, 4)).argmax(-1)
    return net, [(x[i : i + 8], y[i : i + 8]) for i in range(0, 512, 8)]


@pytest.mark.parametrize("layers", [["b"], ["b", "c"]])
def test_by_shares_a_plan_that_breaks_the_model_is_not_chosen(layers):
    """Nor does it end the run, where a later layer's inputs are no numbers under it, or where no
    plan is left to take shares at."""
    net, data = divided()
    broken, budget = cp.Prune(sparsity=0.98), cp.Budget("loss", max_drop=0.05)
    options = [cp.Quantize(bits=8), broken]
    result = cp.compress(net, data, options=options, budget=budget, layers=layers)
    assert result.plan.choices["b"] == "int8-pc-sym" and result.verdict.status == "CERTIFIED"
    assert result.ledger.prices == "shares"
    tried = [trial for trial in result.trials if trial.choices["b"] == broken.key]
    assert tried and all(trial.chance < 0.01 and trial.loss > 10 for trial in tried)
    assert any("a plan's outputs are no finite numbers" in note for note in result.plan.notes)
    only = cp.compress(net, data, options=[broken], budget=budget, layers=layers)
    assert only.plan.choices["b"] == "keep" and only.verdict.status == "CERTIFIED"
    assert only.ledger.prices == "quadratic"
    why = "prices are quadratic forms: there is no plan to take shares at (item 0: the compressed"
    assert any(note.startswith(why) for note in only.plan.notes)


def test_without_a_budget_a_plan_that_breaks_the_model_is_refused():
    """Nothing would tell that what comes back is broken."""
    net, data = divided()
    said = "layer c: its inputs are no finite numbers once the layers before it are compressed"
    with pytest.raises(FloatingPointError, match=said):
        cp.compress(net, data, options=[cp.Prune(sparsity=0.98)], layers=["b", "c"])


@pytest.mark.parametrize("measure_above", [None, 0.0])
def test_a_plan_that_breaks_the_model_is_not_chosen(measure_above):
    net, data = divided()
    broken = cp.Prune(sparsity=0.98)
    settings = cp.Settings(measure_above=measure_above, prices="quadratic")
    budget = cp.Budget("loss", max_drop=0.05)
    result = cp.compress(
        net,
        data,
        options=[cp.Quantize(bits=8), broken],
        budget=budget,
        layers="b",
        settings=settings,
    )
    assert (
        result.plan.choices == {"b": cp.Quantize(bits=8).key}
        and result.verdict.status == "CERTIFIED"
    )
    tried = [t for t in result.trials if t.choices == {"b": broken.key}]
    assert all(t.chance < 0.01 and t.loss > 10 for t in tried)
    assert tried or measure_above is not None, "only a measured price tells before a plan is tried"
    assert any("no finite numbers" in note for note in result.plan.notes)
    if measure_above is not None:
        reason = f"layer b: with option {broken.key} alone the model's outputs are no finite"
        assert any(note.startswith(reason) for note in result.plan.notes)
        prices = {row.option: row for row in result.ledger.rows}
        assert prices[broken.key].measured and prices[broken.key].price == pytest.approx(BROKEN)
    only = cp.compress(net, data, options=[broken], budget=budget, layers="b", settings=settings)
    assert only.plan.choices == {"b": "keep"}
    splits = split_items(data, seed=0)
    worthless = as_split([(x * math.nan, y) for x, y in splits.select.items])
    with pytest.raises(
        ValueError, match="uncompressed model's loss is no finite number for 64 of 64 items"
    ):
        cp.compress(
            net,
            replace(splits, select=worthless),
            options=[broken],
            budget=budget,
            settings=settings,
        )


@pytest.mark.parametrize("wrong", [-0.1, float("nan")])
def test_a_threshold_that_is_none(wrong):
    with pytest.raises(ValueError, match="measure_above"):
        cp.Settings(measure_above=wrong)


def rows_in(folder: Path) -> tuple[Row, ...]:
    return Ledger.from_dict(json.loads((folder / "ledger.json").read_text())).rows


def test_a_run_measures_once_and_its_report_says_which(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path)
    text = path.read_text()
    path.write_text(text + "price: {prices: quadratic, measure_above: null}\n")
    assert "measure prices" not in runs.check(path).minutes
    path.write_text(text + "price: {prices: quadratic, measure_above: 0.001}\n")
    assert runs.check(path).minutes["measure prices"] > 0
    folder = runs.run(path, tmp_path / "out", progress=False).folder
    rows = rows_in(folder)
    assert 0 < sum(row.measured for row in rows) < len(rows)
    report = (folder / "report.html").read_text()
    assert "were measured: the loss of that change alone" in report
    stages = json.loads((folder / "report.json").read_text())["stages"]
    assert "measure prices" in {stage["name"] for stage in stages}
    # A second run reads what the first one measured, and measures again what was edited.
    measured = sorted(folder.glob("state/**/measured/*.json"))
    assert measured
    for edit in (False, True):
        before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in measured}
        if edit:
            for file in measured:
                file.write_text(re.sub(r"(\d\.\d*)1", r"\g<1>2", file.read_text()))
        (folder / "report.json").unlink()
        runs.run(path, tmp_path / "out", progress=False)
        assert rows_in(folder) == rows
        after = {file: (file.stat().st_mtime_ns, file.read_text()) for file in measured}
        for file in measured:
            assert after[file][1] == before[file][1]
            assert (after[file][0] == before[file][0]) != edit
    path.write_text(text + "price: {measure_above: -1}\n")
    with pytest.raises(RecipeError, match="measure_above"):
        runs.check(path)


@pytest.mark.parametrize("items", [3, 5, 8, 11])
@pytest.mark.parametrize("curvature", ["kfac", "hessian", "diagonal"])
def test_measured_prices_of_every_curvature_are_divergences(items, curvature):
    """Forms of K-FAC are of four parts of the items, measured prices of single items."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    x = torch.randn(items, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.zeros(items, dtype=torch.long))]
    splits = Splits(**dict.fromkeys(PURPOSES, as_split(data)))
    options = [cp.Quantize(bits=2), cp.Quantize(bits=3)]
    ledger = cp.price(model, splits, options=options, curvature=curvature, measure_above=0.0)
    measured = [row for row in ledger.rows if row.measured]
    assert measured and len(ledger.count) == ledger.sums.shape[0]
    for row in measured:
        bits = int(row.option[3])
        other = cp.quantize(model, splits, bits=bits, layers=row.layer).model
        p, q = model(x).log_softmax(-1), other(x).log_softmax(-1)
        truth = float((p.exp() * (p - q)).sum(-1).mean())
        assert row.price == pytest.approx(truth, rel=1e-6)
