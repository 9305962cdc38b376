"""Recovery: optima against closed forms, the best state kept, and what is measured is what is
stored."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.compression import (
    Diverged,
    RecoveryItems,
    RecoverySummary,
    Training,
    recover_,
)
from curvprune.model import (
    CausalLM,
    ItemResults,
    as_split,
    evaluate,
    make_loss,
    split_items,
)
from curvprune.schema import decode
from tests import tiny
from tests.to_recover import NARROW, Net, images, make_net, tokens


@pytest.fixture
def net() -> Net:
    return make_net()


def test_distillation_on_a_fixed_support_ends_at_least_squares():
    """With two classes and small logits KL is a quadratic form: recovery of a linear model must end
    where the normal equations restricted to the support do. The objective here is that squared
    error itself, so that it is exact."""
    torch.manual_seed(0)
    x = torch.randn(200, 12) @ torch.randn(12, 12)
    model = nn.Linear(12, 3, bias=False)
    y = model(x).detach()

    class Squared(cp.Objective):
        name, measure = "squared", "squares"

        def loss(self, model, batch):
            return (self.logits(model, batch) - batch[1]).square().sum(), len(batch[0])

        def item_results(self, model, batch):
            loss = (self.logits(model, batch) - batch[1]).square().sum(1).double().detach()
            ones = torch.ones_like(loss)
            return ItemResults(loss=loss, count=ones, correct=ones)

    split = as_split([(x, y)])
    small = copy.deepcopy(model)
    mask = torch.rand(3, 12) > 0.4
    with torch.no_grad():
        small.weight.mul_(mask)
    how = {"loss": "task", "steps": 1500, "lr": 3e-2, "batch_size": 200, "clip": 1e9}
    found = cp.recover(
        small, model, split, select=split, objective=Squared(), bfloat16=False, **how
    )
    for row, kept in enumerate(mask):
        exact = torch.linalg.lstsq(x[:, kept].double(), y[:, row : row + 1].double()).solution[:, 0]
        torch.testing.assert_close(
            found.model.weight[row, kept].double(), exact, rtol=1e-3, atol=1e-3
        )
    assert not bool(found.model.weight[~mask].any())


def test_a_parameter_that_a_batch_does_not_reach_does_not_move():
    """Each of two branches is reached by one item: after two steps each has made one step of Adam,
    which is the rate times the tensor's size whatever the gradient: the power of two that is
    nearest to its root mean square, on a scale of logarithms."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([nn.Linear(4, 3, bias=False) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.branches[int(row[0] > 0)](row[None]) for row in x])

    torch.manual_seed(0)
    model, other = Branches(), Branches()
    data = as_split([(torch.tensor([[1.0, 2, 3, 4], [-1.0, 2, 3, 4]]), torch.tensor([0, 2]))])
    found = cp.recover(
        other, model, data, select=data, loss="task", steps=2, every=2, batch_size=1, lr=1e-2
    )
    assert found.best_step == 2
    moved = []
    for before, after in zip(other.parameters(), found.model.parameters(), strict=True):
        size = 2.0 ** round(math.log2(float(before.detach().square().mean().sqrt())))
        steps = ((after - before).abs() / size).flatten()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-2, atol=0)
        moved.append(float(steps[0].detach()))
    # A cosine's second of two steps is half as long.
    assert sorted(moved) == pytest.approx([0.5e-2, 1e-2], rel=1e-2)


def test_losses_before_and_after_are_those_of_the_models_on_select():
    model, select = tiny.llama(layers=1), tokens(16, seed=5)
    before = cp.prune(model, tokens(), sparsity=0.7)
    after = cp.recover(before, model, tokens(), select=select, steps=20, lr=1e-2, every=4)
    objective = make_loss("auto", model, select[0])
    for result, told in (
        (before, after.recovery.loss_before),
        (after, after.recovery.loss_after),
    ):
        measured = evaluate(result.model, as_split(select).batches(8), objective)
        assert told == pytest.approx(measured.mean_loss, abs=1e-6)
    history = after.recovery.history
    assert [moment.step for moment in history] == [0, 4, 8, 12, 16, 20]
    assert after.recovery.loss_after == min(moment.select for moment in history)
    assert [moment.training is None for moment in history] == [True] + 5 * [False]
    again = cp.recover(before, model, tokens(), select=select, steps=20, lr=1e-2, every=4)
    assert again.recovery.history == history


def test_what_is_written_of_a_recovery_is_read_back(net):
    found = cp.recover(cp.prune(net, images(), sparsity=0.5), net, images(), steps=2).recovery
    written = json.loads(json.dumps(found.to_dict()))
    names = ("loss_before", "loss_after", "measure", "steps", "best_step", "trained", "flipped")
    assert list(written) == [*names, "seconds", "history", "notes"]
    for name in names:
        assert written[name] == getattr(found, name)
    assert written["history"][0] == {"step": 0, "training": None, "select": found.loss_before}
    assert decode(RecoverySummary, written, source="here") == found.summary


class Counted(CausalLM):
    """Counts the batches that were evaluated item by item."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def item_results(self, model, batch):
        self.batches += 1
        return super().item_results(model, batch)


def test_what_was_measured_before_is_not_measured_again_and_the_results_are_the_best_states():
    model, select = tiny.llama(layers=1), as_split(tokens(16, seed=5))
    start = copy.deepcopy(model)
    with torch.no_grad():
        start.model.layers[0].mlp.up_proj.weight *= 0.5
    objective, train = Counted(), as_split(tokens())
    known = evaluate(start, select.batches(2), objective)
    objective.batches = 0
    training = Training(steps=20, lr=1e-2, every=10, batch_size=8)
    items = RecoveryItems(train, select, known)
    found = recover_(start, None, model, objective, items, training)
    assert objective.batches == 2 * 2, "two measurements of 16 items, none at the start"
    assert found.loss_before == found.history[0].select == known.mean_loss
    assert found.best_step > 0
    again = evaluate(found.model, select.batches(2), objective)
    for name in ("loss", "count", "correct"):
        assert torch.allclose(getattr(found.results, name), getattr(again, name), atol=1e-4)
    # A start that nothing is better than is kept with its results.
    best = RecoveryItems(train, select, replace(known, loss=known.loss * 0))
    kept = recover_(start, None, model, objective, best, training)
    assert kept.best_step == 0 and kept.results is best.before


class Spy(nn.Module):
    """Two layers; remembers in which types it computed while it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 3)
        self.seen: set[torch.dtype] = set()
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        if self.fails and x.dtype == torch.bfloat16:
            raise RuntimeError("not here")
        if torch.is_grad_enabled():
            self.seen.add(x.dtype)
        return self.second(x)


FAST = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@pytest.mark.parametrize(
    "asked, fails, wide, dtype",
    [
        (True, False, False, FAST),  # a machine without such products is not slowed down
        (False, False, False, torch.float32),
        (True, True, False, torch.float32),
        (True, False, True, torch.float64),
    ],
)
def test_products_are_in_bfloat16_where_that_is_asked_for_and_possible(asked, fails, wide, dtype):
    torch.manual_seed(0)
    model = Spy()
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.first.weight[:, ::2] = 0
    model.fails = small.fails = fails
    data = [(torch.randn(32, 12), torch.zeros(32, dtype=torch.long))]
    if wide:
        model, small = model.double(), small.double()
        data = [(x.double(), y) for x, y in data]
    found = cp.recover(
        small, model, data, objective="label-free", steps=40, lr=1e-2, bfloat16=asked
    )
    assert found.model.seen == {dtype} and found.loss_after < found.loss_before
    told = "in bfloat16 not here" in "".join(found.notes)
    assert told == (fails and torch.bfloat16 == FAST)
    select = as_split(data).items[3::4]
    exact = evaluate(found.model, select, make_loss("label-free", model, select[0]))
    assert found.loss_after == pytest.approx(exact.mean_loss, rel=1e-5), "measured in float32"


def test_a_loss_that_bfloat16_would_drown_is_trained_in_float32(net):
    before = cp.compress(net, images(), options=[cp.Cast(dtype="float16")])
    found = cp.recover(before, net, images(), objective="label-free", steps=2).recovery
    if torch.cpu._is_avx512_bf16_supported():
        assert "products in float32, because in bfloat16 an item's loss is" in found.notes[0]
    assert found.loss_before < 1e-5


@pytest.mark.parametrize("codes", [False, True])
def test_what_training_makes_worse_comes_back_as_it_was(net, codes):
    """Trained towards one model, judged by the labels that another gives: the state of step 0 is
    the best."""
    before = cp.quantize(net, images(), bits=3) if codes else cp.prune(net, images(), sparsity=0.5)
    x = images(seed=3)[0][0]
    select = [(x, before.model(x).argmax(1))]
    wrong = [(x, (before.model(x).argmax(1) + 1) % 5)]
    how = {"steps": 12, "every": 1, "lr": 1e-2, "patience": 3, "codes": codes}
    after = cp.recover(before, net, wrong, select=select, loss="task", **how)
    assert after.recovery.best_step == 0 and after.recovery.loss_after == after.recovery.loss_before
    assert after.recovery.flipped == 0
    assert after.recovery.steps == 3
    for n, p in before.model.named_parameters():
        assert torch.equal(p, after.model.get_parameter(n))


def test_a_loss_that_is_no_longer_finite_names_the_step_and_keeps_the_best_state(net):
    before = cp.prune(net, images(), sparsity=0.9)
    good, bad = images(32), images(32, seed=2)
    bad[0][0][5] = float("nan")
    select = images(32, seed=4)
    with pytest.raises(Diverged, match=r"loss nan.*at step \d+; lower lr") as caught:
        how = {"steps": 64, "every": 1, "lr": 1e-2, "batch_size": 1, "seed": 3}
        cp.recover(before, net, [*good, *bad], select=select, objective="label-free", **how)
    kept = caught.value.recovery
    assert 0 < kept.best_step < kept.steps and kept.loss_after < kept.loss_before
    objective = make_loss("label-free", net, good[0])
    loss = evaluate(kept.model, as_split(select).batches(1), objective).mean_loss
    assert loss == pytest.approx(kept.loss_after, abs=1e-9)
    assert f"step {kept.best_step} was kept" in kept.notes[0]


def test_a_time_ends_the_training(net):
    before = cp.prune(net, images(), sparsity=0.7)
    found = cp.recover(before, net, images(), seconds=0.2).recovery
    assert found.steps >= 1 and found.history[-1].step == found.steps


@pytest.mark.slow
def test_another_process_loads_exactly_what_was_measured(tmp_path):
    model, probe = tiny.llama(tied=False, layers=1), tokens(8, seed=9)[0]
    options = [
        cp.Quantize(bits=3, group_size=16, symmetric=False),
        cp.Prune(sparsity=0.5),
        NARROW,
        cp.PruneQuantize(
            prune=cp.Prune(pattern="2:4"), quantize=cp.Quantize(bits=4, group_size=16)
        ),
        cp.Cast(dtype="float16"),
    ]
    logits = {}
    for option in options:
        before = cp.compress(model, tokens(), options=[option])
        found = cp.recover(before, model, tokens(), steps=10, lr=1e-2, codes=True)
        rounded = isinstance(getattr(option, "quantize", option), cp.Quantize)
        assert (found.recovery.flipped > 0) == rounded
        assert found.recovery.best_step > 0
        found.save(tmp_path / option.key)
        with torch.no_grad():
            logits[option.key] = found.model(**probe).logits
    torch.save(probe, tmp_path / "probe.pt")
    script = (
        "import sys, torch, curvprune as cp; torch.set_num_threads(1); f = sys.argv[1]\n"
        "x = torch.load(f + '/probe.pt')\n"
        "with torch.no_grad():\n"
        "    found = {k: cp.load(f + '/' + k)(**x).logits for k in sys.argv[2:]}\n"
        "torch.save(found, f + '/logits.pt')"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *logits], check=True, capture_output=True
    )
    for key, other in torch.load(tmp_path / "logits.pt").items():
        assert torch.equal(other, logits[key]), key


def test_a_model_without_units_is_recovered_whole_and_saved(net, tmp_path):
    pytest.importorskip("torch_pruning")
    before = cp.prune(net, images(200), structured={"channels": 0.5}, uniform=True)
    after = cp.recover(before, net, images(200), steps=30, lr=1e-2)
    assert after.recovery.best_step > 0 and after.cuts == before.cuts
    assert after.recovery.trained == sum(p.numel() for p in before.model.parameters())
    after.save(tmp_path)
    x = images(4)[0][0]
    assert torch.equal(cp.load(tmp_path, model=Net())(x), after.model.eval()(x))


def test_the_verdict_is_that_of_the_recovered_model(net):
    x, y = images(400)[0]
    parts = [
        as_split([(x[i : i + 100], y[i : i + 100])], f"part {i}, item") for i in range(0, 400, 100)
    ]
    splits = cp.Splits(calibrate=parts[0], price=parts[1], select=parts[2], certify=parts[3])
    budget = cp.Budget("loss", max_drop=0.5)
    before = cp.prune(net, splits, sparsity=[0.5, 0.8], budget=budget)
    after = cp.recover(before, net, splits, budget=budget, steps=20, lr=1e-2)
    assert after.verdict == cp.certify(net, after.model, parts[3], budget)
    assert cp.recover(before, net, splits, steps=1).verdict is None


def test_what_compressed_a_model_does_not_certify_its_recovery(net):
    """`data` is dealt out anew by `recover`: only what the compression has set aside may
    certify."""
    budget = cp.Budget("loss", max_drop=0.5)
    x, y = images(128)[0]
    data = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 128, 8)]
    with pytest.raises(
        ValueError, match=r"recover: 64 of the 64 items of the certify split have also made"
    ):
        cp.recover(cp.quantize(net, data, bits=3), net, data, budget=budget, steps=1)
    kept = cp.quantize(net, data, bits=3, budget=budget)
    assert cp.recover(kept, net, data, budget=budget, steps=1).verdict is not None
    seeded = cp.quantize(net, data, bits=3, budget=budget, settings=cp.Settings(seed=1))
    with pytest.raises(ValueError, match=r"recover: [0-9]+ of the 64 items .* the same seed"):
        cp.recover(seeded, net, data, budget=budget, steps=1)
    assert cp.recover(seeded, net, data, budget=budget, steps=1, seed=1).verdict is not None
    again = [*data, *data]  # repeats items by itself: told, as `quantize` does
    with pytest.warns(UserWarning, match="of the 128 items of the certify split have also made"):
        repeated = cp.quantize(net, again, bits=3, budget=budget)
        assert cp.recover(repeated, net, again, budget=budget, steps=1).verdict is not None
    splits = split_items(data, seed=0)
    # Now certify has chosen.
    twice = cp.recover(kept, net, replace(splits, select=splits.certify), steps=1)
    with pytest.warns(
        UserWarning, match="64 of the 64 items of the certify split have also made or chosen"
    ):
        cp.recover(twice, net, splits, budget=budget, steps=1)


class TrainingBegan(Exception):
    """A forward pass was made to be differentiated; holds its input."""


def stop_where_training_begins(model: Net) -> None:
    def stop(_, arguments):
        if torch.is_grad_enabled():
            raise TrainingBegan(arguments[0])

    model.conv.register_forward_pre_hook(stop)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps=0: expected steps of the optimizer, a whole number of at least 1"),
        ({"batch_size": -3}, "batch_size=-3: expected items per step, a whole number"),
        ({"lr": -1.0}, "lr=-1.0: expected the relative learning rate, a number above 0"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"clip": True}, "clip=True"),
        ({"epochs": 3}, "unknown argument 'epochs'"),
        ({"budget": cp.Budget(max_bytes=10)}, "needs max_drop"),
        (
            {"budget": cp.Budget("loss", max_drop=0.1), "data": as_split(images())},
            "needs four splits",
        ),
        ({"data": images(1)}, "at least two items"),
        ({"loss": "task", "objective": "label-free"}, "needs labels"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_arguments_that_cannot_be(net, change, message):
    before = cp.prune(net, images(), sparsity=0.5)
    stop_where_training_begins(before.model)
    data = change.get("data", images())
    others = {name: value for name, value in change.items() if name != "data"}
    with pytest.raises(ValueError, match=message):
        cp.recover(before, net, data, **others)
    with pytest.raises(TrainingBegan):
        cp.recover(before, net, images())


def test_models_that_do_not_fit(net):
    before = cp.prune(net, images(), sparsity=0.5)
    stop_where_training_begins(before.model)
    stop_where_training_begins(net)
    other = copy.deepcopy(net)
    other.fc = nn.Linear(128, 7)
    with pytest.raises(
        ValueError, match=r"logits are \(1, 5\), the baseline's \(1, 7\).*same vocabulary"
    ):
        cp.recover(before, other, images())
    with pytest.raises(ValueError, match="is the baseline itself"):
        cp.recover(net, net, images())
    with pytest.raises(ValueError, match="nothing to train"):
        cp.recover(copy.deepcopy(net).requires_grad_(False), net, images())
    broken = copy.deepcopy(net)
    nn.init.constant_(broken.fc.bias, float("nan"))
    with pytest.raises(ValueError, match="loss on the select items is nan"):
        cp.recover(broken, net, images())


def test_items_to_recover_on_are_trained_on(net):
    x, y = images()[0]
    parts = [as_split([(x + i, y)]) for i in range(4)]
    splits = cp.Splits(calibrate=parts[0], price=parts[1], select=parts[2], certify=parts[3])
    own = as_split([(torch.zeros_like(x), y)])
    before = cp.prune(net, images(), sparsity=0.5)
    stop_where_training_begins(before.model)
    for data, train in ((splits, splits.calibrate), (replace(splits, recover=own), own)):
        with pytest.raises(TrainingBegan) as caught:
            cp.recover(before, net, data)
        (x,) = caught.value.args
        known = torch.cat([item[0] for item in train.items])
        same = (x[:, None] == known[None]).flatten(2).all(dim=2)
        assert len(x) == 8 and bool(same.any(dim=1).all())
