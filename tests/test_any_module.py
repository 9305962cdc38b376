"""Curvature of modules that compute in their own way, held against dense second derivatives of the
model in float64: what is called exact is, and what is not has an error bar."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import curvprune as cp
from curvprune.curvature import KfacSettings, kronecker_factored
from curvprune.model import find_layers, to_device
from tests.networks import seeded, vectors

X = vectors(n=6)[0][0]


class Net(nn.Module):
    """Modules and how they are called."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.forward = partial(forward, self)
        for name, module in modules.items():
            setattr(self, name, module)


def mlp(forward, **others):
    made = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)} | others
    return Net(forward, **made)


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Normalised(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Shifted(nn.Embedding):
    def forward(self, shape, past=0):
        return super().forward(torch.arange(past, past + shape[1]) + 2)


class Doubled(torch.autograd.Function):
    """No mode of torch sees what is handed to one."""

    @staticmethod
    def forward(ctx, weight):
        return 2 * weight

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def by_tokens(forward, **flags):
    return Net(forward, e=nn.Embedding(7, 4, **flags), b=nn.Linear(4, 3))


def looked_up(s, x):
    return s.b(F.relu(s.e(x)).mean(1))


def twice(s, x):
    return s.b(F.relu(s.m(F.relu(s.m(F.relu(s.a(x)))))))


def plain(s, x):
    return s.b(F.relu(s.a(x)))


def one_by_one(s, x):
    return torch.cat([(s.e0 if float(s.r(row)) > 0 else s.e1)(row[None]) for row in x])


# name → (model, whether its items are tokens)
MODELS = {
    "by hand": (lambda: mlp(plain, a=ByHand(4, 5)), False),
    "normalised": (lambda: mlp(plain, a=Normalised(4, 5)), False),
    "a pair": (lambda: mlp(lambda s, x: s.b(F.relu(s.a(x)[0])), a=Pair(4, 5)), False),
    "shared": (lambda: mlp(twice, m=nn.Linear(5, 5)), False),
    "also in a function": (
        lambda: mlp(lambda s, x: s.b(F.relu(s.a(x))) + (x @ s.a.weight.T)[:, :3]),
        False,
    ),
    "also as a number": (
        lambda: mlp(lambda s, x: s.b(F.relu(s.a(x))) + x[:, :3] * s.a.weight[0, 0] ** 2),
        False,
    ),
    "a view used twice": (
        lambda: mlp(lambda s, x: plain(s, x) + (x @ s.a.weight.mT).square()[:, :3]),
        False,
    ),
    "also in a function of its own": (
        lambda: mlp(lambda s, x: plain(s, x) + (x @ Doubled.apply(s.a.weight).T).square()[:, :3]),
        False,
    ),
    "in a function alone": (
        lambda: mlp(lambda s, x: s.b(F.relu(F.linear(x, s.a.weight, s.a.bias)))),
        False,
    ),
    "a hard sigmoid": (lambda: mlp(lambda s, x: s.b(F.hardsigmoid(s.a(x)) * s.a(x))), False),
    "checkpoint": (
        lambda: mlp(lambda s, x: s.b(checkpoint(lambda t: s.a(t).tanh(), x, use_reentrant=False))),
        False,
    ),
    "reentrant checkpoint": (
        lambda: mlp(lambda s, x: s.b(checkpoint(lambda t: s.a(t).tanh(), x, use_reentrant=True))),
        False,
    ),
    "a mean over the batch": (
        lambda: mlp(lambda s, x: (lambda h: s.b(F.relu(h - h.mean(0))))(s.a(x))),
        False,
    ),
    "a router": (
        lambda: Net(one_by_one, r=nn.Linear(4, 1), e0=nn.Linear(4, 3), e1=nn.Linear(4, 3)),
        False,
    ),
    "padding": (lambda: by_tokens(looked_up, padding_idx=2), True),
    "sparse": (lambda: by_tokens(looked_up, sparse=True), True),
    "by frequency": (lambda: by_tokens(looked_up, scale_grad_by_freq=True), True),
    "max norm": (lambda: by_tokens(looked_up, max_norm=10.0), True),
    "also the head": (
        lambda: Net(
            lambda s, x: F.relu(s.a(s.e(x).mean(1))) @ s.e.weight[:3].T,
            e=nn.Embedding(7, 4),
            a=nn.Linear(4, 4),
        ),
        True,
    ),
    "positions": (
        lambda: Net(
            lambda s, x: s.b(F.relu(s.e(x) + s.p(x.shape, past=1)).mean(1)),
            e=nn.Embedding(7, 4),
            p=Shifted(9, 4),
            b=nn.Linear(4, 3),
        ),
        True,
    ),
}
FLAGS = ("sparse", "scale_grad_by_freq", "max_norm")


def made(name):
    build, tokens = MODELS[name]
    model = seeded(lambda: build().double())
    if tokens:
        x = torch.randint(0, 7, (6, 4), generator=torch.Generator().manual_seed(3))
        return model, [(x[:4], torch.tensor([0, 1, 2, 0])), (x[4:], torch.tensor([2, 1]))]
    return model, vectors(n=6)


def without_flags(model):
    """The same function, whose derivatives by autograd are its derivatives."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse, module.scale_grad_by_freq, module.max_norm = False, False, None
    return model


def truth(model, batches, matrix, weight):
    """The block of one weight, a row at a time by autograd."""
    total, count = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64), 0

    def flat(of, **how):
        g = None
        if of.requires_grad:
            g = torch.autograd.grad(of, weight, retain_graph=True, allow_unused=True, **how)[0]
        return torch.zeros(weight.numel(), dtype=torch.float64) if g is None else g.reshape(-1)

    for x, y in batches:
        logits = model(x)
        kept = y != -100
        count += int(kept.sum())
        if matrix == "hessian":
            loss = F.cross_entropy(logits, y, reduction="sum")
            total += torch.stack([flat(g) for g in flat(loss, create_graph=True)])
            continue
        for row, label in zip(logits[kept], y[kept], strict=True):
            jacobian = torch.stack([flat(z) for z in row])
            p = row.detach().softmax(0)
            if matrix == "ggn":
                total += jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
            else:
                g = (p - F.one_hot(label, len(p))) @ jacobian
                total += torch.outer(g, g)
    return total / count


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical-fisher"])
@pytest.mark.parametrize("name", MODELS)
def test_traces_and_diagonals_are_those_of_the_function(name, matrix):
    model, batches = made(name)
    asked = {"loss": "classification", "quantities": ["trace", "diagonal"], "max_products": 64}
    if name == "a mean over the batch" and matrix == "empirical-fisher":
        with pytest.raises(ValueError, match=r"depends on the others of its batch.*matrix='ggn'"):
            cp.analyze(model, batches, matrix=matrix, **asked)
        return
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = cp.analyze(model, batches, matrix=matrix, **asked)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    if "checkpoint" in name:
        model.forward = partial(lambda s, x: s.b(s.a(x).tanh()), model)
    if name == "a hard sigmoid":
        model.forward = partial(lambda s, x: s.b(F.relu6(s.a(x) + 3) / 6 * s.a(x)), model)
    without_flags(model)
    for layer in find_layers(model).values():
        dense = truth(model, batches, matrix, layer.weight)
        curvature = found.layers[layer.name]
        exact = curvature.trace.stderr == 0 or matrix == "empirical-fisher"
        allowed = 0 if exact else 6 * curvature.trace.stderr
        expected = pytest.approx(float(dense.trace()), rel=1e-8, abs=allowed + 1e-12)
        assert curvature.trace.value == expected
        if exact:
            entries = layer.as_matrix(dense.diagonal().view(layer.weight.shape))
            torch.testing.assert_close(curvature.diagonal, entries, rtol=1e-7, atol=1e-12)


def test_a_later_batch_that_calls_a_layer_twice_is_not_exact():
    def forward(s, x):
        h = F.relu(s.m(F.relu(s.a(x))))
        return s.b(F.relu(s.m(h)) if bool((x[:, 0] > 5).any()) else h)

    model = seeded(lambda: mlp(forward, m=nn.Linear(5, 5)).double())
    batches = vectors(n=6)
    batches[1][0][0, 0] = 6.0
    found = cp.analyze(model, batches, quantities=["trace"], max_products=64).layers["m"].trace
    dense = truth(model, batches, "hessian", model.m.weight)
    assert found.stderr > 0
    assert abs(found.value - float(dense.trace())) < 6 * found.stderr


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "empirical-fisher"])
def test_a_model_without_known_layers_has_the_curvature_of_the_whole(matrix):
    form = seeded(lambda: nn.Bilinear(3, 3, 2).double())
    model = Net(lambda s, x: s.form(x, x).tanh(), form=form)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    batches = [(x, torch.tensor([0, 1, 1, 0, 1]))]
    found = cp.analyze(model, batches, loss="classification", matrix=matrix)
    assert not found.layers and any("whole model" in note for note in found.notes)
    if matrix != "fisher":
        blocks = [truth(model, batches, matrix, p) for p in model.parameters()]
        expected = sum(float(block.trace()) for block in blocks)
        assert found.model.trace.value == pytest.approx(expected, rel=1e-8)
    assert found.model.trace.value != 0 and found.model.eigenpairs is not None
    with pytest.raises(ValueError, match="layers='form' matches none"):
        cp.analyze(model, batches, loss="classification", layers="form")


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_layers_off_the_way_have_every_quantity_and_it_is_zero(matrix):
    model = seeded(lambda: mlp(plain, idle=nn.Linear(3, 3)).double())
    asked = ["trace", "diagonal", "eigenvalues", "layer-densities"]
    idle = cp.analyze(model, vectors(), matrix=matrix, quantities=asked).layers["idle"]
    assert (idle.trace.value, idle.trace.stderr, idle.diagonal.abs().max()) == (0, 0, 0)
    assert idle.eigenpairs.values.tolist() == [0, 0] and idle.density.dim == 9
    assert float(idle.density.nodes.abs().max()) == 0
    assert cp.analyze(model, vectors(), exclude="idle", quantities=["trace"]).layers.keys() == {
        "a",
        "b",
    }


def test_a_function_without_a_second_derivative_is_named_with_its_module():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, torch.eye(5, dtype=x.dtype))

    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), Distances(), nn.Linear(5, 3)).double())
    told = r"cdist in module 1 cannot be differentiated twice; take matrix='fisher'"
    with pytest.raises(ValueError, match=told):
        cp.analyze(model, vectors(), quantities=["trace"])
    operator = cp.gauss_newton(model, vectors(), loss="classification")
    with pytest.raises(ValueError, match=told):
        operator @ torch.ones(operator.space.dim, dtype=torch.float64)
    assert cp.analyze(model, vectors(), matrix="fisher").layers["0"].trace.value > 0


def test_other_outputs_where_it_is_differentiated_twice_are_refused():
    def forward(s, x):
        attends = torch.backends.cuda.flash_sdp_enabled()
        return plain(s, x) if attends else plain(s, 2 * x)

    model = seeded(lambda: mlp(forward).double())
    with pytest.raises(ValueError, match=r"gives other outputs .*matrix='fisher'"):
        cp.analyze(model, vectors(), quantities=["trace"])
    assert cp.analyze(model, vectors(), matrix="fisher").layers["a"].trace.value > 0


def test_closed_forms_in_half_precision_have_the_error_of_rounding():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)))
    half = [(x.bfloat16(), y) for x, y in vectors()]
    found = cp.analyze(model.bfloat16(), half, quantities=["trace"]).layers
    double = [(x.double(), y) for x, y in half]
    exact = cp.analyze(model.double(), double, quantities=["trace"]).layers
    for name, curvature in found.items():
        assert curvature.method == "half precision" and exact[name].method == "exact"
        assert 0 < abs(curvature.trace.value - exact[name].trace.value) < curvature.trace.stderr


# ------------------------------------------------------------------------------- float32 products


def test_products_are_in_full_float32_and_the_settings_come_back():
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
            seen.append((matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            if len(x) == 13:
                raise KeyError("thirteen")
            return super().forward(x)

    model = seeded(lambda: nn.Sequential(Watching(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    batches = [(x.float(), y) for x, y in vectors()]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        operator = cp.hessian(model, batches)
        seen.clear()
        assert (operator @ torch.ones(operator.space.dim)).isfinite().all()
        assert set(seen) == {(False, False, "highest")}
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
        bad = cp.gauss_newton(model, [batches[0]], loss="classification")
        bad.source.batches = [(torch.zeros(13, 4), torch.zeros(13).long())]
        with pytest.raises(KeyError):
            bad @ torch.ones(bad.space.dim)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_a_device_without_float64_is_refused_in_one_sentence():
    for batch in ((X, X), {"input_ids": X}):
        with pytest.raises(ValueError, match=r"device 'mps' has no float64.*device='cpu'"):
            to_device(batch, "mps")


def test_the_package_is_imported_where_there_is_no_module_resource():
    code = "import sys; sys.modules['resource'] = None; import curvprune.run, curvprune.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ K-FAC


def test_kronecker_factors_leave_out_weights_that_are_used_elsewhere():
    model, batches = made("also as a number")
    layers = find_layers(model)
    factors = kronecker_factored(
        model, cp.Classification(), batches, layers, KfacSettings(), optional=list(layers)
    )
    assert list(factors.left_out) == ["a"] and list(factors.blocks) == ["b"]


def test_what_fails_on_one_item_alone_is_said_in_one_sentence():
    class Patches(nn.Module):
        """Rows of the input are patches, two an item."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(x.view(-1, 8))

    batch = (torch.randn(6, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"Patches fails on the first item of a batch alone"):
        cp.analyze(Patches(), [batch], loss="classification", quantities=["trace"])
