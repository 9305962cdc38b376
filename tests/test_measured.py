"""Measured prices against torch's own divergence, and where they take the place of quadratic
ones."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.model import BROKEN, CausalLM, Classification, as_split, find_layers, split_items
from curvprune.pricing import Ledger, divergences
from curvprune.pricing import ledger as ledger_room
from curvprune.run import RecipeError
from curvprune.run import pipeline as pipeline
from curvprune.run import stages as stages
from tests import tiny


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


def priced(
    measure_above: float | None, *, agreed: float = ledger_room.AGREED, **arguments
) -> Ledger:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(4)
    data = [(torch.randn(4, 8), torch.randint(0, 6, (4,))) for _ in range(12)]
    options = [cp.Prune(sparsity=0.9), cp.Quantize(bits=2), cp.Quantize(bits=4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_room, "AGREED", agreed)
        return cp.price(model, data, options=options, measure_above=measure_above, **arguments)


def by_price(ledger: Ledger) -> list:
    return sorted(ledger.rows, key=lambda r: -r.price)


def test_the_highest_prices_are_measured_until_they_agree(monkeypatch):
    """Every block of two against the ratio of measured and quadratic prices, from the outside."""
    monkeypatch.setattr(ledger_room, "MEASURED_TOGETHER", 2)
    quadratic = by_price(priced(None))
    assert not any(r.measured for r in quadratic)
    seen = {(r.layer, r.option): r for r in priced(0.0, agreed=-9.0).rows}  # never content
    assert all(r.measured for r in seen.values())
    ratios = [
        sum(seen[r.layer, r.option].price for r in quadratic[k : k + 2])
        / sum(r.price for r in quadratic[k : k + 2])
        for k in range(0, 6, 2)
    ]
    noise = [math.hypot(*(r.stderr for r in quadratic[k : k + 2])) for k in range(0, 6, 2)]
    off = [
        abs(1 - ratio) * sum(r.price for r in quadratic[2 * k : 2 * k + 2])
        for k, ratio in enumerate(ratios)
    ]
    costs = [
        sum(seen[r.layer, r.option].price for r in quadratic[k : k + 2]) for k in range(0, 6, 2)
    ]
    errors = [
        (o - n) / c for o, n, c in zip(off, noise, costs, strict=True)
    ]  # beyond the noise, relative
    assert errors[0] > max(0.1, errors[1] + 0.05), (
        "the larger the change, the worse is the quadratic model"
    )
    for agreed, blocks in ((errors[0] + 0.01, 1), (errors[0] - 0.01, 2)):
        ledger = priced(0.0, agreed=agreed)
        expected = {(r.layer, r.option) for r in quadratic[: 2 * blocks]}
        assert {(r.layer, r.option) for r in ledger.rows if r.measured} == expected
        for row in ledger.rows:
            pair = row.layer, row.option
            assert row == (
                seen[pair]
                if pair in expected
                else next(r for r in quadratic if (r.layer, r.option) == pair)
            )
    assert all(row.model_stderr == 0 and row.stderr > 0 for row in seen.values())
    only = priced(quadratic[3].price, agreed=-9.0)
    assert sum(r.measured for r in only.rows) == 3, "none below the threshold"
    again = Ledger.from_dict(json.loads(json.dumps(only.to_dict())))
    assert again.rows == only.rows
    assert not any(r.measured for r in priced(0.0, curvature="input").rows), "has no nats"


def test_the_measured_price_is_the_loss_of_the_model_with_that_change(monkeypatch):
    jobs: list = []
    real = stages._measured
    monkeypatch.setattr(
        stages, "_measured", lambda job, *a: jobs.append((job, a[1])) or real(job, *a)
    )

    def look(*arguments, **named):
        (job, candidates) = jobs[-1]
        weights.update({(n, s.option.key): s.weight for n in job.layers for s in candidates(n)})
        return divergences(*arguments, **named)

    weights: dict = {}
    monkeypatch.setattr(stages, "divergences", look)
    ledger = priced(0.0, agreed=-9.0)
    job = jobs[-1][0]
    assert sum(r.measured for r in ledger.rows) == 6
    for row in ledger.rows:
        other = copy.deepcopy(job.model)
        find_layers(other)[row.layer].write_(weights[row.layer, row.option])
        with torch.no_grad():
            costs = [kl(job.model(x), other(x)) for x, _ in job.splits.price.items]
        assert row.price == pytest.approx(sum(costs) / len(costs), rel=1e-3, abs=1e-7)
        spread = torch.tensor(costs).double().std() / len(costs) ** 0.5
        assert row.stderr == pytest.approx(float(spread), rel=1e-3, abs=1e-7)


def test_what_a_measured_row_does_with_others_grows_with_the_root_of_its_price():
    ledger = priced(None)
    first, second = (
        next(r for r in ledger.rows if r.layer == n and "prune" in r.option) for n in ("0", "2")
    )
    sums = ledger.sums[:, list(ledger.rows).index(first)] * 4
    changed = replace(ledger, kept=1.0).with_measured({(first.layer, first.option): sums})
    plan = {r.layer: r.option for r in (first, second)}

    def pairs(one: Ledger) -> float:
        return one.predict(plan).value - sum(r.price for r in one.rows if plan[r.layer] == r.option)

    assert pairs(changed) == pytest.approx(2 * pairs(replace(ledger, kept=1.0)), rel=1e-6)
    with pytest.raises(KeyError):
        ledger.with_measured({("0", "int7"): sums})


def test_of_very_many_the_highest_are_measured_and_a_note_says_so(monkeypatch):
    monkeypatch.setattr(ledger_room, "MEASURED_ROWS", 3)
    monkeypatch.setattr(ledger_room, "MEASURED_TOGETHER", 2)
    notes: list = []
    real = stages._measured
    monkeypatch.setattr(
        stages, "_measured", lambda job, *a: (real(job, *a), notes.append(list(job.notes)))[0]
    )
    ledger = priced(0.0, agreed=-9.0)
    assert {(r.layer, r.option) for r in ledger.rows if r.measured} == {
        (r.layer, r.option) for r in by_price(priced(None))[:3]
    }
    assert any(
        "the 3 highest prices were measured, and the last of them" in note for note in notes[0]
    )


def test_a_change_that_breaks_the_model_is_priced_out_of_reach_and_noted(monkeypatch):
    notes: list = []
    real, whole = stages._measured, divergences
    monkeypatch.setattr(
        stages, "_measured", lambda job, *a: (real(job, *a), notes.append(list(job.notes)))[0]
    )

    def overflowing(*arguments):
        sums = whole(*arguments)
        sums[3] = float("nan")  # of one item, by each change of the block
        return sums

    monkeypatch.setattr(stages, "divergences", overflowing)
    monkeypatch.setattr(ledger_room, "MEASURED_TOGETHER", 2)
    ledger, quadratic = priced(0.0), priced(None)
    assert all(r.measured and r.price == pytest.approx(BROKEN) for r in ledger.rows), (
        "none of them agrees"
    )
    for row in quadratic.rows:
        assert any(
            f"layer {row.layer}: with option {row.option} alone" in note for note in notes[0]
        )


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


@pytest.mark.parametrize("measure_above", [None, 0.0])
def test_a_plan_that_breaks_the_model_is_not_chosen(measure_above):
    torch.manual_seed(0)
    net, x = Divided().eval(), torch.randn(512, 16)
    with torch.no_grad():
        y = (net(x) + 0.3 * torch.randn(512, 4)).argmax(-1)
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 512, 8)]
    broken = cp.Prune(sparsity=0.98)
    settings = cp.Settings(measure_above=measure_above)
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
    tried = [t for t in result.trials if t["choices"] == {"b": broken.key}]
    assert all(t["chance"] < 0.01 and t["measured"] > 10 for t in tried)
    assert tried or measure_above is not None, "only a measured price tells before a plan is tried"
    assert any("no finite numbers" in note for note in result.plan.notes)
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


def test_a_run_measures_once_and_its_report_says_which(tmp_path, monkeypatch):
    path = tiny.write_recipe(tmp_path)
    text = path.read_text()
    path.write_text(text + "price: {measure_above: null}\n")
    assert "measure prices" not in pipeline.check(path).minutes
    path.write_text(text + "price: {measure_above: 0.001}\n")
    assert pipeline.check(path).minutes["measure prices"] > 0
    result = pipeline.run(path, tmp_path / "out", progress=False)
    rows = result.record["ledger"]["rows"]
    assert 0 < sum(r["measured"] for r in rows) < len(rows)
    assert (
        "were measured: the loss of that change alone"
        in (result.folder / "report.html").read_text()
    )
    assert "measure prices" in {s["name"] for s in result.record["stages"]}
    monkeypatch.setattr(stages, "divergences", None)  # a second time would fail
    (result.folder / "report.json").unlink()
    assert pipeline.run(path, tmp_path / "out", progress=False).record["ledger"]["rows"] == rows
    path.write_text(text + "price: {measure_above: -1}\n")
    with pytest.raises(RecipeError, match="measure_above"):
        pipeline.check(path)
