"""What a recovery may change: what is fixed stays fixed, and gradients of what is free are those of
autograd."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.compression import (
    CODE_STEP,
    CODES_UP_TO,
    Distillation,
    FreeGrid,
    code_range,
    dequantize,
    free_parts,
    restore_,
    solve_layer,
    trained_tensors,
)
from curvprune.model import LabelFree, find_layers
from tests import tiny
from tests.to_recover import NARROW, PORTABLE_NOT, Net, images, make_net, tokens


@pytest.fixture
def net() -> Net:
    return make_net()


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
    model = tiny.llama(layers=1)
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
        size = getattr(option, "quantize", option).group_size
        grid = dequantize(new.codes, new.scale, new.zero, size)
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
    model = tiny.llama(layers=1)
    before = cp.compress(model, tokens(), options=[option], settings=PORTABLE_NOT)
    weights = {n: p.clone() for n, p in before.model.named_parameters()}
    after = cp.recover(before, model, tokens(), steps=15, lr=1e-2, codes=True)
    assert after.recovery.best_step > 0 and after.recovery.loss_after < after.recovery.loss_before
    quantize = getattr(option, "quantize", option)
    flipped = 0
    for name, layer in find_layers(after.model).items():
        old, new = before.solved[name], after.solved[name]
        flipped += int((old.codes != new.codes).sum())
        low, high = code_range(quantize.bits)
        assert low <= int(new.codes.min()) and int(new.codes.max()) <= high
        grid = dequantize(new.codes, new.scale, new.zero, quantize.group_size)
        assert torch.equal(layer.as_matrix(layer.weight.detach()), grid)
        if quantize is not option:
            assert not bool(grid[old.weight == 0].any()), "zeros of a pruned weight stay"
    again = copy.deepcopy(before.model)  # as a resumed run brings it back
    restored = restore_(again, before.solved, trained_tensors(after.recovery))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in after.model.named_parameters())
    assert all(torch.equal(restored[n].codes, one.codes) for n, one in after.solved.items())
    assert flipped == after.recovery.flipped
    assert (flipped > 0) == (quantize.bits <= CODES_UP_TO)
    scales_alone = cp.recover(before, model, tokens(), steps=1).recovery
    assert (after.recovery.trained > scales_alone.trained) == (flipped > 0)
    for n, p in before.model.named_parameters():
        assert torch.equal(p, weights[n]), "the result that was recovered is left as it is"


def test_a_place_starts_where_the_uncompressed_weight_lies_or_in_the_middle():
    """Before a step is made the codes are those that were solved, whatever is nearest to the
    uncompressed weight."""
    torch.manual_seed(0)
    layer = find_layers(nn.Sequential(nn.Linear(16, 6)))["0"]
    option = cp.Quantize(bits=3, group_size=8, symmetric=False)
    (solved,) = solve_layer(layer, [option], None)
    target = layer.weight.detach().clone()
    # As a sweep that makes up for others would.
    moved = solved.codes.clone()
    moved[:, ::3] += torch.where(moved[:, ::3] > 0, -1, 1).to(torch.int8)
    part = FreeGrid(layer, replace(solved, codes=moved), target)
    part.write_()
    assert torch.equal(part.codes, moved)
    index = torch.arange(16) // 8
    exact = target / solved.scale.float()[:, index] + solved.zero.float()[:, index] - moved
    offset = part.masters[-1] * CODE_STEP
    inside = exact.abs() < 0.4999
    assert 0.5 < inside.float().mean() < 1
    torch.testing.assert_close(offset[inside], exact[inside])
    assert not bool(offset[~inside].any())
    # No further than half a step beyond the last value, and back from there at once.
    part.masters[-1].add_(100.0)
    part.write_()
    assert bool((part.codes == 3).all())
    part.masters[-1].sub_(1.1 / CODE_STEP)
    part.write_()
    assert bool((part.codes == 2).all())


@pytest.mark.parametrize("bits", [1, 3])
def test_the_gradient_of_codes_goes_straight_through_the_rounding(bits):
    """Against autograd in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 5, dtype=torch.float64)
    found = find_layers(nn.Sequential(layer))["0"]
    option = cp.Quantize(bits=bits, group_size=8, symmetric=False)
    (solved,) = solve_layer(found, [option], None)
    part = FreeGrid(found, solved, layer.weight.detach() + 0.02)
    part.write_()
    x = torch.randn(7, 20, dtype=torch.float64)
    layer(x).sin().sum().backward()
    part.take_(layer.weight.grad)
    master = part.masters[-1].clone().requires_grad_()
    place = master * CODE_STEP + solved.codes
    index = torch.arange(20) // 8
    codes = place + (place.round() - place).detach()
    weight = (codes - solved.zero.double()[:, index]) * solved.scale.double()[:, index]
    assert torch.equal(weight.detach(), layer.weight.detach())
    nn.functional.linear(x, weight, layer.bias).sin().sum().backward()
    torch.testing.assert_close(part.masters[-1].grad, master.grad)


def test_a_scale_that_training_drives_below_zero_is_stored_as_the_smallest_there_is(net):
    result = cp.quantize(net, images(), bits=4, layers="fc")
    parts = free_parts(result.model, result.solved)
    (part,) = (p for p in parts if isinstance(p, FreeGrid))
    assert part.parameter is result.model.fc.weight
    part.masters[0].fill_(-1.0)
    part.write_()
    assert bool((part.stored().scale > 0).all())
    assert bool(result.model.fc.weight.isfinite().all())


def test_a_half_precision_model_moves_by_less_than_its_steps_and_is_stored_as_it_is(tmp_path):
    """Steps far below bfloat16's resolution add up in the wide copies; what is measured is
    rounded."""
    model = tiny.llama(layers=1).bfloat16()
    before = cp.quantize(model, tokens(), bits=3, group_size=16, layers="model.layers.*")
    # bfloat16 steps are 4e-3 and more
    after = cp.recover(before, model, tokens(), steps=12, lr=1e-3)
    assert after.recovery.best_step > 0
    norms = [r.model.model.norm.weight for r in (before, after)]
    assert norms[1].dtype == torch.bfloat16 and not torch.equal(*norms)
    assert all(s.scale.dtype == torch.bfloat16 for s in after.solved.values())
    after.save(tmp_path)
    # Not its logits: .bfloat16() has rounded the rotary frequencies as well.
    loaded = cp.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in after.model.state_dict().items())


@pytest.mark.parametrize(
    "option", [cp.Prune(sparsity=0.6), cp.Prune(pattern="2:4"), NARROW], ids=lambda o: o.key
)
def test_zeros_stay_and_survivors_move(option):
    model = tiny.llama(layers=1)
    before = cp.compress(model, tokens(), options=[option])
    after = cp.recover(before, model, tokens(), steps=15, lr=1e-2)
    for name, one in after.solved.items():
        kept = before.solved[name].weight != 0
        assert torch.equal(one.weight != 0, kept)
        assert not torch.equal(one.weight[kept], before.solved[name].weight[kept])
        assert option is not NARROW or torch.equal(one.weight, one.weight.bfloat16().float())


def test_a_cast_weight_stays_in_its_narrow_type_and_everything_else_is_free():
    model = tiny.llama(layers=1)
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


def test_codes_of_a_model_without_units_start_in_the_middle(net):
    """The uncompressed model has other shapes there; where it has the same, its weights say
    where."""
    pytest.importorskip("torch_pruning")
    small = cp.prune(net, images(200), structured={"channels": 0.5}).model
    before = cp.quantize(small, images(200), bits=2)
    for originals, in_the_middle in ((net, True), (small, False)):
        parts = free_parts(before.model, before.solved, find_layers(originals))
        grids = [part for part in parts if isinstance(part, FreeGrid)]
        assert {part.layer.name for part in grids} == {"conv", "fc"}
        for part in grids:
            assert bool(part.masters[-1].any()) != in_the_middle
    after = cp.recover(
        before, net, images(200), objective="label-free", steps=30, lr=1e-2, codes=True
    )
    assert after.recovery.loss_after < after.recovery.loss_before


@pytest.mark.parametrize("width", [24, 30])  # 30: the last group is shorter
@pytest.mark.parametrize("bits", [1, 3])
def test_gradients_of_scales_and_zeros_are_those_of_autograd(width, bits):
    """Against autograd through the written-out dequantization, in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(width, 5, dtype=torch.float64)
    option = cp.Quantize(bits=bits, group_size=8, symmetric=False)
    found = find_layers(nn.Sequential(layer))["0"]
    (solved,) = solve_layer(found, [option], None)
    part = FreeGrid(found, solved)
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
        torch.testing.assert_close(part.masters[1].grad, zero.grad * part.zero_size)
    assert len(part.masters) == (2 if bits == 1 else 1)


class Table(nn.Module):
    """Its logits are its parameters."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index]


@pytest.mark.parametrize("rows", [3, 64, 150])  # 64 are compared at a time
def test_the_divergence_and_its_gradient_are_torchs(rows):
    g = torch.Generator().manual_seed(0)
    ours, theirs = (Table(torch.randn(rows, 11, dtype=torch.float64, generator=g)) for _ in "ab")
    exact = nn.functional.kl_div(
        ours.rows.log_softmax(1),
        theirs.rows.detach().log_softmax(1),
        reduction="sum",
        log_target=True,
    )
    (wanted,) = torch.autograd.grad(3 * exact, ours.rows)
    batch = (torch.arange(rows), torch.zeros(rows, dtype=torch.long))
    value, count = Distillation(theirs).loss(ours, batch)
    (found,) = torch.autograd.grad(3 * value, ours.rows)
    assert count == rows
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
    for loss in (Distillation(model), LabelFree(model)):
        total, count = loss.loss(other, batch)
        assert count == batch["input_ids"].numel() - 27 * padded
        gradients.append(torch.autograd.grad(total, list(other.parameters())))
        values.append(total.detach())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
