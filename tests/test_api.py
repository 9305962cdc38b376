"""The verbs on ordinary torch modules: what they return, what they leave alone, what they
refuse."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import curvprune as cp
from curvprune.model import Split, as_split
from curvprune.run import digits


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    return small_network()


def small_network() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """A small network that has learnt the digits, and digits that it has not seen."""
    images, labels = digits()
    x = images.flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 48),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(48, 48),
            nn.ReLU(),
            nn.Linear(48, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:900]), labels[:900]).backward()
            optimizer.step()
    model.zero_grad()
    return model, (x[900:], labels[900:])


def batches(
    data: tuple[torch.Tensor, torch.Tensor], size: int = 50
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def test_uniform_quantization_leaves_the_input_model_alone(trained):
    model, data = trained
    model.train()
    before = copy.deepcopy(model.state_dict())
    result = cp.quantize(model, batches(data), bits=3, group_size=16, symmetric=False)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.verdict is None and set(result.plan.choices.values()) == {"int3-g16-asym"}
    for name in ("0", "3", "5"):
        weight = result.model.get_submodule(name).weight.reshape(-1, 16)
        assert max(len(set(row.tolist())) for row in weight) <= 8
    assert accuracy(result.model, data) > accuracy(model, data) - 0.05
    model.train()


def test_allocated_zeros_go_where_they_cost_least(trained):
    model, data = trained
    halves = (data[0][:450], data[1][:450]), (data[0][450:], data[1][450:])
    spread = cp.prune(model, batches(halves[0]), sparsity=0.7, allocate=True)
    uniform = cp.prune(model, batches(halves[0]), sparsity=0.7)
    sizes = {n: model.get_submodule(n).weight.numel() for n in ("0", "3", "5")}
    zeros = lambda r: sum(int((r.model.get_submodule(n).weight == 0).sum()) for n in sizes)  # noqa: E731
    assert round(0.7 * sum(sizes.values())) <= zeros(spread) < 1.05 * zeros(uniform)
    objective = cp.LabelFree(copy.deepcopy(model).eval())
    losses = [
        float(cp.model.evaluate(r.model, batches(halves[1]), objective).mean_loss)
        for r in (spread, uniform)
    ]
    assert losses[0] < 0.96 * losses[1]

    assert spread.ledger is not None
    prices = {(r.layer, float(r.option.removeprefix("prune"))): r.price for r in spread.ledger.rows}
    shares = sorted({share for _, share in prices})
    assert shares == [0.5, 0.6, 0.7, 0.8, 0.9]
    kept = lambda plan: sum(n - round(s * n) for n, s in zip(sizes.values(), plan, strict=True))  # noqa: E731
    most = sum(sizes.values()) - round(0.7 * sum(sizes.values()))
    best = min(
        sum(prices[pair] for pair in zip(sizes, plan, strict=True))
        for plan in itertools.product(shares, repeat=3)
        if kept(plan) <= most
    )
    chosen = sum(
        prices[n, float(key.removeprefix("prune"))] for n, key in spread.plan.choices.items()
    )
    assert chosen == pytest.approx(best, rel=1e-9)
    assert (
        spread.plan.predicted == spread.ledger.predict(spread.plan.choices).value
    )  # pairs of layers included


def test_a_share_at_the_end_of_the_range_can_be_spread():
    """Each layer rounds its own zeros: the share itself, everywhere, is always allowed."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(9, 8), nn.Linear(8, 9))][:7])
    data = [(torch.randn(40, 9), torch.randint(0, 8, (40,)))]
    found = cp.prune(model, data, sparsity=0.95, allocate=True)
    assert all(key.startswith("prune") for key in found.plan.choices.values())


PROGRAM = """
import sys, torch, torch.distributed as dist, curvprune as cp
from tests.test_api import batches, small_network

dist.init_process_group("gloo")
model, data = small_network()
weights = cp.quantize(model, batches(data), bits=4).model.state_dict()
torch.save(weights, f"{sys.argv[1]}/{dist.get_rank()}.pt")
"""


@pytest.mark.slow
def test_a_program_with_several_processes_solves_whole_models_in_each(trained, tmp_path):
    model, data = trained
    alone = cp.quantize(model, batches(data), bits=4).model.state_dict()
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = str(Path(__file__).parent.parent)
    subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    for rank in (0, 1):
        weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert weights.keys() == alone.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "2:4"}, "spreads one share"),
        ({"sparsity": [0.3, 0.5]}, "spreads one share"),
        ({"sparsity": 0.5, "budget": cp.Budget("loss", max_drop=0.1)}, "spreads one share"),
        ({"sparsity": 1.5}, "strictly between 0 and 1"),
        ({"structured": 0.3}, "leave allocate out"),
    ],
)
def test_what_cannot_be_allocated_is_refused(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        cp.prune(trained[0], batches(trained[1]), allocate=True, **arguments)


def test_inplace_changes_the_model_itself(trained):
    model = copy.deepcopy(trained[0])
    result = cp.quantize(model, batches(trained[1]), bits=4, inplace=True)
    assert result.model is model
    # The very weights that a copy gets, although the original beside it is held in half precision.
    copied = cp.quantize(trained[0], batches(trained[1]), bits=4).model
    for name, weight in copied.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_compensated_rounding_beats_rounding_to_nearest_on_the_loss(trained):
    model, data = trained
    halves = (data[0][:450], data[1][:450]), (data[0][450:], data[1][450:])
    objective = cp.LabelFree(copy.deepcopy(model).eval())
    compensated = cp.quantize(model, batches(halves[0]), bits=2, group_size=16).model
    nearest = copy.deepcopy(model).eval()
    for name in ("0", "3", "5"):
        weight = nearest.get_submodule(name).weight.data
        groups = weight.reshape(-1, 16)
        scale = groups.abs().amax(1, keepdim=True) / 2
        weight.copy_(((groups / scale).round().clamp(-2, 1) * scale).reshape(weight.shape))
    losses = [
        float(cp.model.evaluate(m, batches(halves[1]), objective).mean_loss)
        for m in (compensated, nearest)
    ]
    assert losses[0] < 0.5 * losses[1]


def test_prune_keeps_what_the_pattern_says(trained):
    model, data = trained
    half = cp.prune(model, batches(data), sparsity=0.5).model
    for name in ("0", "3", "5"):
        assert float((half.get_submodule(name).weight == 0).float().mean()) == pytest.approx(
            0.5, abs=0.01
        )
    pattern = cp.prune(model, batches(data), pattern="2:4", layers=["0", "3"]).model
    assert int((pattern[0].weight.reshape(-1, 4) != 0).sum(1).max()) == 2
    assert torch.equal(pattern[5].weight, model[5].weight)
    assert accuracy(half, data) > 0.85


def test_a_budget_gives_a_certified_smaller_model_that_saves_and_loads(trained, tmp_path):
    model, data = trained
    budget = cp.Budget("accuracy", max_drop=0.03)
    result = cp.quantize(
        model, batches(data), budget=budget, layers="*", settings=cp.Settings(seed=1)
    )
    assert (
        result.verdict is not None
        and result.verdict.status == "CERTIFIED"
        and result.verdict.bound <= 0.03
    )
    assert result.plan.bytes < 0.4 * 4 * sum(p.numel() for p in model.parameters())
    assert result.ledger is not None
    predicted = result.ledger.predict(result.plan.choices)
    assert result.plan.predicted == pytest.approx(predicted.value) and predicted.stderr > 0
    assert {t.kind for t in result.trials} == {"plan", "control", "applied"}
    result.save(tmp_path / "out")
    loaded = cp.load(tmp_path / "out", model=copy.deepcopy(model))
    assert torch.equal(loaded(data[0]), result.model.eval()(data[0]))


def test_max_bytes_is_met_by_the_file(trained, tmp_path):
    model, data = trained
    result = cp.quantize(model, batches(data), budget=cp.Budget(max_bytes=6500))
    result.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 6500
    assert result.verdict is None and len(set(result.plan.choices.values())) > 1


class Gated(nn.Module):
    """Two branches that meet in a product, like gate and up, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(64, 48), "up_proj": nn.Linear(64, 48)})
        self.head = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp["gate_proj"](x).relu() * self.mlp["up_proj"](x))


@pytest.mark.slow
def test_layers_that_share_an_option_do_so_in_every_plan(trained):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gated()
    data = batches(trained[1])
    budget = cp.Budget(max_bytes=7000)
    free = cp.quantize(model, data, budget=budget)
    planned = next(trial.choices for trial in free.trials if trial.kind == "plan")
    assert planned["mlp.gate_proj"] != planned["mlp.up_proj"]
    for request in ("fused", [["*.gate_proj", "mlp.up_*"]]):
        tied = cp.quantize(model, data, budget=budget, same_option=request)
        for choices in [tied.plan.choices, *(trial.choices for trial in tied.trials)]:
            assert choices["mlp.gate_proj"] == choices["mlp.up_proj"]
        assert tied.ledger.rows == free.ledger.rows, "prices stay each layer's own"


def test_the_frontier_of_a_ledger_is_nested(trained):
    model, data = trained
    options = [cp.Quantize(bits=bits) for bits in (2, 4, 8)]
    ledger = cp.price(model, batches(data)[:4], options=options)
    plans = cp.frontier(ledger)
    layers = {row.layer: ledger.layer_rows(row.layer) for row in ledger.rows}
    assert plans[0].bytes == sum(
        min(row.bytes for row in rows.values()) for rows in layers.values()
    )
    for plan in plans:
        assert plan.bytes == sum(layers[name][key].bytes for name, key in plan.choices.items())
        estimate = ledger.predict(plan.choices)
        assert (plan.predicted, plan.predicted_stderr) == (estimate.value, estimate.stderr)
    for before, after in itertools.pairwise(plans):
        assert before.bytes < after.bytes and before.predicted > after.predicted
        assert all(
            layers[n][before.choices[n]].bytes <= layers[n][after.choices[n]].bytes for n in layers
        )
    shared = cp.frontier(ledger, points=5, same_option=[["0", "3"]])
    assert 2 <= len(shared) <= 5 and all(plan.choices["0"] == plan.choices["3"] for plan in shared)
    with pytest.raises(ValueError, match="nearest layer: "):
        cp.frontier(ledger, same_option=[["0", "nowhere"]])


def test_prune_and_quantize_compete_in_one_ledger(trained):
    model, data = trained
    joint = cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=4))
    options = [cp.Prune(sparsity=0.5), cp.Quantize(bits=4), joint]
    ledger = cp.price(model, batches(data)[:4], options=options, layers=["0", "3"])
    rows = ledger.layer_rows("0")
    assert set(rows) == {"prune0.5", "int4-pc-sym", "prune0.5+int4-pc-sym"}
    kept, mask, shape = (
        64 * 48 // 2,
        64 * 48 // 8,
        16,
    )  # transformers need not read this model: no zeros are stored
    assert rows["prune0.5"].bytes == kept * 4 + mask + shape
    assert rows["prune0.5+int4-pc-sym"].bytes == kept // 2 + mask + shape + 48 * 2
    assert rows["prune0.5+int4-pc-sym"].price > rows["int4-pc-sym"].price > 0
    total = ledger.predict({"0": options[1], "3": joint})
    parts = rows["int4-pc-sym"].price + ledger.layer_rows("3")[joint.key].price
    alone = replace(ledger, kept=0.0).predict({"0": options[1], "3": joint})
    assert alone.value == pytest.approx(parts) and ledger.predict({"0": "keep"}).value == 0
    again = cp.Ledger.from_dict(ledger.to_dict())
    assert again.predict({"0": options[1], "3": joint}) == total and again.rows == ledger.rows
    with pytest.raises(KeyError, match="option 'int2-pc-sym' was not priced"):
        ledger.predict({"0": cp.Quantize(bits=2)})


@pytest.mark.slow
def test_prices_predict_the_measured_kl_of_each_layer(trained):
    """The price of single changes against the divergence measured on data that neither solved nor
    priced them."""
    model, data = trained
    model.eval()
    options = [cp.Quantize(bits=3), cp.Quantize(bits=4), cp.Prune(sparsity=0.3)]
    part, fresh = (data[0][:400], data[1][:400]), (data[0][400:], data[1][400:])
    ledger = cp.price(model, batches(part), options=options, labels=20)
    objective = cp.LabelFree(model)
    prices, measured = [], []
    for option in options:
        for layer in ("0", "3", "5"):
            changed = cp.compress(model, batches(part), options=[option], layers=layer).model
            measured.append(cp.model.evaluate(changed, batches(fresh), objective).mean_loss)
            prices.append(ledger.layer_rows(layer)[option.key].price)
    for start in (
        0,
        3,
        6,
    ):  # 133 images price, most of them with hardly any curvature: a standard error of a quarter
        assert 1 / 1.8 < sum(prices[start : start + 3]) / sum(measured[start : start + 3]) < 1.8
    assert spearmanr(prices, measured).statistic > 0.85


def test_analyze_gives_trace_and_diagonal_of_each_layer(trained):
    model, data = trained
    analysis = cp.analyze(
        model, batches(data)[:3], matrix="fisher", quantities=["trace", "diagonal"], labels=4
    )
    assert set(analysis.layers) == {"0", "3", "5"} and "Fisher" in analysis.matrix
    for name, curvature in analysis.layers.items():
        assert curvature.diagonal.shape == model.get_submodule(name).weight.shape
        assert float(curvature.diagonal.sum()) == pytest.approx(curvature.trace.value, rel=1e-4)
        assert 0 < curvature.trace.stderr < curvature.trace.value


def test_certify_compares_two_models_item_by_item(trained):
    model, data = trained
    same = cp.certify(
        model, copy.deepcopy(model), batches(data), cp.Budget("accuracy", max_drop=0.01)
    )
    assert same.status == "CERTIFIED" and same.drop == 0 and same.items == 897
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[3].weight.zero_()
    verdict = cp.certify(model, broken, batches(data), cp.Budget("loss", max_drop=0.01))
    assert verdict.status == "VIOLATED" and verdict.measure == "nats/example"
    few = cp.certify(
        model, copy.deepcopy(model), batches(data)[:1], cp.Budget("accuracy", max_drop=0.01)
    )
    assert few.status == "INCONCLUSIVE" and few.needed is not None and few.needed > 50


def test_certify_with_a_metric_of_ones_own(trained):
    model, (x, y) = trained
    other = cp.quantize(model, batches((x, y)), bits=2).model
    budget = cp.Budget("accuracy", max_drop=0.05)

    def right(outputs, batch):
        return (outputs.argmax(-1) == batch[1]).float()

    expected = cp.certify(model, other, batches((x, y)), budget)
    ours = cp.certify(
        model,
        other,
        batches((x, y)),
        budget,
        metric=cp.Metric(of=right, bounds=(0, 1), name="hits"),
    )
    assert (ours.metric, ours.bound, ours.method) == ("hits", expected.bound, expected.method)

    def confidence_in_truth(outputs, batch):
        return outputs.softmax(-1).gather(-1, batch[1][:, None])[:, 0]

    bare = cp.certify(model, other, batches((x, y)), budget, metric=confidence_in_truth)
    bounded = cp.Metric(of=confidence_in_truth, bounds=(0, 1))
    brier = cp.Metric(
        of=lambda o, b: 1 - confidence_in_truth(o, b), bounds=(0, 1), higher_is_better=False
    )
    assert bare.metric == "confidence_in_truth" and bare.drop > 0 and "t bound" in bare.method
    first, second = (
        cp.certify(model, other, batches((x, y)), budget, metric=m) for m in (bounded, brier)
    )
    assert first.bound == pytest.approx(second.bound, abs=1e-6) and first.bound > bare.drop
    split = Split(
        items=tuple(cp.model.items.itemize(batches((x, y)))),
        documents=tuple(f"d{i // 10}" for i in range(len(y))),
    )
    assert cp.certify(model, other, split, budget, metric=bounded).clusters == 90
    with pytest.raises(
        ValueError, match=r"metric 'bad' returned shape \(8, 10\) for a batch of 8 items"
    ):
        cp.certify(
            model, other, batches((x, y)), budget, metric=cp.Metric(of=lambda o, b: o, name="bad")
        )


def test_a_budget_deals_whole_documents_and_tells_of_repeated_items(trained):
    model, (x, y) = trained
    split = Split(
        items=tuple(cp.model.items.itemize(batches((x, y)))),
        documents=tuple(f"d{i // 10}" for i in range(len(y))),
    )
    result = cp.quantize(model, split, bits=(3, 8), budget=cp.Budget("loss", max_drop=0.1))
    assert (
        result.verdict is not None
        and result.verdict.clusters is not None
        and 40 <= result.verdict.clusters <= 50
    )
    part = cp.model.items.as_split(batches((x[:200], y[:200])))
    splits = cp.Splits(calibrate=part, price=part, select=part, certify=part)
    with pytest.warns(
        UserWarning, match="200 of the 200 items of the certify split have also made"
    ):
        cp.quantize(model, splits, bits=(3, 8), budget=cp.Budget("loss", max_drop=0.1))


def test_label_free_needs_no_labels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    data = [{"input": torch.randn(40, 8)} for _ in range(3)]
    budget = cp.Budget("loss", max_drop=0.05)
    with pytest.raises(ValueError, match=r"a guess; pass cp\.LabelFree"):
        cp.quantize(model, data, budget=budget, loss="label-free")
    loss = cp.LabelFree(model, of=cp.Classification())
    result = cp.quantize(model, data, budget=budget, loss=loss)
    assert result.verdict is not None and result.verdict.baseline == pytest.approx(0, abs=1e-9)
    assert result.verdict.status == "CERTIFIED"


def test_convolutions_with_batchnorm_and_groups():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    data = [(torch.randn(8, 1, 9, 9), torch.randint(0, 4, (8,))) for _ in range(3)]
    stats = model[1].running_mean.clone()
    result = cp.quantize(model, data, bits=4)
    assert torch.equal(model[1].running_mean, stats), "BatchNorm must not learn from calibration"
    model.eval()
    x = torch.cat([b[0] for b in data])
    error = (result.model.eval()(x) - model(x)).norm() / model(x).norm()
    assert 0 < float(error) < 0.2
    assert max(len(set(row.tolist())) for row in result.model[3].weight.flatten(1)) <= 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.slow
def test_other_precisions(trained, dtype):
    model, data = trained
    model = copy.deepcopy(model).to(dtype)
    typed = batches((data[0].to(dtype), data[1]))
    result = cp.quantize(model, typed, bits=4, group_size=16)
    assert result.model[0].weight.dtype == dtype
    assert accuracy(result.model, (data[0].to(dtype), data[1])) > 0.85
    assert cp.analyze(model, typed[:2]).layers["0"].trace.value > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: cp.quantize(m, d, bits=9), "bits=9 is not offered"),
        (lambda m, d: cp.quantize(m, d, bits=4, layers="nothing"), "matches none of the 3"),
        (lambda m, d: cp.quantize(m, [], bits=4), "data is empty"),
        (lambda m, d: cp.prune(m, d), "pass sparsity"),
        (
            lambda m, d: cp.quantize(m, d, bits=[], budget=cp.Budget("loss", max_drop=1)),
            "no options given",
        ),
        (
            lambda m, d: cp.compress(m, d, options=[cp.Keep(), cp.Quantize(bits=4)]),
            "exactly one option, got 2",
        ),
        (
            lambda m, d: cp.quantize(m, d, budget=cp.Budget(max_bytes=100)),
            r"max_bytes: at least [\d,]+ is needed, 100",
        ),
        (lambda m, d: cp.certify(m, m, d, cp.Budget(max_bytes=100)), "max_drop"),
        (lambda m, d: cp.quantize(m, d, same_option="fuse"), "nearest: fused"),
        (
            lambda m, d: cp.quantize(m, d, same_option=["0", "3"]),
            r"same_option\[0\]: '0' is neither fused",
        ),
        (
            lambda m, d: cp.quantize(m, d, same_option=[["0", "first"]]),
            r"same_option\[0\]\[1\]: 'first' matches none",
        ),
        (
            lambda m, d: cp.quantize(m, d, layers="0", same_option=[["0", "3"]]),
            "layers 0 and 3 must share .*int4",
        ),
        (lambda m, d: cp.analyze(m, d, objective="causal-lm"), "causal-lm needs"),
    ],
)
def test_bad_input_is_refused_before_computing(trained, call, message):
    model, data = trained
    with pytest.raises(ValueError, match=message):
        call(model, batches(data))


def test_splits_of_ones_own(trained):
    model, (x, y) = trained
    cut = [
        cp.model.items.as_split(batches((x[a:b], y[a:b])), f"part {a}")
        for a, b in ((0, 200), (200, 300), (300, 400), (400, 897))
    ]
    assert all(isinstance(part, Split) for part in cut)
    splits = cp.Splits(calibrate=cut[0], price=cut[1], select=cut[2], certify=cut[3])
    result = cp.quantize(model, splits, bits=(3, 8), budget=cp.Budget("loss", max_drop=0.1))
    assert result.verdict is not None and result.verdict.items == 497


def test_items_without_counted_labels_say_nothing(trained):
    model, (x, y) = trained
    ignored = y.clone()
    ignored[::3] = -100
    other = cp.quantize(model, batches((x, y)), bits=3).model
    budget = cp.Budget("loss", max_drop=0.5)
    some = cp.certify(model, other, batches((x, ignored)), budget)
    kept = ignored != -100
    only = cp.certify(model, other, batches((x[kept], y[kept])), budget)
    assert some.items == only.items == int(kept.sum()) and some.drop == pytest.approx(only.drop)


def test_saving_never_touches_a_folder_with_other_things_in_it(trained, tmp_path):
    result = cp.quantize(trained[0], batches(trained[1]), bits=4)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and holds no artifact"):
        result.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    for _ in range(2):
        folder = result.save(tmp_path / "new")
    assert torch.equal(
        cp.load(folder, model=copy.deepcopy(trained[0]))[0].weight, result.model[0].weight
    )


def test_a_single_option_beside_keep_is_measured_against_the_uncompressed_model(trained):
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    ledger = cp.price(model, batches(data)[:4], options=[cp.Quantize(bits=2)])
    assert all(row.price > 0 for row in ledger.rows)
    result = cp.prune(model, batches(data), sparsity=0.95, budget=cp.Budget("loss", max_drop=0.001))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pruned = [n for n, key in result.plan.choices.items() if key != "keep"]
    for name in ("0", "3", "5"):
        share = float((result.model.get_submodule(name).weight == 0).float().mean())
        assert (share > 0.9) == (name in pruned)
    for option in (cp.Prune(sparsity=0.95), cp.Quantize(bits=2)):
        uniform = cp.compress(model, batches(data), options=[option]).model
        assert (
            cp.certify(model, uniform, batches(data), cp.Budget("loss", max_drop=1e-4)).drop > 1e-4
        )


def test_a_weight_under_two_names_is_compressed_once_and_stored_once(trained, tmp_path):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a
            self.out = nn.Linear(16, 4)
            self.raw = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.b(torch.relu(self.a(x))))) + self.raw.sum()

    torch.manual_seed(0)
    model = Shared()
    data = [(torch.randn(8, 16), torch.randint(0, 4, (8,))) for _ in range(8)]
    result = cp.quantize(model, data, bits=[2, 3], budget=cp.Budget("loss", max_drop=5.0))
    assert len(set(result.model.a.weight[0].tolist())) <= 8
    result.save(tmp_path)
    stored = cp.artifact.folder.tensor_names(tmp_path)
    assert sum(size for _, size in stored.values()) == result.plan.bytes
    assert not any(name.startswith(("b.", "raw")) for name in stored)
    loaded = cp.load(tmp_path, model=Shared())
    assert torch.equal(loaded(data[0][0]), result.model.eval()(data[0][0]))


def test_masks_are_for_tokens_not_for_vectors_that_happen_to_have_their_shape():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, 20:] = 0
    batch = {
        "input_ids": torch.randint(0, 40, (2, 32)),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1]),
    }
    assert cp.quantize(BertForSequenceClassification(config), [batch], bits=4).plan.bytes > 0


def test_layers_called_by_keyword_and_parametrized_weights():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(input=x)

    data = [(torch.randn(8, 8), torch.randint(0, 4, (8,)))]
    assert len(set(cp.quantize(Keyword(), data, bits=2).model.a.weight[0].tolist())) <= 4
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
    with pytest.raises(ValueError, match="layer 0: its weight is not a parameter"):
        cp.quantize(normed, data, bits=2)


def test_models_that_transformers_cannot_load_packed_are_stored_dense(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(1, 96, (4, 10))
    data = [{"input_ids": ids, "decoder_input_ids": ids[:, :6]}]
    result = cp.quantize(model, data, bits=4, objective="label-free")
    result.save(tmp_path)
    expected = result.model(**data[0]).logits
    filled = cp.load(tmp_path, model=T5ForConditionalGeneration(config))
    for loaded in (filled, cp.load(tmp_path), T5ForConditionalGeneration.from_pretrained(tmp_path)):
        assert torch.equal(loaded.eval()(**data[0]).logits, expected)


def test_all_data_calibrate_where_nothing_is_priced(trained):
    """The very weights that `Splits` with all items to calibrate give, and others than a part
    of them gives."""
    model, data = trained[0], batches(trained[1])[:2]
    every = as_split(data)
    part = Split(items=every.items[:60], documents=every.documents[:60])

    def weights(calibrate: Split) -> torch.Tensor:
        splits = cp.Splits(calibrate=calibrate, price=every, select=every, certify=every)
        return cp.quantize(model, splits, bits=4).model[0].weight

    found = cp.quantize(model, data, bits=4).model[0].weight
    assert torch.equal(found, weights(every)) and not torch.equal(found, weights(part))


def test_modes_come_back_as_the_model_had_them(trained):
    model = copy.deepcopy(trained[0])
    model.train()
    model[0].eval()
    for budget in (None, cp.Budget("loss", max_drop=1.0)):
        result = cp.quantize(model, batches(trained[1]), bits=4, budget=budget)
        assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]


# ------------------------------------------------------------------------ what comes back from disk


@pytest.mark.parametrize(
    "option",
    [
        cp.Quantize(bits=4),
        cp.Quantize(bits=3, group_size=8, symmetric=False),
        cp.Prune(sparsity=0.5),
        cp.Cast(dtype="float16"),
    ],
    ids=lambda o: o.key,
)
def test_a_model_that_is_itself_a_layer_is_stored_whole(tmp_path, option):
    torch.manual_seed(0)
    data = [(torch.randn(8, 16), torch.randint(0, 5, (8,))) for _ in range(4)]
    result = cp.compress(nn.Linear(16, 5), data, options=[option])
    folder = result.save(tmp_path / "out")
    again = cp.load(folder, model=nn.Linear(16, 5))
    assert torch.equal(again.weight, result.model.weight) and torch.equal(
        again.bias, result.model.bias
    )
    if isinstance(option, cp.Quantize):
        with pytest.raises(ValueError, match="load it without packed=True"):
            cp.load(folder, model=nn.Linear(16, 5), packed=True)


def test_saving_over_an_artifact_of_another_form_leaves_nothing_of_it(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    data = [{"input_ids": torch.randint(0, 50, (2, 12))} for _ in range(4)]
    ours = cp.quantize(model, data, bits=3, settings=cp.Settings(portable=False))
    theirs = cp.quantize(model, data, bits=4, group_size=16)
    theirs.save(tmp_path / "out")
    ours.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(
            cp.load(tmp_path / "out")(**data[0]).logits, ours.model(**data[0]).logits
        )
        with pytest.raises(OSError, match="no file named"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        theirs.save(tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(again(**data[0]).logits, theirs.model(**data[0]).logits, atol=1e-5)
    assert not (tmp_path / "out" / "packed.safetensors").exists()


def test_a_result_whose_model_was_trained_since_is_not_saved(tmp_path, trained):
    model, data = trained
    data = batches(data)
    result = cp.quantize(model, data, bits=4)
    with torch.no_grad():
        result.model[5].bias.add_(1.0)  # is stored as it is
    again = cp.load(result.save(tmp_path / "kept"), model=copy.deepcopy(model))
    assert torch.equal(again[5].bias, result.model[5].bias)
    with torch.no_grad():
        result.model[3].weight[0, 0] += 1.0
    with pytest.raises(
        ValueError, match=r"layer 3 of the result's model is not what was compressed.*recover"
    ):
        result.save(tmp_path / "out")
    budgeted = cp.quantize(model, data, budget=cp.Budget("loss", max_drop=0.1))
    budgeted.save(tmp_path / "budgeted")
    changed = next(n for n, key in budgeted.plan.choices.items() if key.startswith("int"))
    with torch.no_grad():
        budgeted.model.get_submodule(changed).weight[0, 0] += 1.0
    with pytest.raises(ValueError, match=f"layer {changed} of the result's model"):
        budgeted.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x, y: (x, y + 3),
            "calibrate item [0-9]+: label 1[0-2], and the model has 10 classes",
        ),
        (lambda x, y: (x, y - 1), "calibrate item [0-9]+: label -1, and the model has 10 classes"),
    ],
)
def test_items_that_the_model_cannot_read_are_named(trained, change, message):
    model, data = trained
    wrong = batches(change(*data))
    with pytest.raises(ValueError, match=message):
        cp.quantize(model, wrong, bits=4)
    with pytest.raises(ValueError, match=message.replace("calibrate", "certify")):
        cp.certify(model, model, wrong, cp.Budget("loss", max_drop=0.1))


def test_tokens_beyond_the_embedding_and_positions_beyond_the_table_are_named():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2", n_embd=16, n_head=2, n_layer=1, vocab_size=50, n_positions=16
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ValueError, match="calibrate item 1: token 50, and the model's embedding has 50 rows"
    ):
        cp.quantize(model, [{"input_ids": torch.full((1, 8), i)} for i in (49, 50)], bits=4)
    with pytest.raises(
        ValueError, match=r"calibrate: the model fails on an item of shape .*\(1, 17\).*too long"
    ):
        cp.quantize(
            model, [{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in (16, 17, 4)], bits=4
        )


@pytest.mark.parametrize("split", ["select", "certify"])
def test_a_budget_on_one_document_is_refused_at_once(trained, split):
    model, (x, y) = trained
    parts = {
        p: Split(
            items=tuple((x[i : i + 1], y[i : i + 1]) for i in range(8 * k, 8 * k + 8)),
            documents=tuple("abcdefgh"),
        )
        for k, p in enumerate(("calibrate", "price", "select", "certify"))
    }
    parts[split] = replace(parts[split], documents=("one",) * 8)
    with pytest.raises(ValueError, match=f"the {split} split has items of 1 document only"):
        cp.quantize(model, cp.Splits(**parts), budget=cp.Budget("loss", max_drop=0.1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, d: cp.quantize(m, d, bits=True), "bits=True is not offered"),
        (lambda m, d: cp.quantize(m, d, bits=4, layers=[]), "layers is empty"),
        (lambda m, d: cp.price(m, d, options=[]), "options is empty"),
        (
            lambda m, d: cp.price(m, d, options=[cp.Quantize(bits=4)], labels=0),
            "labels=0: expected .*a whole number of at least 1",
        ),
        (lambda m, d: cp.Settings(batch_size=0), "batch_size=0: expected a whole number"),
    ],
)
def test_arguments_that_cannot_be_are_told(trained, call, message):
    model, data = trained
    with pytest.raises(ValueError, match=message):
        call(model, batches(data))


def test_a_weight_that_is_no_number_is_named_before_the_analysis(trained):
    model = copy.deepcopy(trained[0])
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 3: its weight holds NaN"):
        cp.analyze(model, batches(trained[1]), quantities=["trace"])


def test_a_result_prints_as_a_few_lines(trained):
    model, data = trained
    budget = cp.Budget("loss", max_drop=0.5)
    result = cp.quantize(model, batches(data), bits=[4, 8], budget=budget)
    lines = repr(result).splitlines()
    assert str(result) == repr(result) and 3 <= len(lines) <= 8 and "tensor" not in repr(result)
    assert lines[0] == f"Result: Sequential, {result.plan.bytes / 1e6:.2f} MB"
    counts = {
        key: list(result.plan.choices.values()).count(key) for key in result.plan.choices.values()
    }
    assert all(f"{count} × {key}" in lines[1] for key, count in counts.items())
    assert f"verdict: {result.verdict.status}: loss drop {result.verdict.drop:.4g}" in lines[2]
    plain = repr(cp.quantize(model, batches(data), bits=4))
    assert "verdict: none was asked for" in plain and "trials" not in plain
