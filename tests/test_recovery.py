"""Recovery: what is fixed stays fixed, gradients and optima against closed forms, the best state
kept, and what is measured is what is stored."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.compression import Diverged, Training, dequantize
from curvprune.compression import recovery as recovery
from curvprune.model import as_split, evaluate, find_layers, make_objective, split_items
from curvprune.run import RecipeError, RecoverSection
from curvprune.run import pipeline as pipeline
from curvprune.run import stages as stages
from tests import tiny

PORTABLE_NOT = cp.Settings(portable=False)


def tokens(items: int = 48, *, seed: int = 0, length: int = 32) -> list[dict[str, torch.Tensor]]:
    """Sequences that the tiny Llama itself finds likely enough to differ from noise: short cycles
    of few tokens."""
    g = torch.Generator().manual_seed(seed)
    cycles = torch.randint(0, 256, (items, 4), generator=g)
    return [{"input_ids": cycles.repeat(1, length // 4)[i : i + 8]} for i in range(0, items, 8)]


class Net(nn.Module):
    """A convolution, BatchNorm, dropout and a classifier: everything that training mode would
    change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_var.uniform_(0.5, 2)
    net.norm.running_mean.uniform_(-0.5, 0.5)
    return net.eval()


def images(n: int = 64, *, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 1, 4, 4, generator=g), torch.randint(0, 5, (n,), generator=g))]


# --------------------------------------------------------------------------------- what stays fixed


@pytest.mark.parametrize(
    "option",
    [
        cp.Quantize(bits=3, group_size=16),
        cp.Quantize(bits=2, group_size=24, symmetric=False),
        cp.Quantize(bits=1, symmetric=False),
        cp.Quantize(bits=1, group_size=16),
        cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=3)),
    ],
    ids=lambda o: o.key,
)
def test_codes_and_zero_points_stay_and_the_weights_are_those_of_the_stored_grid(option):
    model = tiny.llama()
    before = cp.compress(model, tokens(), options=[option], settings=PORTABLE_NOT)
    weights = {n: p.clone() for n, p in before.model.named_parameters()}
    after = cp.recover(before, model, tokens(), steps=15, lr=1e-2)
    assert after.recovery.best_step > 0 and after.recovery.loss_after < after.recovery.loss_before
    moved = 0
    for name, layer in find_layers(after.model).items():
        old, new = before.solved[name], after.solved[name]
        assert torch.equal(old.codes, new.codes)
        assert new.scale.dtype == old.scale.dtype == torch.float16 and bool((new.scale > 0).all())
        if new.zero is not None and not new.zero.is_floating_point():
            assert torch.equal(old.zero, new.zero)
        grid = dequantize(
            new.codes, new.scale, new.zero, getattr(option, "quantize", option).group_size
        )
        assert torch.equal(layer.as_matrix(layer.weight.detach()), grid)
        moved += int((old.scale != new.scale).sum())
    assert moved > 0
    for n, p in before.model.named_parameters():
        assert torch.equal(p, weights[n]), "the result that was recovered is left as it is"


@pytest.mark.parametrize(
    "option",
    [
        cp.Quantize(bits=3, group_size=16),
        cp.Quantize(bits=2, group_size=24, symmetric=False),
        cp.Quantize(bits=1, symmetric=False),
        cp.Quantize(bits=5),
        cp.PruneQuantize(prune=cp.Prune(pattern="2:4"), quantize=cp.Quantize(bits=3)),
    ],
    ids=lambda o: o.key,
)
def test_codes_move_where_that_is_asked_for_and_they_are_coarse_enough(option):
    model = tiny.llama()
    before = cp.compress(model, tokens(), options=[option], settings=PORTABLE_NOT)
    weights = {n: p.clone() for n, p in before.model.named_parameters()}
    after = cp.recover(before, model, tokens(), steps=15, lr=1e-2, codes=True)
    assert after.recovery.best_step > 0 and after.recovery.loss_after < after.recovery.loss_before
    quantize = getattr(option, "quantize", option)
    flipped = 0
    for name, layer in find_layers(after.model).items():
        old, new = before.solved[name], after.solved[name]
        flipped += int((old.codes != new.codes).sum())
        assert int(new.codes.min()) >= -(2 ** (quantize.bits - 1)) and int(new.codes.max()) < 2 ** (
            quantize.bits - 1
        )
        grid = dequantize(new.codes, new.scale, new.zero, quantize.group_size)
        assert torch.equal(layer.as_matrix(layer.weight.detach()), grid)
        if quantize is not option:
            assert not bool(grid[old.weight == 0].any()), "zeros of a pruned weight stay"
    again = copy.deepcopy(before.model)  # as a resumed run brings it back
    restored = recovery.restore_(again, before.solved, recovery.trained_tensors(after.recovery))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in after.model.named_parameters())
    assert all(torch.equal(restored[n].codes, one.codes) for n, one in after.solved.items())
    assert flipped == after.recovery.flipped and (flipped > 0) == (
        quantize.bits <= recovery.CODES_UP_TO
    )
    assert (
        after.recovery.trained > cp.recover(before, model, tokens(), steps=1).recovery.trained
        or not flipped
    )
    for n, p in before.model.named_parameters():
        assert torch.equal(p, weights[n]), "the result that was recovered is left as it is"


def test_a_position_starts_where_the_uncompressed_weight_lies_or_in_the_middle():
    """Before a step is made the codes are those that were solved, whatever is nearest to the
    uncompressed weight."""
    torch.manual_seed(0)
    layer = find_layers(nn.Sequential(nn.Linear(16, 6)))["0"]
    solved = stages.solve_layer(layer, [cp.Quantize(bits=3, group_size=8, symmetric=False)], None)[
        0
    ]
    target = layer.weight.detach().clone()
    moved = solved.codes.clone()
    moved[:, ::3] += torch.where(moved[:, ::3] > 0, -1, 1).to(
        torch.int8
    )  # as a sweep that makes up for others would
    part = recovery._OnGrid(layer, replace(solved, codes=moved), 8, target)
    part.write_()
    assert torch.equal(part.codes, moved)
    index = torch.arange(16) // 8
    exact = target / solved.scale.float()[:, index] + solved.zero.float()[:, index] - moved
    offset = part.masters[-1] * recovery.CODE_UNIT
    inside = exact.abs() < recovery.SURE
    assert 0.5 < inside.float().mean() < 1
    torch.testing.assert_close(offset[inside], exact[inside])
    assert not bool(offset[~inside].any())
    part.masters[-1] += (
        100.0  # no further than half a step beyond the last value, and back from there at once
    )
    part.write_()
    assert bool((part.codes == 3).all())
    part.masters[-1] -= 1.1 / recovery.CODE_UNIT
    part.write_()
    assert bool((part.codes == 2).all())


@pytest.mark.parametrize("bits", [1, 3])
def test_the_gradient_of_codes_goes_straight_through_the_rounding(bits):
    """Against autograd in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 5, dtype=torch.float64)
    found = find_layers(nn.Sequential(layer))["0"]
    solved = stages.solve_layer(
        found, [cp.Quantize(bits=bits, group_size=8, symmetric=False)], None
    )[0]
    part = recovery._OnGrid(found, solved, 8, layer.weight.detach() + 0.02)
    part.write_()
    x = torch.randn(7, 20, dtype=torch.float64)
    layer(x).sin().sum().backward()
    part.take_(layer.weight.grad)
    master = part.masters[-1].clone().requires_grad_()
    position = master * recovery.CODE_UNIT + solved.codes
    index = torch.arange(20) // 8
    codes = position + (position.round() - position).detach()
    weight = (codes - solved.zero.double()[:, index]) * solved.scale.double()[:, index]
    assert torch.equal(weight.detach(), layer.weight.detach())
    nn.functional.linear(x, weight, layer.bias).sin().sum().backward()
    torch.testing.assert_close(part.masters[-1].grad, master.grad)


def test_a_scale_that_training_drives_below_zero_is_stored_as_the_smallest_there_is(net):
    result = cp.quantize(net, images(), bits=4, layers="fc")
    (part,) = (
        p
        for p in recovery._parts(result.model, result.solved)
        if p.parameter is result.model.fc.weight
    )
    part.masters[0].fill_(-1.0)
    part.write_()
    _, scale, _ = part.stored()
    assert bool((scale > 0).all()) and bool(result.model.fc.weight.isfinite().all())


def test_a_half_precision_model_moves_by_less_than_its_steps_and_is_stored_as_it_is(tmp_path):
    """Steps far below bfloat16's resolution add up in the wide copies; what is measured is
    rounded."""
    model = tiny.llama().bfloat16()
    before = cp.quantize(model, tokens(), bits=3, group_size=16, layers="model.layers.*")
    after = cp.recover(
        before, model, tokens(), steps=12, lr=1e-3
    )  # bfloat16 steps are 4e-3 and more
    assert after.recovery.best_step > 0
    norms = [r.model.model.norm.weight for r in (before, after)]
    assert norms[1].dtype == torch.bfloat16 and not torch.equal(*norms)
    assert all(s.scale.dtype == torch.bfloat16 for s in after.solved.values())
    after.save(tmp_path)
    loaded = cp.load(
        tmp_path
    ).state_dict()  # not its logits: .bfloat16() has rounded the rotary frequencies as well
    assert all(torch.equal(loaded[n], t) for n, t in after.model.state_dict().items())


NARROW = cp.PruneCast(prune=cp.Prune(sparsity=0.5), cast=cp.Cast(dtype="bfloat16"))


@pytest.mark.parametrize(
    "option", [cp.Prune(sparsity=0.6), cp.Prune(pattern="2:4"), NARROW], ids=lambda o: o.key
)
def test_zeros_stay_and_survivors_move(option):
    model = tiny.llama()
    before = cp.compress(model, tokens(), options=[option])
    after = cp.recover(before, model, tokens(), steps=15, lr=1e-2)
    for name, one in after.solved.items():
        kept = before.solved[name].weight != 0
        assert torch.equal(one.weight != 0, kept)
        assert not torch.equal(one.weight[kept], before.solved[name].weight[kept])
        assert option is not NARROW or torch.equal(one.weight, one.weight.bfloat16().float())


def test_a_cast_weight_stays_in_its_narrow_type_and_everything_else_is_free():
    model = tiny.llama()
    before = cp.compress(
        model, tokens(), options=[cp.Cast(dtype="bfloat16")], layers="model.layers.*.q_proj"
    )
    after = cp.recover(before, model, tokens(), steps=10, lr=1e-2, loss="task")
    assert after.recovery.trained == sum(p.numel() for p in model.parameters())
    for name in before.solved:
        weight = after.solved[name].weight
        assert torch.equal(weight, weight.bfloat16().float()) and not torch.equal(
            weight, before.solved[name].weight
        )
    assert not torch.equal(after.model.model.norm.weight, before.model.model.norm.weight)


def test_statistics_modes_and_the_baseline_stay(net):
    kept = copy.deepcopy(net).state_dict()
    before = cp.prune(net, images(), sparsity=0.9)
    before.model.train()
    after = cp.recover(before, net, images(), objective="label-free", steps=12, lr=3e-3)
    assert after.recovery.loss_after < after.recovery.loss_before
    assert torch.equal(after.model.norm.running_mean, net.norm.running_mean)
    assert all(m.training for m in after.model.modules())
    assert all(torch.equal(v, kept[n]) for n, v in net.state_dict().items())
    assert all(p.grad is None for p in (*net.parameters(), *after.model.parameters()))


def test_a_plain_module_keeps_its_zeros_and_frozen_parameters(net):
    model = copy.deepcopy(net)
    with torch.no_grad():
        model.fc.weight[:, ::2] = 0
    model.conv.weight.requires_grad_(False)
    found = cp.recover(model, net, images(), objective="label-free", steps=12, lr=1e-2)
    assert found.best_step > 0 and not bool(found.model.fc.weight[:, ::2].any())
    assert torch.equal(found.model.conv.weight, net.conv.weight)
    assert (
        found.trained == 5 * 64 + 5 + 8 + 8 + 8
    )  # half of fc, its bias, the convolution's bias, BatchNorm


# ---------------------------------------------------------------------- closed forms, other answers


@pytest.mark.parametrize("width", [24, 30])  # 30: the last group is shorter
@pytest.mark.parametrize("bits", [1, 3])
def test_gradients_of_scales_and_zeros_are_those_of_autograd(width, bits):
    """Against autograd through the written-out dequantization, in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(width, 5, dtype=torch.float64)
    option = cp.Quantize(bits=bits, group_size=8, symmetric=False)
    solved = stages.solve_layer(find_layers(nn.Sequential(layer))["0"], [option], None)[0]
    found = find_layers(nn.Sequential(layer))["0"]
    part = recovery._OnGrid(found, solved, 8)
    part.write_()
    x = torch.randn(7, width, dtype=torch.float64)
    (layer(x).sin().sum()).backward()
    part.take_(layer.weight.grad)

    scale, zero = solved.scale.double().requires_grad_(), solved.zero.double().requires_grad_()
    index = torch.arange(width) // 8
    weight = (solved.codes.double() - zero[:, index]) * scale[:, index]
    assert torch.equal(weight, layer.weight)
    (nn.functional.linear(x, weight, layer.bias).sin().sum()).backward()
    torch.testing.assert_close(part.masters[0].grad, scale.grad * solved.scale.double())
    if bits == 1:
        torch.testing.assert_close(part.masters[1].grad, zero.grad * part.zero_unit)
    assert len(part.masters) == (2 if bits == 1 else 1)


@pytest.mark.parametrize("rows", [3, 64, 150])
def test_the_divergence_and_its_gradient_are_torchs(rows):
    g = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(rows, 11, dtype=torch.float64, generator=g) for _ in range(2))
    ours.requires_grad_()
    exact = nn.functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="sum", log_target=True
    )
    (wanted,) = torch.autograd.grad(3 * exact, ours)
    value = recovery._Divergence.apply(ours, theirs)
    (found,) = torch.autograd.grad(3 * value, ours)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_the_training_loss_is_that_of_the_positions_that_count(padded):
    """Beside the label-free objective, whose losses autograd differentiates."""
    model, other = tiny.llama(), tiny.llama(seed=1)
    batch = dict(tokens(8)[0])
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 5:] = 0
    values, gradients = [], []
    for loss in (recovery._Distillation(model), cp.model.losses.LabelFree(model)):
        total, count = loss.loss(other, batch)
        assert count == batch["input_ids"].numel() - 27 * padded
        gradients.append(torch.autograd.grad(total, list(other.parameters())))
        values.append(total.detach())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


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
            return cp.model.losses.ItemResults(loss=loss, count=ones, correct=ones)

    split = as_split([(x, y)])
    small = copy.deepcopy(model)
    mask = torch.rand(3, 12) > 0.4
    with torch.no_grad():
        small.weight.mul_(mask)
    found = cp.recover(
        small, model, split, select=split, objective=Squared(), loss="task", steps=1500, lr=3e-2, batch_size=200,
        clip=1e9, bfloat16=False,
    )  # fmt: skip
    for row, kept in enumerate(mask):
        exact = torch.linalg.lstsq(x[:, kept].double(), y[:, row : row + 1].double()).solution[:, 0]
        torch.testing.assert_close(
            found.model.weight[row, kept].double(), exact, rtol=1e-3, atol=1e-3
        )
    assert not bool(found.model.weight[~mask].any())


def test_a_parameter_that_a_batch_does_not_reach_does_not_move():
    """Each of two branches is reached by one item: after two steps each has made one step of Adam,
    which is the rate times the tensor's unit whatever the gradient."""

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
        steps = ((after - before).abs() / recovery._unit(before.detach())).flatten()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-2, atol=0)
        moved.append(float(steps[0].detach()))
    assert sorted(moved) == pytest.approx(
        [0.5e-2, 1e-2], rel=1e-2
    )  # a cosine's second of two steps is half as long


def test_losses_before_and_after_are_those_of_the_models_on_select():
    model, select = tiny.llama(), tokens(16, seed=5)
    before = cp.prune(model, tokens(), sparsity=0.7)
    after = cp.recover(before, model, tokens(), select=select, steps=20, lr=1e-2, every=4)
    objective = make_objective("auto", model, select[0])
    losses = [
        evaluate(r.model, as_split(select).batches(8), objective).mean_loss for r in (before, after)
    ]
    assert [after.recovery.loss_before, after.recovery.loss_after] == pytest.approx(
        losses, abs=1e-6
    )
    history = after.recovery.history
    assert [h["step"] for h in history] == [0, 4, 8, 12, 16, 20]
    assert after.recovery.loss_after == min(h["select"] for h in history)
    again = cp.recover(before, model, tokens(), select=select, steps=20, lr=1e-2, every=4)
    assert again.recovery.history == history


def test_what_was_measured_before_is_not_measured_again_and_the_results_are_the_best_states(
    monkeypatch,
):
    model, select = tiny.llama(), as_split(tokens(16, seed=5))
    start = copy.deepcopy(model)
    with torch.no_grad():
        start.model.layers[0].mlp.up_proj.weight *= 0.5
    objective = make_objective("auto", model, select.items[0])
    known, calls = evaluate(start, select.batches(2), objective), []
    monkeypatch.setattr(recovery, "evaluate", count_calls(evaluate, calls))
    training = Training(steps=20, lr=1e-2, every=10)
    found = recovery.recover_(
        start, None, model, objective, as_split(tokens()), select, training, before=known
    )
    assert len(calls) == 2 and found.loss_before == found.history[0]["select"] == known.mean_loss
    assert found.best_step > 0
    again = evaluate(found.model, select.batches(2), objective)
    for name in ("loss", "count", "correct"):
        assert torch.allclose(getattr(found.results, name), getattr(again, name), atol=1e-4)
    # A start that nothing is better than is kept with its results.
    best = replace(known, loss=known.loss * 0)
    kept = recovery.recover_(
        start, None, model, objective, as_split(tokens()), select, training, before=best
    )
    assert kept.best_step == 0 and kept.results is best


# ----------------------------------------------------------------------------- products in bfloat16


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


@pytest.mark.parametrize(
    "native, asked, fails, dtype",
    [
        (True, True, False, torch.bfloat16),
        (True, False, False, torch.float32),
        (False, True, False, torch.float32),
        (True, True, True, torch.float32),
    ],
)
def test_products_are_in_bfloat16_where_that_is_asked_for_and_possible(
    native, asked, fails, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    torch.manual_seed(0)
    model = Spy()
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.first.weight[:, ::2] = 0
    model.fails = small.fails = fails
    data = [(torch.randn(32, 12), torch.zeros(32, dtype=torch.long))]
    found = cp.recover(
        small, model, data, objective="label-free", steps=40, lr=1e-2, bfloat16=asked
    )
    assert found.model.seen == {dtype} and found.loss_after < found.loss_before
    assert ("in bfloat16 not here" in "".join(found.notes)) == fails
    select = as_split(data).items[3::4]
    exact = evaluate(found.model, select, make_objective("label-free", model, select[0]))
    assert found.loss_after == pytest.approx(exact.mean_loss, rel=1e-5), "measured in float32"


def test_a_loss_that_bfloat16_would_drown_is_trained_in_float32(net):
    before = cp.compress(net, images(), options=[cp.Cast(dtype="float16")])
    found = cp.recover(before, net, images(), objective="label-free", steps=2).recovery
    if torch.cpu._is_avx512_bf16_supported():
        assert "products in float32, because in bfloat16 an item's loss is" in found.notes[0]
    assert found.loss_before < 1e-5


# ----------------------------------------------------------------------------------- the best state


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
        cp.recover(
            before, net, [*good, *bad], select=select, objective="label-free",
            steps=64, every=1, lr=1e-2, batch_size=1, seed=3,
        )  # fmt: skip
    kept = caught.value.recovery
    assert 0 < kept.best_step < kept.steps and kept.loss_after < kept.loss_before
    loss = evaluate(
        kept.model, as_split(select).batches(1), make_objective("label-free", net, good[0])
    ).mean_loss
    assert loss == pytest.approx(kept.loss_after, abs=1e-9)
    assert f"step {kept.best_step} was kept" in kept.notes[0]


def test_a_time_ends_the_training(net):
    before = cp.prune(net, images(), sparsity=0.7)
    found = cp.recover(before, net, images(), seconds=0.2).recovery
    assert found.steps >= 1 and found.history[-1]["step"] == found.steps


# ----------------------------------------------------------------------------------- what is stored


def test_another_process_loads_exactly_what_was_measured(tmp_path):
    model, probe = tiny.llama(tied=False), tokens(8, seed=9)[0]
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
        assert (found.recovery.flipped > 0) == isinstance(
            getattr(option, "quantize", option), cp.Quantize
        )
        assert found.recovery.best_step > 0
        found.save(tmp_path / option.key)
        with torch.no_grad():
            logits[option.key] = found.model(**probe).logits
    torch.save(probe, tmp_path / "probe.pt")
    script = (
        "import sys, torch, curvprune as cp; torch.set_num_threads(1); f = sys.argv[1]\n"
        "x = torch.load(f + '/probe.pt')\n"
        "with torch.no_grad(): found = {k: cp.load(f + '/' + k)(**x).logits for k in sys.argv[2:]}\n"
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


def test_codes_of_a_model_without_units_start_in_the_middle(net):
    """The uncompressed model has other shapes there; where it has the same, its weights say
    where."""
    pytest.importorskip("torch_pruning")
    small = cp.prune(net, images(200), structured={"channels": 0.5}).model
    before = cp.quantize(small, images(200), bits=2)
    parts = recovery._parts(before.model, before.solved, find_layers(net))
    middle = {
        p.layer.name: not bool(p.masters[-1].any())
        for p in parts
        if isinstance(p, recovery._OnGrid)
    }
    assert middle == {"conv": True, "fc": True}
    parts = recovery._parts(before.model, before.solved, find_layers(small))
    assert all(bool(p.masters[-1].any()) for p in parts if isinstance(p, recovery._OnGrid))
    after = cp.recover(
        before, net, images(200), objective="label-free", steps=30, lr=1e-2, codes=True
    )
    assert after.recovery.loss_after < after.recovery.loss_before


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
    twice = cp.recover(
        kept, net, replace(splits, select=splits.certify), steps=1
    )  # now certify has chosen
    with pytest.warns(
        UserWarning, match="64 of the 64 items of the certify split have also made or chosen"
    ):
        cp.recover(twice, net, splits, budget=budget, steps=1)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps=0 must be a positive whole number"),
        ({"batch_size": -3}, "batch_size=-3 must be a positive whole number"),
        ({"lr": -1.0}, "lr=-1.0 must be a positive number"),
        ({"seconds": float("inf")}, "seconds=inf"),
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
def test_arguments_that_cannot_be(net, change, message, monkeypatch):
    before = cp.prune(net, images(), sparsity=0.5)
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message):
        cp.recover(before, net, change.pop("data", images()), **change)


def test_models_that_do_not_fit(net, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: pytest.fail("training began"))
    before = cp.prune(net, images(), sparsity=0.5)
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


# ------------------------------------------------------------------------------------------ recipes


def test_items_to_recover_on_are_trained_on(net, recipe, tmp_path, monkeypatch):
    def taken(_model, _solved, _baseline, _objective, train, *_arguments, **_named):
        raise InterruptedError(train.sha256())

    monkeypatch.setattr(stages, "recover_", taken)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.read_text().replace("  certify: 16\n", "  certify: 16\n  recover: 6\n"))
    job, _ = pipeline.prepare(pipeline.load_recipe(path), None, progress=False)
    with pytest.raises(InterruptedError, match=job.splits.recover.sha256()):
        pipeline.run(path, tmp_path / "out", progress=False)
    monkeypatch.setattr("curvprune.api.recover_", taken)
    parts = [as_split([(x + i, y) for x, y in images()]) for i in range(4)]
    splits = cp.Splits(**dict(zip(("calibrate", "price", "select", "certify"), parts, strict=True)))
    own = as_split([(torch.zeros_like(x), y) for x, y in images()])
    for data, train in ((splits, splits.calibrate), (replace(splits, recover=own), own)):
        with pytest.raises(InterruptedError, match=train.sha256()):
            cp.recover(cp.prune(net, images(), sparsity=0.5), net, data)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tiny.write_recipe(tmp_path_factory.mktemp("tiny"))
    path.write_text(path.read_text() + "recover: {steps: 20, lr: 0.01, every: 5, codes: true}\n")
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> pipeline.RunResult:
    return pipeline.run(recipe, tmp_path_factory.mktemp("run") / "out", progress=False)


def files(folder: Path) -> dict[str, bytes]:
    names = [folder / "plan.json", folder / "verdict.json", *sorted((folder / "model").rglob("*"))]
    return {str(f.relative_to(folder)): f.read_bytes() for f in names}


def test_a_run_recovers_before_it_certifies(recipe, finished):
    record = finished.record
    recovered = record["recoveries"]
    assert recovered and all(
        r["loss_after"] <= r["loss_before"] and r["flipped"] > 0 for r in recovered
    )
    names = {t["name"]: t for t in record["trials"]}
    for entry in recovered:
        before, after = names[f"{entry['plan']}, applied"], names[f"{entry['plan']}, recovered"]
        assert after["measured"] < before["measured"]
        start = (
            names[entry["plan"]] if before["note"] else before
        )  # its candidates, where those did better
        gained = entry["loss_before"] - entry["loss_after"]
        assert start["measured"] - after["measured"] == pytest.approx(gained, abs=1e-6)
    assert record["attempts"][0]["plan"].endswith(", recovered")
    # The verdict is that of the folder, by transformers' own loss.
    from transformers import AutoModelForCausalLM

    job, _ = pipeline.prepare(pipeline.load_recipe(recipe), None, progress=False)
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model").eval()
    total = count = 0.0
    for item in job.splits.certify.items:
        with torch.no_grad():
            ids = item["input_ids"]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert record["measured"]["compressed"] == pytest.approx(total / count, abs=1e-5)
    html = (finished.folder / "report.html").read_text()
    assert 'id="t-recoveries"' in html and "Recovery" in html


def test_an_interrupted_recovery_starts_again_and_nothing_before_it_does(
    recipe, finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def killed(*arguments, advance, **named):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            stages.recover_ = killed
            pipeline.run(recipe, out, progress=False)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    casts = "model.embed_tokens"  # stored as a rule: reading it is solving it
    first = len(list((out / "state").rglob("*.json")))
    real, again = stages.solve_layer, []
    monkeypatch.setattr(
        stages, "solve_layer", lambda layer, *a: again.append(layer.name) or real(layer, *a)
    )
    monkeypatch.setattr(stages, "fisher_pass", count_calls(stages.fisher_pass, passes := []))
    result = pipeline.run(recipe, out, progress=False)
    assert first > 20 and files(out) == files(finished.folder)
    assert result.record["verdict"] == finished.record["verdict"]
    plans = len(finished.record["recoveries"])
    assert len([n for n in again if n != casts]) <= 14 * (plans - 1), (
        "the first plan's layers were solved already"
    )
    assert len(passes) == 1  # read from the totals
    trained = []
    monkeypatch.setattr(stages, "recover_", lambda *a, **k: trained.append(1))
    (out / "report.json").unlink()
    assert (
        pipeline.run(recipe, out, progress=False).record["recoveries"]
        == result.record["recoveries"]
    )
    assert not trained and files(out) == files(finished.folder)


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "model").glob("*.safetensors")}


@pytest.mark.parametrize("candidates", [False, True])
def test_another_budget_knows_what_was_recovered(recipe, tmp_path, monkeypatch, candidates):
    """Plans of the run that is reused are candidates again, as they were, and are not made
    again."""
    select_plans, seen = pipeline.select_plans, []

    def selected(job, found):  # whether the candidates or the sequential pass are recovered
        bench, best = select_plans(job, found)
        for trial in bench.trials:
            trial["metric_drop"] += -1.0 if candidates else 1.0
            trial["expected"] *= 3  # as if prices had been corrected since
        if seen:  # a run for another budget may not have measured the same plans
            bench.trials.clear()
        return bench, best

    monkeypatch.setattr(pipeline, "select_plans", selected)
    monkeypatch.setattr(stages, "next_plan", lambda job, tried: seen.append(tried))
    text = recipe.read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    first = pipeline.run(recipe, tmp_path / "first", progress=False)
    assert (
        bool([t for t in first.record["trials"] if "candidates, which were kept" in t["note"]])
        == candidates
    )
    monkeypatch.setattr(stages, "recover_", None)  # would fail
    wider = tmp_path / "wider.yaml"
    wider.write_text(text.replace("max_drop: 0.2", "max_drop: 0.9"))
    again = pipeline.run(wider, tmp_path / "again", progress=False, reuse=first.folder)
    assert weights(again.folder) == weights(first.folder)
    assert [a["plan"] for a in again.record["attempts"]] == ["earlier plan 1, recovered"]
    assert again.record["verdict"]["drop"] == first.record["verdict"]["drop"]
    assert any(
        "recovered by the reused run were candidates" in note for note in again.record["notes"]
    )
    for tried in seen:
        assert tried[0].record["name"].endswith(", recovered")
        assert tried[0].before["name"].endswith(", applied") != candidates, "what was recovered"
        assert tried[0].before["expected"] == tried[0].record["expected"], "by the same prices"
    assert len(seen) == 2
    written = json.loads((again.folder / "model" / "curvprune.json").read_text())["plan"]
    assert any(
        "recovered by the reused run were candidates" in note for note in written["notes"]
    ), "written anew"
    third = pipeline.run(recipe, tmp_path / "third", progress=False, reuse=again.folder)
    assert weights(third.folder) == weights(first.folder), "also from a run that has reused"
    (again.folder / "report.json").unlink()
    assert (
        pipeline.run(wider, again.folder, progress=False).record["attempts"]
        == again.record["attempts"]
    )


def test_an_earlier_plan_that_is_not_safe_is_followed_by_a_more_cautious_one(
    recipe, finished, tmp_path, monkeypatch
):
    """The best plan, which the earlier run has recovered, is not applied a second time."""
    monkeypatch.setattr(stages, "SAFE", 1.1)
    asked: list[float] = []
    monkeypatch.setattr(stages, "_more_cautious", lambda job, record: asked.append(record["bytes"]))
    path = tmp_path / "again.yaml"
    path.write_text(recipe.read_text().replace("title: Tiny", "title: Again"))
    result = pipeline.run(path, tmp_path / "out", progress=False, reuse=finished.folder)
    applied = [t for t in result.record["trials"] if t["name"].endswith(", recovered")]
    assert [t["name"] for t in applied] == ["earlier plan 1, recovered"] and asked == [
        applied[0]["bytes"]
    ]


@pytest.mark.parametrize("other", ["steps", "items"])
def test_what_another_recovery_made_is_not_taken(recipe, finished, tmp_path, monkeypatch, other):
    path = recipe
    if other == "steps":
        path = tmp_path / "shorter.yaml"
        path.write_text(recipe.read_text().replace("steps: 20", "steps: 10"))
    else:
        dealt = pipeline._load_data
        monkeypatch.setattr(
            pipeline, "_load_data", lambda *a: replace(s := dealt(*a), recover=s.price)
        )
    fresh = pipeline.run(path, tmp_path / "fresh", progress=False)
    assert files(fresh.folder) != files(finished.folder)
    source = shutil.copytree(finished.folder, tmp_path / "source")
    plans = [{layer["name"]: layer["option"] for layer in finished.record["layers"]}]
    (source / "state" / stages.EARLIER).write_text(json.dumps(plans))  # as if it had reused one
    reused = pipeline.run(path, tmp_path / "reused", progress=False, reuse=source)
    assert (
        files(reused.folder) == files(fresh.folder)
        and not (reused.folder / "state" / stages.EARLIER).exists()
    )
    assert next(s for s in reused.record["stages"] if s["name"] == "solve options")["resumed"]


def test_earlier_plans_that_do_not_fit_are_left_out(recipe, tmp_path):
    tight, wide = tmp_path / "tight.yaml", tmp_path / "wide.yaml"
    tight.write_text(recipe.read_text().replace("max_drop: 0.2", "max_drop: 0.03"))
    first = pipeline.run(tight, tmp_path / "first", progress=False)
    job, _ = pipeline.prepare(pipeline.load_recipe(tight), None, progress=False)
    choices = {layer["name"]: layer["option"] for layer in first.record["layers"]}
    used = job.bytes_of(choices) + job.within.fixed_bytes - job.fixed_bytes  # with the header
    assert used > job.smallest_bytes()
    for limit, known in ((used, True), (used - 1, False)):
        wide.write_text(
            recipe.read_text().replace("max_drop: 0.2", f"max_drop: 0.9, max_bytes: {limit}")
        )
        result = pipeline.run(wide, tmp_path / f"{known}", progress=False, reuse=first.folder)
        assert (
            any(t["name"] == "earlier plan 1, recovered" for t in result.record["trials"]) == known
        )
        assert result.record["attempts"][0]["status"] == "CERTIFIED"


def count_calls(function, calls):
    def counted(*arguments, **named):
        calls.append(named.get("resume"))
        return function(*arguments, **named)

    return counted


def test_a_recipe_without_a_budget_recovers_the_one_plan(recipe, tmp_path):
    text = recipe.read_text().replace("budget: {metric: loss, max_drop: 0.2}", "")
    text = text.replace(
        "      - quantize: {bits: 3, group_size: 16, symmetric: false}\n      - quantize: {bits: 8}\n",
        "",
    )
    path = tmp_path / "plain.yaml"
    path.write_text(text)
    result = pipeline.run(path, tmp_path / "out", progress=False)
    (found,) = result.record["recoveries"]
    assert found["best_step"] > 0 and result.record["measured"]["items"] == 16


def test_check_names_the_cost_and_the_section_agrees_with_the_code(recipe):
    assert pipeline.check(recipe).minutes["recover"] > 0
    section = RecoverSection().model_dump()
    assert Training(**section) == Training()
    assert Training(**RecoverSection(seconds=5.0).model_dump()) == Training(seconds=5.0)


@pytest.mark.parametrize(
    "line, key, message",
    [
        (
            "recover: {steps: 0}",
            "recover.steps",
            "expected steps of the optimizer, a whole number of at least 1",
        ),
        ("recover: {rate: 0.1}", "recover.rate", "unknown key"),
        ("recover: {loss: kl}", "recover.loss", "not offered"),
        ("objective: label-free\nrecover: {loss: task}", "recover.loss", "write distill"),
    ],
)
def test_a_wrong_section_is_one_message_with_its_line(
    recipe, tmp_path, line, key, message, monkeypatch
):
    text = recipe.read_text()
    start = text.index("recover:")
    path = tmp_path / "wrong.yaml"
    path.write_text(text[:start] + line + "\n")
    number = path.read_text().count("\n", 0, path.read_text().index("recover:")) + 1
    with pytest.raises(RecipeError, match=message) as caught:
        pipeline.run(path, tmp_path / "out", progress=False)
    assert str(caught.value).startswith(f"{path}:{number}: {key}")
