"""Everything on an accelerator, beside the CPU. Skipped where there is none (``TEST_DEVICE=mps``
names another one)."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import curvprune as cp
from curvprune import run as runs
from curvprune.artifact import tensor_names
from curvprune.model import evaluate
from curvprune.run import digits
from tests import tiny

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
there_is = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(
    DEVICE, lambda: True
)
pytestmark = pytest.mark.skipif(not there_is(), reason=f"no {DEVICE} device")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.hidden = nn.Linear(8 * 16, 24)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = self.second(x).relu().flatten(1)
        return self.head(self.drop(self.hidden(x).relu()))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network on the CPU that has learnt the digits, and batches of others, the last one
    shorter."""
    images, labels = digits()
    x = images.reshape(-1, 1, 8, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:900]), labels[:900]).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval(), list(zip(x[900:].split(64), labels[900:].split(64), strict=True))


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


def home_of(model: nn.Module) -> str:
    (kind,) = {t.device.type for t in (*model.parameters(), *model.buffers())}
    return kind


def loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    return float(evaluate(model, data, cp.Classification()).mean_loss)


@pytest.fixture(scope="module")
def passages() -> list[dict[str, Tensor]]:
    """Padded sequences of different length."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (40, 48, 33):
        ids = torch.randint(0, 256, (4, 48), generator=generator)
        mask = (torch.arange(48) < length).long().expand(4, 48)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton", "empirical_fisher"])
def test_products_with_curvature_are_those_of_the_cpu(trained, matrix):
    model, data = trained
    vectors = torch.randn(
        sum(p.numel() for p in model.parameters()), 2, generator=torch.Generator().manual_seed(1)
    )
    ours = getattr(cp, matrix)(there(model), data) @ vectors.to(DEVICE)
    assert ours.device.type == DEVICE
    exact = (
        getattr(cp, matrix)(copy.deepcopy(model).double(), [(x.double(), y) for x, y in data])
        @ vectors.double()
    )
    assert float((ours.cpu() - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_an_analysis_finds_the_same_curvature(trained, matrix):
    model, data = trained
    ours, theirs = (cp.analyze(m, data[:2], matrix=matrix, seed=0) for m in (there(model), model))
    for name, layer in theirs.layers.items():
        assert ours.layers[name].trace.value == pytest.approx(layer.trace.value, rel=1e-3)
        torch.testing.assert_close(
            ours.layers[name].diagonal.cpu(), layer.diagonal, rtol=1e-2, atol=1e-5
        )
    assert ours.to_dict().keys() == theirs.to_dict().keys()


def test_a_sampled_analysis_runs(trained):
    model, data = trained
    found = cp.analyze(there(model), data[:2], matrix="fisher")
    assert all(layer.trace.value > 0 for layer in found.layers.values())


BOTH = cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=4))
WITHOUT_GROUPS = ["first", "hidden", "head"]
OPTIONS = {
    "2 bits": lambda m, d: cp.quantize(m, d, bits=2, group_size=16, symmetric=False),
    "1 bit": lambda m, d: cp.quantize(m, d, bits=1, group_size=16, symmetric=False),
    "4 bits per channel": lambda m, d: cp.quantize(m, d, bits=4),
    "zeros": lambda m, d: cp.prune(m, d, sparsity=0.6),
    "2:4": lambda m, d: cp.prune(m, d, pattern="2:4", layers=["hidden", "head"]),
    "zeros, placed": lambda m, d: cp.prune(m, d, sparsity=0.6, allocate=True),
    "both": lambda m, d: cp.compress(m, d, options=[BOTH]),
    "cast": lambda m, d: cp.compress(m, d, options=[cp.Cast(dtype="float16")]),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_compressed_models_stay_on_the_device_and_are_as_good(trained, what, tmp_path):
    model, data = trained
    ours, theirs = (OPTIONS[what](m, data) for m in (there(model), model))
    assert home_of(ours.model) == DEVICE
    assert ours.plan.choices.keys() == theirs.plan.choices.keys()
    dense = loss(model, data)
    assert loss(ours.model, data) - dense == pytest.approx(
        loss(theirs.model, data) - dense, rel=0.3, abs=0.01
    )
    ours.save(tmp_path / "saved")
    for packed in (False, True):
        read = cp.load(tmp_path / "saved", model=Net(), packed=packed, device=DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(
                read(data[0][0].to(DEVICE)), ours.model(data[0][0].to(DEVICE))
            )


def test_hidden_units_are_removed(trained):
    model, data = trained
    result = cp.prune(there(model), data, structured=0.15)
    assert home_of(result.model) == DEVICE
    assert loss(result.model, data) < loss(model, data) + 0.2
    recovered = cp.recover(result, there(model), data, steps=10)
    assert (
        home_of(recovered.model) == DEVICE
        and recovered.recovery.loss_after <= recovered.recovery.loss_before
    )


@pytest.mark.parametrize("what", ["2 bits", "1 bit", "zeros", "cast"])
def test_a_recovery_trains_there(trained, what):
    model, data = trained
    start = OPTIONS[what](there(model), data)
    for codes in {what.endswith("bits"), False}:
        result = cp.recover(
            start, there(model), data, steps=40, lr=5e-3, loss="task", select=data, codes=codes
        )
        assert home_of(result.model) == DEVICE
        assert what == "cast" or result.recovery.loss_after < result.recovery.loss_before
        assert (result.recovery.flipped > 0) == codes


def test_a_budget_is_certified(trained):
    model, data = trained
    options = [cp.Quantize(bits=b) for b in (2, 3, 4, 8)]
    budget = cp.Budget(metric="loss", max_drop=0.05)
    result = cp.compress(there(model), data, options=options, budget=budget)
    assert home_of(result.model) == DEVICE and result.verdict is not None
    moved = cp.compress(model, data, options=options, budget=budget, device=DEVICE)
    assert moved.plan.bytes == result.plan.bytes


@pytest.mark.parametrize("curvature", ["fisher", "diagonal", "kfac", "hessian", "input"])
def test_prices_are_those_of_the_cpu(trained, curvature):
    """Within the noise of the labels that are drawn, which differ from device to device."""
    model, data = trained
    options = [cp.Quantize(bits=2), cp.Quantize(bits=3)]
    ours, theirs = (
        {
            (r.layer, r.option): r.price
            for r in cp.price(
                m, data, options=options, curvature=curvature, labels=4, layers=WITHOUT_GROUPS
            ).rows
        }
        for m in (there(model), model)
    )
    assert ours.keys() == theirs.keys()
    sampled = curvature in ("fisher", "diagonal", "kfac")
    total = sum(theirs.values())
    for key, price in theirs.items():
        assert ours[key] == pytest.approx(price, rel=0.5 if sampled else 0.1, abs=0.02 * abs(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_models(passages, dtype, tmp_path):
    model = tiny.llama().to(dtype)
    how = {"bits": 3, "group_size": 16, "layers": "model.layers.*"}
    ours, theirs = (cp.quantize(m, passages, **how) for m in (there(model), model))
    objective = cp.CausalLM()
    dense = float(evaluate(model, passages, objective).mean_loss)
    rises = [
        float(evaluate(r.model, passages, objective).mean_loss) - dense for r in (ours, theirs)
    ]
    assert rises[0] == pytest.approx(rises[1], rel=0.3, abs=0.03)
    ours.save(tmp_path / "saved")
    batch = {k: v.to(DEVICE) for k, v in passages[0].items()}
    for packed in (False, True):
        read = cp.load(tmp_path / "saved", packed=packed, device=DEVICE)
        with torch.no_grad():
            expected, found = ours.model(**batch).logits.float(), read(**batch).logits.float()
        assert float((found - expected).norm() / expected.norm()) < (
            1e-5 if dtype == torch.float32 else 2e-2
        )
    recovered = cp.recover(ours, there(model), passages, steps=10, batch_size=2)
    assert recovered.recovery.loss_after <= recovered.recovery.loss_before


def test_a_recipe_runs_to_its_verdict_and_goes_on_where_it_stopped(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    text = recipe.read_text().replace("device: cpu", f"device: {DEVICE}")
    recipe.write_text(text + "recover: {steps: 6, batch_size: 4}\n")
    first = runs.run(recipe, tmp_path / "out", progress=False)
    assert first.record.verdict.status == "CERTIFIED"
    (tmp_path / "out" / "verdict.json").unlink()
    for path in (tmp_path / "out" / "state").rglob("*certify*.json"):
        path.unlink()
    again = runs.run(recipe, tmp_path / "out", progress=False)
    assert again.record.verdict.drop == pytest.approx(first.record.verdict.drop, abs=1e-4)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["bytes"] == sum(
        size for _, size in tensor_names(Path(tmp_path / "out" / "model")).values()
    )


def test_sums_of_a_pass_do_not_depend_on_the_device(passages):
    model = tiny.llama()
    objective = cp.CausalLM()
    ours, theirs = (evaluate(m, passages, objective) for m in (there(model), model))
    torch.testing.assert_close(
        torch.as_tensor(ours.loss), torch.as_tensor(theirs.loss), rtol=1e-4, atol=1e-4
    )
