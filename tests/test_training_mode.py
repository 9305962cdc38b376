"""Curvature in training mode against dense matrices with the same masks and batch statistics, and
the empirical Fisher of places; in float64."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvprune as cp
from tests.networks import mlp, seeded, vectors

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
BUILD = {
    "hessian": cp.hessian,
    "ggn": cp.gauss_newton,
    "empirical": cp.empirical_fisher,
    "fisher": cp.fisher,
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(outputs, model, data, kind):
    """The mean of a matrix over mini-batches whose outputs are functions of the parameters."""
    own = {n: p.detach() for n, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in own.values()])
    sizes = [p.numel() for p in own.values()]
    matrix, count = torch.zeros(len(flat), len(flat), dtype=torch.float64), 0
    for number, (x, y) in enumerate(data):

        def logits(v, x=x, number=number):
            parts = zip(own.items(), v.split(sizes), strict=True)
            return outputs({n: part.view_as(p) for (n, p), part in parts}, x, number)

        def losses(v, y=y, logits=logits):
            return F.cross_entropy(logits(v), y, reduction="none")

        count += int((y >= 0).sum())
        if kind == "hessian":
            matrix += torch.func.hessian(lambda v, f=losses: f(v).sum())(flat)
        elif kind == "empirical":
            j = torch.func.jacrev(losses)(flat)
            matrix += j.T @ j
        else:
            j = torch.func.jacrev(logits)(flat)[y >= 0]
            p = logits(flat)[y >= 0].softmax(-1)
            middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            matrix += torch.einsum("nci,ncd,ndj->ij", j, middle, j)
    return matrix / count


def normed():
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    ).double()


def by_batch(own, x, number):
    """What `normed` returns with the statistics of the batch."""
    h = F.linear(x, own["0.weight"], own["0.bias"])
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    h = torch.tanh(h * own["1.weight"] + own["1.bias"])
    return F.linear(h, own["3.weight"], own["3.bias"])


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical"])
def test_batch_statistics_are_differentiated(kind):
    model, data = normed().eval(), vectors()
    operator = BUILD[kind](model, data, loss="classification", mode="train")
    torch.testing.assert_close(
        operator.to_dense(), dense(by_batch, model, data, kind), rtol=1e-8, atol=1e-10
    )
    assert not operator.stochastic and operator.mode == "train"
    # Nothing is kept of the batch, and the modes are as they were.
    assert not bool(model[1].running_mean.any()) and int(model[1].num_batches_tracked) == 0
    assert not any(module.training for module in model.modules())


def masks_of(model, data, seed):
    """What dropout has multiplied in each mini-batch, seen by a hook."""
    seen = []

    def see(module, inputs, output):
        seen.append((output / inputs[0]).detach())

    with_masks = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    operator = cp.hessian(model, data, loss="classification", mode="train", seed=seed, retain=2)
    handle = with_masks.register_forward_hook(see)
    operator @ torch.zeros(operator.space.dim, dtype=torch.float64)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical"])
def test_dropout_has_one_mask_for_each_mini_batch(kind):
    model, data = mlp(), vectors()
    masks = masks_of(model, data, seed=3)
    assert [len(mask) for mask in masks] == [3, 4]

    def masked(own, x, number):
        h = torch.tanh(F.linear(x, own["0.weight"], own["0.bias"])) * masks[number]
        h = torch.tanh(F.linear(h, own["3.weight"], own["3.bias"]))
        return F.linear(h, own["5.weight"], own["5.bias"])

    expected = dense(masked, model, data, kind)
    state = torch.get_rng_state()
    for retain in (0, 1, 2):
        operator = BUILD[kind](
            model, data, loss="classification", mode="train", seed=3, retain=retain
        )
        torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(state, torch.get_rng_state())
    other = BUILD[kind](model, data, loss="classification", mode="train", seed=4)
    assert float((other.to_dense() - expected).abs().max()) > 1e-3
    part = operator.restrict(["5.bias"])
    assert part.stochastic and part.mode == "train"
    torch.testing.assert_close(part.to_dense(), expected[-3:, -3:], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_the_drawn_fisher_of_training_is_unbiased_for_its_gauss_newton_matrix():
    model, data = normed(), vectors()
    drawn = cp.fisher(model, data, loss="classification", mode="train", labels=1000)
    exact = dense(by_batch, model, data, "ggn")
    assert torch.linalg.norm(drawn.to_dense() - exact) < 0.05 * torch.linalg.norm(exact)


def test_operators_say_whether_they_are_stochastic():
    dropped, data = mlp(), vectors()
    said = {}
    for kind, build in BUILD.items():
        for mode in ("eval", "train"):
            operator = build(dropped, data, loss="classification", mode=mode)
            said[kind, mode] = operator.stochastic
            assert f"mode='{mode}', stochastic={operator.stochastic}" in repr(operator)
            assert ("training mode" in operator.matrix) == (mode == "train")
    assert {key for key, random in said.items() if not random} == {
        ("hessian", "eval"),
        ("ggn", "eval"),
        ("empirical", "eval"),
    }
    with pytest.raises(ValueError, match="mode='test': expected 'eval' or 'train'"):
        cp.hessian(dropped, data, loss="classification", mode="test")
    with pytest.raises(TypeError, match=r"unknown argument 'modes'.*parameters, retain, mode"):
        cp.hessian(dropped, data, loss="classification", modes="train")


def test_modules_without_masks_in_training_come_back_after_an_error():
    model = normed().eval()
    model[0].train()
    one = [(random(1, 4), torch.tensor([1]))]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cp.hessian(model, one, mode="train")
    assert model[0].training and not model[1].training and not model.training


# ------------------------------------------------------------------------------ empirical, by place


def tagger():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()


def gradients(model, x, losses):
    """Of every loss by all parameters."""
    own = {n: p.detach() for n, p in model.named_parameters()}
    j = torch.func.jacrev(lambda p: losses(torch.func.functional_call(model, p, (x,))))(own)
    return torch.cat([part.flatten(1) for part in j.values()], 1)


def test_places_have_gradients_of_their_own():
    model, x = tagger(), random(4, 6, 4)
    y = torch.arange(24).view(4, 6) % 3
    y[1, 2:] = -100
    keep = y.flatten() != -100
    g = gradients(
        model, x, lambda z: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    )
    operator = cp.empirical_fisher(model, [(x, y)], loss="classification", per="place")
    torch.testing.assert_close(operator.to_dense(), g[keep].T @ g[keep] / keep.sum(), **CLOSE)
    assert "places" in operator.matrix
    # Of one place an item, places are items.
    single = [(x[:, 0], y[:, 0])]
    both = [cp.empirical_fisher(model, single, per=per).to_dense() for per in ("item", "place")]
    torch.testing.assert_close(*both, **CLOSE)


def test_places_of_several_outputs_and_of_functions():
    model, x = tagger(), random(4, 6, 4)
    y = random(4, 6, 3, seed=1)
    g = gradients(model, x, lambda z: (z - y).square().sum(-1).flatten())
    operator = cp.empirical_fisher(model, [(x, y)], loss="regression", per="place")
    torch.testing.assert_close(operator.to_dense(), g.T @ g / y.numel(), **CLOSE)
    own = cp.Loss.of(lambda z, batch: (z - batch[1]).square().sum(-1), outputs="model")
    operator = cp.empirical_fisher(model, [(x, y)], loss=own, per="place")
    torch.testing.assert_close(operator.to_dense(), g.T @ g / 24, **CLOSE)


def test_losses_of_whole_items_have_no_places():
    model, data = tagger(), [(random(4, 6, 4), torch.zeros(4, 6))]
    whole = cp.Loss.of(lambda z, batch: (z.square().sum(), z[..., 0].numel()), outputs="model")
    with pytest.raises(ValueError, match="known for whole items only"):
        cp.empirical_fisher(model, data, loss=whole, per="place").to_dense()
    with pytest.raises(ValueError, match="per='token'; expected 'item' or 'place'"):
        cp.empirical_fisher(model, data, loss=whole, per="token")


# ---------------------------------------------------------------------------------- named inputs


class Whole(nn.Module):
    """Takes its inputs as one dict."""

    def __init__(self):
        super().__init__()
        self.net = tagger()

    def forward(self, data):
        return self.net(data["x"] + data.get("more", 0))


class Named(Whole):
    def forward(self, x, more=0):
        return super().forward({"x": x, "more": more})


@pytest.mark.parametrize("build", [Whole, Named])
def test_named_inputs_with_targets(build):
    """A pair (mapping, targets) or one dict, for models that take its entries or the dict."""
    model, x = build(), random(5, 4)
    more, y = random(5, 4, seed=1), torch.arange(5) % 3
    plain = cp.hessian(model.net, [(x + more, y)]).to_dense()
    given = {"x": x, "more": more}
    for batch in ((given, y), (UserDict(given), y), [given, y.tolist()], {**given, "labels": y}):
        torch.testing.assert_close(cp.hessian(model, [batch]).to_dense(), plain, **CLOSE)
        operator = cp.kfac(model, [batch], fisher="type-2")
        assert operator.trace() == pytest.approx(
            cp.kfac(model.net, [(x + more, y)], fisher="type-2").trace()
        )
    analysis = cp.analyze(model, [(given, y)], matrix="ggn", quantities=["trace"])
    total = sum(layer.trace.value for layer in analysis.layers.values())
    exact = cp.gauss_newton(model.net, [(x + more, y)], parameters="*.weight").to_dense()
    assert total == pytest.approx(float(exact.trace()))


def test_a_batch_of_another_kind_says_what_to_pass():
    model, x = tagger(), random(5, 4)
    for batch in ((x, x, x), ((x, x), x), ({"x": x, "labels": x}, x)):
        with pytest.raises(ValueError, match=r"^data: a batch is"):
            cp.hessian(model, [batch])
