"""Matrix-free products of a model's curvature against dense matrices by torch.func, in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvprune as cp
from curvprune.curvature import empirical_fisher, fisher, gauss_newton, hessian
from curvprune.model import Classification, LabelFree
from tests.dense_curvature import CASES, block, dense, reference
from tests.networks import mlp, together, vectors

BUILD = {"hessian": hessian, "ggn": gauss_newton, "empirical": empirical_fisher}


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("case", CASES)
def test_operators_equal_the_dense_matrix(case, kind):
    model, batches, objective = CASES[case]()
    model.train()
    operator = BUILD[kind](model, batches, objective)
    expected = reference(case, kind)
    # Llama's RMSNorm rounds to float32 inside a float64 model.
    close = 3e-6 if case in ("attention", "tied") else 1e-9
    close = {"rtol": close, "atol": close * float(expected.abs().max())}
    torch.testing.assert_close(operator.to_dense(), expected, **close)
    # a block of vectors, a quadratic form, and a restriction that prunes the backward passes
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(len(expected), 2, dtype=torch.float64, generator=generator)
    close["atol"] *= len(v)
    torch.testing.assert_close(operator @ v, expected @ v, **close)
    torch.testing.assert_close(operator.quad(v), ((expected @ v) * v).sum(0), **close)
    name = list(operator.space.shapes)[1]
    part = operator.space.slices[name]
    torch.testing.assert_close(operator.restrict([name]).to_dense(), expected[part, part], **close)
    assert operator.to_scipy().matvec(v[:, 0].numpy()).shape == (len(expected),)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("retain", [0, 1, 2])
def test_graphs_that_are_built_again_give_the_same(retain):
    """Of two mini-batches, those beyond ``retain`` take a forward pass for every product."""
    model, batches, objective = CASES["mlp"]()
    operator = hessian(model, batches, objective, retain=retain)
    passes = []
    handle = model.register_forward_hook(lambda module, inputs, output: passes.append(1))
    for _ in range(2):
        torch.testing.assert_close(
            operator.to_dense(), reference("mlp", "hessian"), rtol=1e-9, atol=1e-12
        )
    handle.remove()
    assert len(passes) == retain + 2 * (2 - retain)


def test_the_sampled_fisher_is_unbiased_for_the_gauss_newton_matrix():
    model, batches, objective = CASES["mlp"]()
    expected = block(reference("mlp", "ggn"), model, "3.weight")
    drawn = partial(fisher, model, together(batches), objective, parameters="3.weight")
    many = drawn(labels=400).to_dense()
    assert torch.linalg.norm(many - expected) < 0.05 * torch.linalg.norm(expected)
    first, again, other = (drawn(labels=2, seed=seed).to_dense() for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_label_free_curvature_is_the_classifier_s_gauss_newton():
    """KL to itself: the gradient vanishes, and Hessian and Gauss–Newton matrix are the same."""
    model, batches, _ = CASES["mlp"]()
    x = [(x, y.clamp_min(0)) for x, y in batches]
    matrix = hessian(model, x, LabelFree(model)).to_dense()
    own = gauss_newton(model, x, LabelFree(model)).to_dense()
    torch.testing.assert_close(matrix, own, atol=1e-10, rtol=1e-8)
    names = [n for n, _ in model.named_parameters()]
    classifier = dense(model, x, Classification(), "ggn", names)
    torch.testing.assert_close(matrix, classifier, atol=1e-10, rtol=1e-8)


# ------------------------------------------------------------------------------- traps of the peers


def test_a_second_operator_does_not_disturb_the_first():
    model, batches, objective = CASES["mlp"]()
    first = hessian(model, batches, objective)
    second = hessian(model, batches, objective)
    v = torch.ones(first.space.dim, dtype=torch.float64)
    expected = reference("mlp", "hessian") @ v
    torch.testing.assert_close(second @ v, expected)
    torch.testing.assert_close(first @ v, expected)


def test_curvature_of_a_tiny_loss_keeps_its_digits():
    """A constant added to a denominator would drown it."""
    model, batches, _ = CASES["mlp"]()

    class Tiny(Classification):
        def loss_of(self, logits, batch):
            loss, count = super().loss_of(logits, batch)
            return loss * 1e-9, count

    pairs = cp.eigenpairs(
        hessian(model, batches, Tiny()),
        1,
        tol=1e-8,
        generator=torch.Generator().manual_seed(0),
    )
    expected = torch.linalg.eigvalsh(reference("mlp", "hessian"))
    truth = 1e-9 * float(expected[expected.abs().argmax()])
    assert float(pairs.values[0]) == pytest.approx(truth, rel=1e-6)


def test_what_random_modules_do_is_named():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    model = nn.Sequential(nn.Linear(4, 64), Noisy(), nn.Linear(64, 3)).double()
    for call in (lambda: cp.hessian(model, vectors()), lambda: cp.analyze(model, vectors())):
        with pytest.raises(ValueError, match="module '1' is the first that differs"):
            call()


def test_parameters_changed_under_an_operator_are_noticed():
    model, batches, objective = CASES["mlp"]()
    operator = hessian(model, batches, objective)
    v = torch.ones(operator.space.dim, dtype=torch.float64)
    operator @ v
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="build a new one"):
        operator @ v


def test_the_model_comes_back_as_it_was():
    model, batches, objective = CASES["attention"]()
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    flash = torch.backends.cuda.flash_sdp_enabled()
    operator = hessian(model, batches, objective)
    operator @ torch.ones(operator.space.dim, dtype=torch.float64)
    cp.analyze(model, batches, quantities=["trace"], max_products=8)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert model.config._attn_implementation == "sdpa"


def test_frozen_parameters_have_curvature_too():
    model, batches, objective = CASES["mlp"]()
    model.requires_grad_(False)
    operator = hessian(model, batches, objective)
    torch.testing.assert_close(
        operator.to_dense(), reference("mlp", "hessian"), rtol=1e-9, atol=1e-12
    )
    assert cp.analyze(model, batches, quantities=["trace"]).layers["0"].trace is not None


def test_bfloat16_and_mixed_models_add_up_in_float32():
    model, batches, objective = CASES["mlp"]()
    exact = gauss_newton(model, batches, objective)
    v = torch.ones(exact.space.dim, dtype=torch.float64)
    half = mlp().to(torch.bfloat16)
    typed = [(x.to(torch.bfloat16), y) for x, y in batches]
    operator = gauss_newton(half, typed, objective)
    assert operator.dtype == torch.float32
    torch.testing.assert_close((operator @ v.float()).double(), exact @ v, rtol=0.1, atol=0.02)
    mixed = mlp().float()
    mixed[3].to(torch.bfloat16)

    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.to(torch.bfloat16)).float()

    mixed[3] = Cast(mixed[3])
    operator = hessian(mixed, [(x.float(), y) for x, y in batches], objective)
    assert torch.isfinite(operator @ v.float()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: cp.hessian(m, []), "empty"),
        (lambda m, d: cp.hessian(m, d, parameters="nope*"), "matches none"),
        (
            lambda m, d: (
                cp.hessian(m, [(d[0][0], torch.full((3,), -100))]) @ torch.zeros(64).double()
            ),
            "no position",
        ),
        (lambda m, d: cp.analyze(m, d, matrix="hess"), "expected one of hessian"),
        (lambda m, d: cp.analyze(m, d, quantities=["spectrum"]), "expected some of trace"),
        (lambda m, d: cp.analyze(m, d, rtol=0.0), "must be positive"),
        (lambda m, d: cp.analyze(m, d, matrix="fisher", quantities=["density"]), "matrix='ggn'"),
        (lambda m, d: cp.analyze(m, []), "empty"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(mlp(), vectors())


def test_curvlinops_agrees():
    curvlinops = pytest.importorskip("curvlinops")
    model, batches, objective = CASES["mlp"]()
    ((x, y),) = together(batches)
    batches = [(x[y >= 0], y[y >= 0])]  # it divides by samples, ignored or not
    model.eval()
    parameters = dict(model.named_parameters())
    v = torch.randn(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for theirs, ours in (
        ("HessianLinearOperator", hessian),
        ("GGNLinearOperator", gauss_newton),
    ):
        reference = getattr(curvlinops, theirs)(
            model, nn.CrossEntropyLoss(), list(parameters.values()), batches
        )
        torch.testing.assert_close(
            ours(model, batches, objective) @ v, reference @ v, rtol=1e-8, atol=1e-12
        )
