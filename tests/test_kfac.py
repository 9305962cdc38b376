"""K-FAC and EKFAC against exact blocks: Jacobians and second derivatives by torch.func, in float64.

Where a network is linear and its loss squared, both are the block itself; else one item with one
row is enough.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvprune as cp
from curvprune.curvature import Dense, Diagonal, KfacSettings, kronecker_factored
from curvprune.model import Classification, find_layers
from tests.networks import seeded

CLOSE = {"rtol": 1e-8, "atol": 1e-11}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(model, x, names):
    """Of all outputs, flattened, by the named parameters."""
    own = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(chosen):
        return torch.func.functional_call(model, {**own, **chosen}, (x,)).flatten()

    parts = torch.func.jacrev(outputs)({n: own[n] for n in names})
    return torch.cat([parts[n].flatten(1) for n in names], 1)


def squared_error(model, x, names):
    """The Gauss–Newton matrix of the mean squared error over all outputs."""
    j = jacobian(model, x, names)
    return 2 * j.T @ j / len(j)


def blocks_equal(operator, exact):
    """Every block of an operator is the exact matrix over the block's parameters."""
    assert operator.blocks
    for block in operator.blocks.values():
        names = list(block.space.shapes)
        torch.testing.assert_close(block.to_dense(), exact(names), **CLOSE)


class Shared(nn.Module):
    """A deep linear network over tokens, whose outputs are kept or averaged."""

    def __init__(self, reduced):
        super().__init__()
        self.net, self.reduced = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), reduced

    def forward(self, x):
        return self.net(x).mean(1) if self.reduced else self.net(x)


class Image(nn.Module):
    """One convolution, whose places are outputs of their own or are averaged."""

    def __init__(self, reduced, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups)
        self.reduced = reduced

    def forward(self, x):
        y = self.conv(x)
        return y.mean((2, 3)) if self.reduced else y.movedim(1, -1)


# name: (model, inputs, kfac_approx)
LINEAR = {
    "deep": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), (7, 5), "expand"),
    "one layer": (lambda: nn.Linear(4, 3), (6, 4), "reduce"),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (6, 4), "expand"),
    "tokens": (lambda: Shared(False), (3, 5, 4), "expand"),
    "tokens averaged": (lambda: Shared(True), (3, 5, 4), "reduce"),
    "places": (lambda: Image(False), (3, 4, 5, 6), "expand"),
    "places averaged": (lambda: Image(True), (3, 4, 5, 6), "reduce"),
    "groups": (lambda: Image(False, groups=2), (3, 4, 5, 6), "expand"),
    "groups averaged": (lambda: Image(True, groups=2), (3, 4, 5, 6), "reduce"),
}


def linear(name):
    """A case of `LINEAR` with two mini-batches of different size."""
    build, shape, sharing = LINEAR[name]
    model = seeded(build).double()
    x = random(*shape)
    with torch.no_grad():
        y = random(*model(x).shape, seed=1)
    return model, x, [(x[:2], y[:2]), (x[2:], y[2:])], sharing


@pytest.mark.parametrize("eigenvalues", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("bias", [True, "separate", False])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_networks_are_exact(name, bias, eigenvalues):
    model, x, data, sharing = linear(name)
    operator = cp.kfac(
        model,
        data,
        loss="regression",
        fisher="type-2",
        kfac_approx=sharing,
        bias=bias,
        eigenvalues=eigenvalues,
    )
    assert not operator.stochastic
    biases = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert set(biases).isdisjoint(operator.space.shapes) == (not bias or not biases)
    blocks_equal(operator, lambda names: squared_error(model, x, names))


@pytest.mark.parametrize("eigenvalues", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("loss", ["classification", "multi-label", "poisson", "function"])
def test_one_item_is_exact_for_every_loss(loss, eigenvalues):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    x, z = random(1, 4), model(random(1, 4)).detach()[0]
    p = z.softmax(-1)
    middle, count, y = {
        "classification": (torch.diag(p) - torch.outer(p, p), 1, torch.tensor([2])),
        "multi-label": (torch.diag(z.sigmoid() * (1 - z.sigmoid())), 3, torch.ones(1, 3)),
        "poisson": (torch.diag(z.exp()), 3, torch.ones(1, 3)),
        "function": (torch.diag(12 * z**2), 1, torch.ones(1, 3)),
    }[loss]
    if loss == "function":
        loss = cp.Loss.of(lambda z, batch: (z**4).sum(1), outputs="model")
    operator = cp.kfac(model, [(x, y)], loss=loss, fisher="type-2", eigenvalues=eigenvalues)

    def exact(names):
        j = jacobian(model, x, names)
        return j.T @ middle @ j / count

    blocks_equal(operator, exact)


def test_empirical_factors_are_those_of_the_labels():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    x, y = random(1, 4), torch.tensor([1])
    own = {n: p.detach() for n, p in model.named_parameters()}

    def exact(names):
        def loss(chosen):
            return F.cross_entropy(torch.func.functional_call(model, {**own, **chosen}, (x,)), y)

        g = torch.func.grad(loss)({n: own[n] for n in names})
        flat = torch.cat([g[n].flatten() for n in names])
        return torch.outer(flat, flat)

    for eigenvalues in (False, True):
        operator = cp.kfac(model, [(x, y)], fisher="empirical", eigenvalues=eigenvalues)
        blocks_equal(operator, exact)


SLOW = pytest.param(True, marks=pytest.mark.slow, id="ekfac")


@pytest.mark.parametrize("eigenvalues", [pytest.param(False, id="kfac"), SLOW])
def test_drawn_labels_are_unbiased(eigenvalues):
    model, x, data, _ = linear("tokens")
    asked = {"loss": cp.Regression(sigma=0.5**0.5), "eigenvalues": eigenvalues}
    operator = cp.kfac(model, data, labels=2000, **asked)
    assert operator.stochastic and "2000 sampled" in operator.matrix
    for block in operator.blocks.values():
        exact = squared_error(model, x, list(block.space.shapes))
        error = torch.linalg.norm(block.to_dense() - exact) / torch.linalg.norm(exact)
        assert error < 0.05
    first, again, other = (cp.kfac(model, data, seed=s, **asked).to_dense() for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_forward_only_factors_are_the_second_moment_of_the_inputs(sharing):
    model = seeded(lambda: nn.Linear(3, 2)).double()
    x = random(4, 5, 3)
    ones = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    rows = ones.mean(1) if sharing == "reduce" else ones.flatten(0, 1)
    whole = torch.kron(torch.eye(2, dtype=torch.float64), rows.T @ rows / len(rows))
    # The weight [2, 3] comes first, the bias [2] after it.
    order = [0, 1, 2, 4, 5, 6, 3, 7]
    for eigenvalues in (False, True):
        operator = cp.kfac(
            model,
            [(x, random(4, 5, 2))],
            loss="regression",
            fisher="forward-only",
            kfac_approx=sharing,
            eigenvalues=eigenvalues,
        )
        torch.testing.assert_close(operator.to_dense(), whole[order][:, order], **CLOSE)
        assert "inputs" in operator.matrix and "squared outputs" in operator.measure


def test_many_positions_take_random_signs_and_stay_exact_where_rows_do_not_mix():
    """60 tokens of 3 outputs are more than one backward pass each."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))).double()
    x = random(2, 60, 4)
    operator = cp.kfac(model, [(x, random(2, 60, 3))], loss="regression", fisher="type-2")
    assert operator.stochastic
    blocks_equal(operator, lambda names: squared_error(model, x, names))


# --------------------------------------------------------------------------- columns at the outputs


def places(k=3, n=4):
    """Logits of several places an item."""
    return random(n, 5, k), torch.arange(5 * n).view(n, 5) % k


def weighted():
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    z, y = places()
    y[1, 2:] = -100
    return cp.Classification(weight=weight, label_smoothing=0.1), z, (z, y)


def yes_or_no():
    z, y = places()
    given = cp.MultiLabel(pos_weight=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    return given, z, (z, F.one_hot(y).double())


def pixels():
    z = random(2, 3, 2, 4)
    return cp.Segmentation(), z, (z, torch.arange(16).view(2, 2, 4) % 3)


def important():
    z, y = random(4, 3), torch.arange(4) % 3
    batch = {"x": z, "labels": y, "sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5])}
    return cp.Classification(), z, batch


def differentiated():
    z = random(4, 3)
    return cp.Loss.of(lambda z, batch: (z**4).sum(1), outputs="model"), z, (z, z)


LOSSES = {
    "classes": lambda: (cp.Classification(), *reversed_pair(places())),
    "weights of classes": weighted,
    "labels": yes_or_no,
    "numbers": lambda: (cp.Regression(), random(4, 3), (random(4, 3), random(4, 3, seed=1))),
    "counts": lambda: (
        cp.OutputLoss(cp.Poisson()),
        random(4, 3),
        (random(4, 3), random(4, 3, seed=1).abs()),
    ),
    "pixels": pixels,
    "weights of items": important,
    "function": differentiated,
}


def reversed_pair(pair):
    z, y = pair
    return z, (z, y)


@pytest.mark.parametrize("name", LOSSES)
def test_columns_are_a_root_of_the_hessian_at_the_outputs(name):
    loss, z, batch = LOSSES[name]()
    sums = torch.zeros(len(z), z[0].numel(), z[0].numel(), dtype=torch.float64)
    for column in loss.root_columns(z, batch, torch.Generator()):
        assert column.shape == z.shape
        rows = column.flatten(1)
        sums += rows.unsqueeze(2) * rows.unsqueeze(1)
    for i in range(len(z)):

        def own(v, i=i):
            return loss.item_losses(torch.cat([z[:i], v[None], z[i + 1 :]]), batch)[i]

        exact = torch.func.hessian(own)(z[i]).reshape(sums[i].shape)
        torch.testing.assert_close(sums[i], exact, rtol=1e-8, atol=1e-10)


def test_signs_of_many_positions_are_unbiased_between_them():
    z = random(1, 50, 3)
    batch = (z, torch.arange(50).view(1, 50) % 3)
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(150, 150, dtype=torch.float64)
    for _ in range(400):
        columns = list(cp.Classification().root_columns(z, batch, generator))
        assert len(columns) == 3
        rows = torch.stack(columns).reshape(3, -1)
        sums += rows.T @ rows / 400
    exact = cp.Classification().item_hessians(z, batch)[0]
    inside = exact != 0
    torch.testing.assert_close(sums[inside], exact[inside], **CLOSE)
    assert float(sums[~inside].abs().max()) < 0.25 * float(exact.abs().max())


# ------------------------------------------------------------------------------- norms and lookups


NORMS = {
    "layer": (lambda: nn.LayerNorm(6), (4, 5, 6)),
    "layer over two axes": (lambda: nn.LayerNorm((5, 6)), (4, 5, 6)),
    "without bias": (lambda: nn.LayerNorm(6, bias=False), (4, 5, 6)),
    "root mean square": (lambda: nn.RMSNorm(6), (4, 5, 6)),
    "batch": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "batch of images": (lambda: nn.BatchNorm2d(6), (4, 6, 2, 3)),
    "groups": (lambda: nn.GroupNorm(2, 6), (4, 6, 6)),
}


class Around(nn.Module):
    """A norm between functions that are not linear."""

    def __init__(self, norm, inputs):
        super().__init__()
        self.norm, self.head = norm, nn.Linear(inputs, 3)
        for p in norm.parameters():
            nn.init.uniform_(p, 0.5, 2.0)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(torch.sin(x))).flatten(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NORMS)
def test_scales_of_norms_have_their_exact_block(name, sharing):
    build, shape = NORMS[name]
    x = random(*shape)
    model = seeded(lambda: Around(build(), x[0].numel())).double().eval()
    model.train()
    operator = cp.kfac(
        model,
        [(x[:1], random(1, 3)), (x[1:], random(len(x) - 1, 3))],
        loss="regression",
        layers="norm",
        fisher="type-2",
        kfac_approx=sharing,
    )
    assert list(operator.blocks) == ["norm"] and model.norm.training
    model.eval()
    blocks_equal(operator, lambda names: squared_error(model, x, names))


def test_large_norms_have_their_diagonal():
    x = random(4, 600)
    model = seeded(lambda: Around(nn.LayerNorm(600), 600)).double()
    operator = cp.kfac(
        model, [(x, random(4, 3))], loss="regression", layers="norm", fisher="type-2"
    )
    assert isinstance(operator.blocks["norm"], Diagonal)
    exact = squared_error(model, x, ["norm.weight", "norm.bias"]).diagonal()
    torch.testing.assert_close(operator.diagonal(), exact, **CLOSE)


def test_forward_only_scales_are_moments_of_what_they_multiply():
    x = random(4, 5, 6)
    model = seeded(lambda: Around(nn.LayerNorm(6), 30)).double()
    operator = cp.kfac(
        model, [(x, random(4, 3))], loss="regression", layers="norm", fisher="forward-only"
    )
    rows = F.layer_norm(torch.sin(x), (6,)).flatten(0, 1)
    first = torch.cat([torch.diag(rows.square().mean(0)), torch.diag(rows.mean(0))], 1)
    second = torch.cat([torch.diag(rows.mean(0)), torch.eye(6, dtype=torch.float64)], 1)
    torch.testing.assert_close(operator.to_dense(), torch.cat([first, second]), **CLOSE)


@pytest.mark.parametrize("eigenvalues", [False, True], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("padding", [None, 2])
def test_tables_are_exact_in_linear_networks(padding, eigenvalues):
    model = seeded(
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Linear(3, 2))
    ).double()
    tokens = torch.tensor([[0, 1], [2, 4], [1, 1], [2, 2]])
    operator = cp.kfac(
        model,
        [(tokens, random(4, 2, 2))],
        loss="regression",
        layers="0",
        fisher="type-2",
        eigenvalues=eigenvalues,
    )

    def exact(names):
        full = squared_error(model, tokens, names).view(5, 3, 5, 3)
        if padding is not None:  # torch gives its row no gradient
            full[padding], full[:, :, padding] = 0, 0
        return full.reshape(15, 15)

    # Rows of the padding token count in the loss and not in the factors.
    blocks_equal(operator, exact)
    torch.testing.assert_close(operator.diagonal(), operator.to_dense().diagonal(), **CLOSE)
    v = random(15, 2)
    torch.testing.assert_close(operator.damped(0.1) @ operator.damped(0.1).solve(v), v, **CLOSE)


def test_ekfac_has_the_trace_of_the_exact_matrix():
    """Of any network: the squares of a gradient keep their sum in every basis."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.conv, self.head = nn.Conv1d(4, 4, 3, padding=1, groups=2), nn.Linear(4, 3)

        def forward(self, tokens):
            h = torch.tanh(self.norm(self.table(tokens))).transpose(1, 2)
            return self.head(torch.relu(self.conv(h)).transpose(1, 2)).mean(1)

    model = seeded(Mixed).double()
    tokens = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    data = [(tokens, random(6, 3))]
    for sharing in ("expand", "reduce"):
        asked = {"fisher": "type-2", "kfac_approx": sharing, "eigenvalues": True}
        operator = cp.kfac(model, data, loss="regression", **asked)
        names = [n for n, _ in model.named_parameters()]
        assert set(operator.space.shapes) == set(names)
        exact = squared_error(model, tokens, names).trace()
        assert operator.trace() == pytest.approx(float(exact), rel=1e-9)


# ------------------------------------------------------------------------------ weights used twice


class Halves(nn.Module):
    """One weight for both halves of the input, in one module or in two."""

    def __init__(self, modules, biases=(True, True)):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=biases[0])
        self.second = self.first
        if modules == 2:
            self.second = nn.Linear(3, 3, bias=biases[1])
            self.second.weight = self.first.weight

    def forward(self, x):
        a, b = x.split(3, -1)
        return torch.cat([self.first(a), self.second(b)], -1)


@pytest.mark.parametrize(
    ("modules", "biases", "bias"),
    [
        (1, (True, True), True),
        (1, (True, True), "separate"),
        (2, (True, False), True),
        (2, (True, False), "separate"),
        (2, (False, True), True),
        (2, (True, True), "separate"),
        (2, (True, True), False),
    ],
)
def test_a_weight_used_twice_has_the_rows_of_both(modules, biases, bias):
    model, x = seeded(lambda: Halves(modules, biases)).double(), random(1, 6)
    operator = cp.kfac(model, [(x, random(1, 6))], loss="regression", fisher="type-2", bias=bias)
    blocks_equal(operator, lambda names: squared_error(model, x, names))


def test_two_biases_beside_one_weight_have_no_block_in_common_with_it():
    model = seeded(lambda: Halves(2)).double()
    with pytest.raises(ValueError, match=r"first.bias, second.bias.*bias='separate'"):
        cp.kfac(model, [(random(2, 6), random(2, 6))], loss="regression")


def test_what_factors_cannot_describe_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.idle, self.aside = (
                nn.Embedding(5, 3),
                nn.Linear(3, 3),
                nn.Linear(3, 3),
            )
            self.used, self.head = nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            h = self.table(tokens)
            self.aside(h)
            return self.head(h @ self.used.weight)

    model, data = seeded(Odd).double(), [(torch.tensor([1, 3, 4]), torch.tensor([0, 1, 2]))]
    words = {
        "table": "looked up and also multiplies",
        "idle": "not called",
        "aside": "received no gradient",
        "used": "used 1 times, 0 of them by calling it",
    }
    for layer, word in words.items():
        with pytest.raises(ValueError, match=f"layer {layer}: .*{word}.*leave it out"):
            cp.kfac(model, data, loss="classification", layers=layer)
    with pytest.raises(ValueError, match="layers='nothing' matches none"):
        cp.kfac(model, data, loss="classification", layers="nothing")
    # Beside others they are left out, and that is said; if nothing is left, it is raised.
    model.last = nn.Linear(5, 5).double()
    model.forward = lambda tokens: model.last(Odd.forward(model, tokens))
    operator = cp.kfac(model, data, loss="classification")
    assert list(operator.blocks) == ["last"] and operator.left_out.keys() == words.keys()
    assert all(word in operator.left_out[layer] for layer, word in words.items())
    assert "left out: table, idle, aside, used" in repr(operator)
    with pytest.raises(ValueError, match="layer idle"):
        cp.kfac(model, data, loss="classification", layers="[iu]*")


@pytest.mark.parametrize("flat", [False, True])
def test_a_table_of_positions_has_no_row_for_each_item(flat):
    """Six positions for three items could be two positions each."""

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.places = nn.Embedding(5, 3), nn.Embedding(6, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, tokens):
            numbers = torch.arange(tokens.shape[1])
            numbers = numbers if flat else numbers.unsqueeze(0)
            return self.head(self.table(tokens) + self.places(numbers)).mean(1)

    tokens = torch.randint(0, 5, (3, 6), generator=torch.Generator().manual_seed(0))
    operator = cp.kfac(seeded(Placed).double(), [(tokens, random(3, 2))], loss="regression")
    assert list(operator.blocks) == ["table", "head"]
    assert "does not count items" in operator.left_out["places"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fisher": "type2"}, "fisher='type2'.*'type-2'"),
        ({"kfac_approx": "both"}, "kfac_approx='both'.*'expand', 'reduce'"),
        ({"bias": "joint"}, "bias='joint'"),
        ({"labels": 0}, "labels=0"),
        ({"layers": []}, "layers is empty"),
        ({"fischer": "mc"}, "unknown argument 'fischer'.*fisher, kfac_approx"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_expected(wrong, words):
    model = seeded(lambda: nn.Linear(4, 3))
    with pytest.raises((ValueError, TypeError), match=words):
        cp.kfac(model, [(torch.randn(5, 4), torch.arange(5) % 3)], **wrong)


def test_type_2_of_very_many_classes_says_what_to_take_instead():
    model = seeded(lambda: nn.Linear(2, 1100))
    data = [(torch.randn(3, 2), torch.arange(3))]
    with pytest.raises(ValueError, match=r"1100 outputs a position.*fisher='mc'"):
        cp.kfac(model, data, fisher="type-2")
    assert cp.kfac(model, data).psd
    with pytest.raises(ValueError, match="no position that counts"):
        cp.kfac(model, [(torch.randn(3, 2), torch.full((3,), -100))])
    with pytest.raises(ValueError, match="the data is empty"):
        cp.kfac(model, [])


# ------------------------------------------------------------------------------ as an operator


@pytest.fixture
def mixed():
    """K-FAC of layers with bias and without, of groups and of a norm."""
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, groups=2),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 3, bias=False),
            nn.Linear(3, 3),
        )
    ).double()
    return model, [(random(6, 2, 5), torch.arange(6) % 3)]


def test_the_operator_agrees_with_its_matrix(mixed):
    for eigenvalues in (False, True):
        operator = cp.kfac(*mixed, loss="classification", eigenvalues=eigenvalues)
        dense = operator.to_dense()
        v = random(len(dense), 2)
        torch.testing.assert_close(operator @ v, dense @ v, **CLOSE)
        torch.testing.assert_close(operator.diagonal(), dense.diagonal(), **CLOSE)
        assert operator.trace() == pytest.approx(float(dense.trace()))
        # Parts of blocks, in the order of the space.
        for names in (["5.weight"], ["5.bias"], ["0.bias", "1.weight"], ["0.weight", "5.bias"]):
            part = operator.restrict(names)
            index = torch.cat([torch.arange(len(dense))[operator.space.slices[n]] for n in names])
            torch.testing.assert_close(part.to_dense(), dense[index][:, index], **CLOSE)


@pytest.mark.parametrize("split", ["exact", "factored", "each"])
@pytest.mark.parametrize("eigenvalues", [False, True], ids=["kfac", "ekfac"])
def test_inverses_are_those_of_the_damped_matrices(mixed, split, eigenvalues):
    operator = cp.kfac(*mixed, loss="classification", eigenvalues=eigenvalues, bias="separate")
    inverse = operator.inverse(0.1, split=split)
    assert inverse.space == operator.space and "0.1" in inverse.matrix
    for name, block in operator.blocks.items():
        n = block.space.dim
        expected = torch.linalg.inv(block.to_dense() + 0.1 * torch.eye(n, dtype=torch.float64))
        if hasattr(block, "scales") or isinstance(block, Dense) or split == "exact":
            torch.testing.assert_close(inverse.blocks[name].to_dense(), expected, **CLOSE)
            continue
        if name not in ("4", "5"):
            continue
        # G ⊗ A with the damping on each factor.
        g, a = block.left, block.right
        pi = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
        more = {"each": (0.1, 0.1), "factored": (0.1**0.5 / pi, 0.1**0.5 * pi)}[split]
        damped = [
            m + shift * torch.eye(len(m), dtype=m.dtype)
            for m, shift in zip((g, a), more, strict=True)
        ]
        expected = torch.linalg.inv(torch.kron(*damped))
        torch.testing.assert_close(inverse.blocks[name].to_dense(), expected, **CLOSE)


def test_inverses_refuse_what_they_cannot_do(mixed):
    operator = cp.kfac(*mixed, loss="classification")
    with pytest.raises(ValueError, match="damping=0"):
        operator.inverse(0)
    with pytest.raises(ValueError, match=r"split='half'.*exact, factored, each"):
        operator.inverse(0.1, split="half")
    whole = operator.inverse(0.1).to_dense()
    eye = torch.eye(len(whole), dtype=torch.float64)
    torch.testing.assert_close(whole @ (operator.to_dense() + 0.1 * eye), eye, **CLOSE)


def test_the_model_comes_back_as_it_was(mixed):
    model, data = mixed
    model.train()
    model[4].weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for fisher, eigenvalues in product(("mc", "type-2"), (False, True)):
        cp.kfac(model, data, loss="classification", fisher=fisher, eigenvalues=eigenvalues)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert not model[4].weight.requires_grad and model[5].weight.requires_grad


def test_weights_stored_the_other_way_round():
    from transformers.pytorch_utils import Conv1D

    model = seeded(lambda: nn.Sequential(Conv1D(3, 4), nn.Linear(3, 2))).double()
    x = random(5, 4)
    for bias, eigenvalues in product((True, "separate", False), (False, True)):
        operator = cp.kfac(
            model,
            [(x, random(5, 2))],
            loss="regression",
            fisher="type-2",
            bias=bias,
            eigenvalues=eigenvalues,
        )
        blocks_equal(operator, lambda names: squared_error(model, x, names))


def test_half_precision_is_added_up_in_float32():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)))
    x, y = random(8, 4).float(), torch.arange(8) % 3
    exact = cp.kfac(model, [(x, y)], fisher="type-2")
    rough = cp.kfac(model.bfloat16(), [(x.bfloat16(), y)], fisher="type-2")
    assert rough.dtype == torch.float32
    assert rough.trace() == pytest.approx(exact.trace(), rel=0.05)


def test_settings_and_layers_are_taken_as_they_are():
    model, _, data, _ = linear("deep")
    settings = KfacSettings(fisher="type-2", bias=False)
    operator = kronecker_factored(model, cp.Regression(), data, find_layers(model, "1"), settings)
    assert list(operator.space.shapes) == ["1.weight"]
    with pytest.raises(ValueError, match="no data"):
        kronecker_factored(model, Classification(), [], find_layers(model))
