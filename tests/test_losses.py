"""Every loss against float64 derivatives of its formula: one contract for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvprune as cp
from curvprune.model import (
    Exponential,
    Loss,
    NegativeBinomial,
    OutputLoss,
    Poisson,
    as_split,
    evaluate,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss, and its formula from outside: the summed loss of one item and its positions.

    Attributes:
        outputs: of one item.
        targets: of one item, from a generator.
        scale: of the outputs; the negative ones only where the family asks for that.
    """

    loss: Callable[[], Loss]
    formula: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], float]
    outputs: tuple[int, ...]
    targets: Callable[[torch.Generator], Tensor]
    negative: bool = False
    mapping: bool = False


def classes(*shape: int, of: int = 3) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(0, of, shape, generator=g)


def numbers(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g, dtype=torch.float64)


def yes_or_no(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(0, 2, shape, generator=g).double()


def counts(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(0, 6, shape, generator=g).double()


def soft(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g, dtype=torch.float64).softmax(-1)


def some_ignored(*shape: int, of: int = 3) -> Callable[[torch.Generator], Tensor]:
    def draw(g: torch.Generator) -> Tensor:
        labels = torch.randint(0, of, shape, generator=g)
        labels.view(-1)[0] = -100
        return labels

    return draw


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """−log p(y) by the definition of a softmax, over the last dimension."""
    z = z.reshape(-1, z.shape[-1])
    log_p = z - torch.logsumexp(z, -1, keepdim=True)
    kept = y.reshape(-1) != -100
    chosen = log_p.gather(-1, y.reshape(-1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(chosen * kept).sum()


WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def weighted(z: Tensor, y: Tensor) -> Tensor:
    target = 0.9 * F.one_hot(y, 3).double() + 0.1 / 3
    return -(target * WEIGHT * F.log_softmax(z, -1)).sum()


def binary(z: Tensor, y: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-z))
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum()


def binary_weighted(z: Tensor, y: Tensor) -> Tensor:
    p = 1 / (1 + torch.exp(-z))
    return -(WEIGHT * (4 * y * p.log() + (1 - y) * (1 - p).log())).sum()


def huber(z: Tensor, batch) -> Tensor:
    return F.huber_loss(z, batch[1], reduction="none").sum(-1)


def correlated(z: Tensor, batch) -> Tensor:
    """Not separate by outputs: log Σ exp of squares."""
    return torch.logsumexp((z - batch[1]).square(), -1)


def absolute(z: Tensor, batch) -> Tensor:
    return nn.L1Loss()(z.square(), batch[1])


CASES = {
    "classification": Case(
        loss=cp.Classification,
        formula=cross_entropy,
        count=lambda y: 1,
        outputs=(3,),
        targets=classes(),
    ),
    "tokens": Case(
        loss=cp.Classification,
        formula=cross_entropy,
        count=lambda y: int((y != -100).sum()),
        outputs=(4, 3),
        targets=some_ignored(4),
    ),
    "pixels": Case(
        loss=cp.Segmentation,
        formula=lambda z, y: cross_entropy(z.movedim(0, -1), y),
        count=lambda y: int((y != -100).sum()),
        outputs=(3, 2, 2),
        targets=some_ignored(2, 2),
    ),
    "weights and smoothing": Case(
        loss=lambda: cp.Classification(weight=WEIGHT, label_smoothing=0.1),
        formula=weighted,
        count=lambda y: float(WEIGHT[y]),
        outputs=(3,),
        targets=classes(),
    ),
    "soft labels": Case(
        loss=cp.Classification,
        formula=lambda z, y: -(y * F.log_softmax(z, -1)).sum(),
        count=lambda y: 1,
        outputs=(3,),
        targets=soft(3),
    ),
    "masked-lm": Case(
        loss=cp.MaskedLM,
        formula=cross_entropy,
        count=lambda y: int((y != -100).sum()),
        outputs=(4, 3),
        targets=some_ignored(4),
        mapping=True,
    ),
    "causal-lm": Case(
        loss=cp.CausalLM,
        formula=lambda z, y: cross_entropy(z[:-1], y[1:]),
        count=lambda y: int((y[1:] != -100).sum()),
        outputs=(4, 3),
        targets=classes(4),
        mapping=True,
    ),
    "multi-label": Case(
        loss=cp.MultiLabel,
        formula=binary,
        count=lambda y: y.numel(),
        outputs=(3,),
        targets=yes_or_no(3),
    ),
    "multi-label, weighted": Case(
        loss=lambda: cp.MultiLabel(weight=WEIGHT, pos_weight=torch.tensor(4.0)),
        formula=binary_weighted,
        count=lambda y: y.numel(),
        outputs=(3,),
        targets=yes_or_no(3),
    ),
    "regression": Case(
        loss=cp.Regression,
        formula=lambda z, y: (z - y).square().sum(),
        count=lambda y: y.numel(),
        outputs=(3,),
        targets=numbers(3),
    ),
    "regression with sigma": Case(
        loss=lambda: cp.Regression(sigma=0.3),
        formula=lambda z, y: 0.5 * ((z - y) / 0.3).square().sum(),
        count=lambda y: y.numel(),
        outputs=(2, 3),
        targets=numbers(2, 3),
    ),
    "Poisson": Case(
        loss=lambda: OutputLoss(Poisson()),
        formula=lambda z, y: (z.exp() - y * z).sum(),
        count=lambda y: y.numel(),
        outputs=(3,),
        targets=counts(3),
    ),
    "exponential": Case(
        loss=lambda: OutputLoss(Exponential()),
        formula=lambda z, y: (-(-z).log() - y * z).sum(),
        count=lambda y: y.numel(),
        outputs=(3,),
        targets=lambda g: counts(3)(g) + 0.5,
        negative=True,
    ),
    "negative binomial": Case(
        loss=lambda: OutputLoss(NegativeBinomial(2.5)),
        formula=lambda z, y: (-2.5 * (1 - z.exp()).log() - y * z).sum(),
        count=lambda y: y.numel(),
        outputs=(3,),
        targets=counts(3),
        negative=True,
    ),
    "any function, separate outputs": Case(
        loss=lambda: cp.Loss.of(huber, outputs="model"),
        formula=lambda z, y: F.huber_loss(z, y, reduction="sum"),
        count=lambda y: 1,
        outputs=(3,),
        targets=numbers(3),
    ),
    "any function": Case(
        loss=lambda: cp.Loss.of(correlated, outputs="model"),
        formula=lambda z, y: torch.logsumexp((z - y).square(), -1),
        count=lambda y: 1,
        outputs=(3,),
        targets=numbers(3),
    ),
    "a module of torch, the mean of a batch": Case(
        loss=lambda: cp.Loss.of(
            lambda z, batch: nn.L1Loss()(z.square(), batch[1]), outputs="model"
        ),
        formula=lambda z, y: (z.square() - y).abs().mean(),
        count=lambda y: 1,
        outputs=(3,),
        targets=lambda g: -counts(3)(g),
    ),
}
ITEMS = 3


class Net(nn.Module):
    """Six numbers → outputs of any shape."""

    def __init__(self, outputs: tuple[int, ...], negative: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, math.prod(outputs))
        self.shape, self.negative = outputs, negative

    def forward(self, x: Tensor) -> Tensor:
        z = self.last(torch.tanh(self.first(x))).view(len(x), *self.shape)
        return -F.softplus(z) - 0.1 if self.negative else z


class Named(Net):
    """The same, of a dict batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@dataclass(frozen=True, kw_only=True)
class Scene:
    loss: Loss
    model: nn.Module
    batch: object
    x: Tensor
    y: Tensor
    case: Case

    def item_loss(self, z: Tensor, item: int) -> Tensor:
        return self.case.formula(z, self.y[item])

    @property
    def count(self) -> float:
        return sum(self.case.count(y) for y in self.y)


def scene(name: str) -> Scene:
    case = CASES[name]
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    model = Net(case.outputs, case.negative).double()
    x = torch.randn(ITEMS, 6, generator=g, dtype=torch.float64)
    y = torch.stack([case.targets(g) for _ in range(ITEMS)])
    batch = {"x": x, "labels": y} if case.mapping else (x, y)
    return Scene(loss=case.loss(), model=model, batch=batch, x=x, y=y, case=case)


def of_parameters(it: Scene) -> tuple[Callable[[Tensor], Tensor], Callable, Tensor]:
    """Mean loss and each item's outputs as functions of all parameters, flat."""
    shapes = {n: p.shape for n, p in it.model.named_parameters()}
    theta = torch.cat([p.detach().reshape(-1) for p in it.model.parameters()])

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(s) for s in shapes.values()])
        named = {n: v.view(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(it.model, named, (it.x,))

    def mean(flat: Tensor) -> Tensor:
        z = outputs(flat)
        losses = [it.item_loss(z[i], i) for i in range(ITEMS)]
        return torch.stack(losses).sum() / it.count

    return mean, outputs, theta


def output_hessian(it: Scene, z: Tensor, item: int) -> Tensor:
    flat = z[item].detach().reshape(-1)
    shape = z[item].shape
    return torch.func.hessian(lambda u: it.item_loss(u.view(shape), item))(flat)


def dense_ggn(it: Scene) -> Tensor:
    _, outputs, theta = of_parameters(it)
    z = outputs(theta)
    jacobian = torch.func.jacrev(outputs)(theta)
    total = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for i in range(ITEMS):
        J = jacobian[i].reshape(-1, len(theta))
        total += J.T @ output_hessian(it, z, i) @ J
    return total / it.count


@pytest.mark.parametrize("name", CASES)
def test_value_items_and_gradient(name):
    it = scene(name)
    mean, outputs, theta = of_parameters(it)
    total, count = it.loss.loss(it.model, it.batch)
    assert float(count) == pytest.approx(it.count)
    torch.testing.assert_close(total / count, mean(theta), rtol=1e-9, atol=1e-12)
    grads = torch.autograd.grad(total / count, list(it.model.parameters()))
    flat = torch.cat([g.reshape(-1) for g in grads])
    torch.testing.assert_close(flat, torch.func.grad(mean)(theta), rtol=1e-8, atol=1e-10)
    results = evaluate(it.model, [it.batch], it.loss)
    z = outputs(theta)
    expected = torch.stack([it.item_loss(z[i], i) for i in range(ITEMS)]).detach()
    torch.testing.assert_close(results.loss, expected, rtol=1e-6, atol=1e-7)
    assert results.count.tolist() == pytest.approx([it.case.count(y) for y in it.y])


@pytest.mark.parametrize("name", CASES)
def test_hessian_and_gauss_newton_matrix(name):
    it = scene(name)
    mean, _, theta = of_parameters(it)
    hessian = cp.hessian(it.model, [it.batch], loss=it.loss).to_dense()
    truth = torch.func.hessian(mean)(theta)
    torch.testing.assert_close(hessian, truth, rtol=1e-7, atol=1e-9)
    ggn = cp.gauss_newton(it.model, [it.batch], loss=it.loss).to_dense()
    torch.testing.assert_close(ggn, dense_ggn(it), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["draw", "scores"])
def test_what_draws_back_propagate_has_the_covariance_of_the_loss_s_own_hessian(name, how):
    it = scene(name)
    # Every item many times over, so that one call draws many vectors for it.
    copies = 2000 if name.startswith("a module") else 20_000
    z = it.model(it.x).detach().repeat(copies, *[1] * len(it.case.outputs)).requires_grad_()
    x, y = it.x.repeat(copies, 1), it.y.repeat(copies, *[1] * (it.y.ndim - 1))
    batch = {"x": x, "labels": y} if it.case.mapping else (x, y)
    value = getattr(it.loss, how)(z, batch, torch.Generator().manual_seed(0))
    assert value.shape == (ITEMS * copies,)
    (vectors,) = torch.autograd.grad(value.sum(), z)
    for i in range(ITEMS):
        v = vectors[i::ITEMS].flatten(1)
        truth = output_hessian(it, z, i)
        near = 5 / copies**0.5 * (1 + 2 * (how == "scores")) * float(truth.abs().max()) + 1e-12
        torch.testing.assert_close(v.T @ v / copies, truth, rtol=0, atol=near)


def test_draws_of_many_outputs_that_are_not_separate():
    """More outputs than a block is formed for: the root of the Hessian comes from its products."""
    width, copies = 150, 1500
    g = torch.Generator().manual_seed(1)
    outputs = torch.randn(1, width, generator=g, dtype=torch.float64)
    target = torch.zeros(1, width, dtype=torch.float64)
    H = torch.func.hessian(lambda z: correlated(z, (None, target[0])))(outputs[0])
    z = outputs.repeat(copies, 1).requires_grad_()
    batch = (torch.zeros(copies, 1), target.repeat(copies, 1))
    value = cp.Loss.of(correlated, outputs="model").draw(z, batch, torch.Generator().manual_seed(0))
    (v,) = torch.autograd.grad(value.sum(), z)
    values, vectors = torch.linalg.eigh(H)
    assert values[0] > 0
    near = 5 * (2 / copies) ** 0.5
    for column in (0, 40, 100, 148, 149):
        along = (v @ vectors[:, column]).square().mean()
        assert float(along) == pytest.approx(float(values[column]), rel=near)


@pytest.mark.parametrize("name", CASES)
def test_the_sampled_fisher_and_the_analysis_have_the_gauss_newton_trace(name):
    it = scene(name)
    truth = dense_ggn(it)
    fisher = cp.fisher(it.model, [it.batch], loss=it.loss, labels=150).to_dense()
    assert float(fisher.trace()) == pytest.approx(float(truth.trace()), rel=0.15)
    found = cp.analyze(it.model, [it.batch], matrix="ggn", quantities=("trace",), loss=it.loss)
    start = 0
    for parameter, p in it.model.named_parameters():
        block = truth[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        layer = parameter.removesuffix(".weight")
        if parameter.endswith(".weight"):
            trace = found.layers[layer].trace
            near = 5 * trace.stderr + 1e-6 * float(block.trace())
            assert trace.value == pytest.approx(float(block.trace()), abs=near)


@pytest.mark.parametrize("name", CASES)
def test_a_rise_beyond_the_slope_is_the_bregman_divergence(name):
    it = scene(name)
    before = it.model(it.x).detach()
    after = before * 1.1 - (0.01 if it.case.negative else 0.03)
    rises = it.loss.rises(before, after, it.batch)
    for i in range(ITEMS):
        slope = torch.func.grad(lambda z, i=i: it.item_loss(z, i))(before[i])
        straight = it.item_loss(before[i], i) + (slope * (after[i] - before[i])).sum()
        expected = it.item_loss(after[i], i) - straight
        assert float(rises[i]) == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


ANY = pytest.param("any function", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["regression", ANY, "multi-label"])
def test_prices_are_half_the_quadratic_form_of_the_change(name):
    it = scene(name)
    items = as_split([it.batch])
    splits = cp.Splits(calibrate=items, price=items, select=items, certify=items)
    settings = cp.Settings(portable=False)
    ledger = cp.price(
        it.model,
        splits,
        options=[cp.Quantize(bits=3)],
        loss=it.loss,
        labels=800,
        measure_above=None,
        portable=False,
    )
    prices = {row.layer: row for row in ledger.rows if row.option != "keep"}
    assert set(prices) == {"first", "last"}
    truth = dense_ggn(it)
    start = 0
    for parameter, p in it.model.named_parameters():
        where = slice(start, start + p.numel())
        start += p.numel()
        if parameter.endswith(".weight"):
            layer = parameter.removesuffix(".weight")
            rounded = cp.quantize(
                it.model, splits, bits=3, loss=it.loss, layers=layer, settings=settings
            )
            new = dict(rounded.model.named_parameters())[parameter]
            delta = (new - p).detach().reshape(-1)
            exact = float(0.5 * delta @ truth[where, where] @ delta)
            assert prices[layer].price == pytest.approx(exact, rel=0.12) and exact > 0
