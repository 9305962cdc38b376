"""Recurrent modules, transposed and three-dimensional convolutions, bags of embeddings: moments,
curvature, prices and files, against brute force and the modules themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import curvprune as cp
from curvprune import artifact
from curvprune.compression import visit_layers
from curvprune.curvature import Change, Draws, find_structure, fisher_pass, kfac
from curvprune.model import Classification, find_layers
from curvprune.pricing import multiply_adds, quadratic_forms
from tests.test_artifact import bytes_held


class Reader(nn.Module):
    """A recurrent network over tokens, with a class at its end."""

    def __init__(self, rnn: nn.RNNBase, tokens: int = 7, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, rnn.input_size)
        self.rnn = rnn
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


class Painter(nn.Module):
    """Transposed convolutions in one and two dimensions, and a solid one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "solid":
            self.first: nn.Module = nn.Conv3d(2, 4, 2, padding=1, groups=2)
            self.second: nn.Module = nn.Conv3d(4, 3, (1, 2, 2), stride=2)
        elif kind == "plane":
            self.first = nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2)
            self.second = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        else:
            self.first = nn.ConvTranspose1d(2, 4, 3, stride=2, dilation=2, padding=1)
            self.second = nn.ConvTranspose1d(4, 3, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).flatten(2).mean(2))


SIZES = {"line": (4,), "plane": (2, 3), "solid": (3, 2, 2)}
CELLS: dict[str, Any] = {
    "lstm": lambda **k: nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True, proj_size=2, **k),
    "gru": lambda **k: nn.GRU(4, 5, batch_first=True, **k),
    "rnn": lambda **k: nn.RNN(4, 5, batch_first=True, nonlinearity="relu", **k),
}
KINDS = [*CELLS, *SIZES]


def model_of(kind: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader(CELLS[kind]()) if kind in CELLS else Painter(kind)
    return model.to(dtype).eval()


def items_of(kind: str, count: int, *, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 3, (count, 1), generator=generator)
    if kind in CELLS:
        x: Tensor = torch.randint(0, 7, (count, 1, 6), generator=generator)
    else:
        x = torch.randn(count, 1, 2, *SIZES[kind], generator=generator, dtype=dtype)
    return list(zip(x, y, strict=True))


def inner(model: nn.Module) -> list[str]:
    """Layers of the kinds that this file is about."""
    kinds = ("recurrent", "conv", "conv_transpose")
    return [name for name, layer in find_layers(model).items() if layer.kind in kinds]


def joined(items: list[Any]) -> Any:
    return tuple(torch.cat(column) for column in zip(*items, strict=True))


# ----------------------------------------------------------------------------------------- moments


def halve(layer: Any) -> None:
    """Whatever is neither visited last nor sees what it makes itself."""
    if layer.kind != "embedding" and layer.parameter[:9] not in ("weight_hh", "weight_hr"):
        layer.write_(0.5 * layer.as_matrix(layer.weight.detach()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_solved_for_what_the_weights_before_it_became(kind):
    """Moments in one pass that halves weights: those of the halved model, and the drift from the
    model as it was."""
    model = model_of(kind, dtype=torch.float64)
    batch = joined(items_of(kind, 9, dtype=torch.float64))
    before = copy.deepcopy(model)
    found = {}

    def visit(layer, moments):
        found[layer.name] = moments()
        halve(layer)

    reference = before, find_layers(before)
    visit_layers(model, Classification(), batch, find_layers(model), visit, reference=reference)
    seen, drifted = rows_of(model, batch), rows_of(before, batch)
    for name in inner(model):
        x, original = seen[name], drifted[name]
        count = x.shape[1]
        torch.testing.assert_close(found[name].second, x.mT @ x / count, msg=name)
        drift = (original - x).mT @ x / count
        if float(drift.abs().max()) < 1e-12:
            assert found[name].drift is None, name
        else:
            torch.testing.assert_close(found[name].drift, drift, msg=name)


def rows_of(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What every layer multiplies in one pass through the model as it is."""
    rows = {}
    handles = []
    for name, layer in find_layers(model).items():

        def keep(module, arguments, named, name=name, layer=layer):
            if layer.kind == "recurrent":
                rows[name] = layer.recurrent_rows(module, arguments, named)[None]
            else:
                rows[name] = layer.rows(module, arguments[0])

        if layer.kind != "embedding":
            handles.append(layer.module.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(batch[0])
    for handle in handles:
        handle.remove()
    return rows


class Padded(nn.Module):
    """An LSTM that packs what a mask leaves of its input, or reads it as it is."""

    def __init__(self, packs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.packs = nn.Embedding(7, 4), packs
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.packs:
            lengths = attention_mask.sum(1)
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states = pad_packed_sequence(self.lstm(x)[0], batch_first=True)[0]
        else:
            states = self.lstm(x)[0]
        return self.head((states * attention_mask[:, : states.shape[1], None]).sum(1))


@pytest.mark.parametrize("packs", [True, False])
def test_padding_is_not_counted(packs):
    model = Padded(packs)
    ids = torch.randint(0, 7, (3, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 6, 3])
    mask = (torch.arange(6)[None] < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
    found = {}

    def visit(layer, moments):
        found[layer.name] = moments()

    visit_layers(model, Classification(), batch, find_layers(model), visit)
    with torch.no_grad():
        states, inputs = [], []
        for row, n in zip(ids, lengths, strict=True):
            x = model.embed(row[:n])
            h = model.lstm(x)[0]
            inputs.append(x)
            states.append(torch.cat([torch.zeros(1, 5), h[:-1]]))
    for name, parts in (("lstm.weight_ih_l0", inputs), ("lstm.weight_hh_l0", states)):
        rows = torch.cat(parts)
        torch.testing.assert_close(found[name].second[0], rows.T @ rows / 11)
    macs = multiply_adds(model, Classification(), [batch], find_layers(model))
    assert macs["lstm.weight_ih_l0"] == 11 * 20 * 4 / 3
    assert macs["lstm.weight_hh_l0"] == 11 * 20 * 5 / 3


def test_multiply_adds_of_convolutions_count_each_weight_where_it_is_used():
    """A transposed convolution spreads every input position by its whole kernel."""
    for kind, expected in (("plane", (6 * 2 * 2 * 4, 24 * 4 * 3 * 9)), ("line", (4 * 2 * 4 * 3,))):
        model, items = model_of(kind), items_of(kind, 2)
        macs = multiply_adds(model, Classification(), items, find_layers(model))
        for name, count in zip(("first", "second"), expected, strict=False):
            assert macs[name] == count, (kind, name)


# --------------------------------------------------------------------------------------- curvature


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_change_costs_is_that_of_every_items_own_gradient(kind):
    """``⟨g, δ⟩``, ``‖g‖²`` and the diagonal, from a backward pass of each item by itself."""
    model, items = model_of(kind, dtype=torch.float64), items_of(kind, 3, dtype=torch.float64)
    layers = {n: find_layers(model)[n] for n in inner(model)}
    deltas = {n: torch.randn(v.shape, dtype=torch.float64) for n, v in layers.items()}
    changes = {name: [Change.of(delta)] for name, delta in deltas.items()}
    draws = Draws(labels=1, empirical=True)
    measured = fisher_pass(model, Classification(), items, layers, changes, draws=draws)
    for name, layer in layers.items():
        gradients = []
        for x, y in items:
            loss = nn.functional.cross_entropy(model(x), y)
            gradients.append(torch.autograd.grad(loss, layer.weight)[0].flatten())
        g = torch.stack(gradients)
        along = g @ layer.from_matrix(deltas[name]).flatten()
        torch.testing.assert_close(measured.along[name][:, 0, 0], along)
        assert measured.trace(name).value == pytest.approx(float(g.square().sum()) / 3)
        exact = layer.as_matrix(g.square().mean(0).reshape(layer.weight.shape))
        torch.testing.assert_close(measured.diagonal[name], exact)


def dense(model: nn.Module, items: list[Any], name: str) -> Tensor:
    """The Hessian of the mean loss, by reverse over reverse through the whole model."""
    weight = dict(model.named_parameters())[name].detach()
    x, y = joined(items)

    def loss(flat: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {name: flat.view(weight.shape)}, (x,))
        return nn.functional.cross_entropy(out, y)

    return torch.autograd.functional.hessian(loss, weight.flatten())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hessians_and_traces_are_those_of_the_dense_matrix(kind, dtype):
    model, items = model_of(kind, dtype=dtype), items_of(kind, 3, dtype=dtype)
    name = inner(model)[-1]
    layer = find_layers(model)[name]
    key = layer.keys[0]
    exact = dense(model, items, key)
    eye = torch.eye(len(exact), dtype=dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(cp.hessian(model, items, parameters=[key]) @ eye, exact, **tolerance)
    if dtype == torch.float32:
        return
    own = cp.analyze(model, items, layers=name, matrix="empirical-fisher", quantities=["trace"])
    squares = 0.0
    for x, y in items:
        value = nn.functional.cross_entropy(model(x), y)
        squares += float(torch.autograd.grad(value, layer.weight)[0].square().sum()) / len(items)
    assert own.layers[name].trace.value == pytest.approx(squares, rel=1e-6)
    probed = cp.analyze(model, items, layers=name, quantities=["trace"], max_products=20)
    trace = probed.layers[name].trace
    assert abs(trace.value - float(exact.trace())) < 4 * trace.stderr + 1e-9


def test_recurrent_weights_have_no_factors_and_convolutions_have():
    model, items = model_of("lstm"), items_of("lstm", 4)
    layers = find_layers(model)
    batch = joined(items)
    assert find_structure(model, Classification(), batch, layers).factored == ("embed", "head")
    with pytest.raises(ValueError, match=r"layer rnn\.weight_ih_l0: .*no Kronecker factors"):
        kfac(model, Classification(), [batch], {n: layers[n] for n in inner(model)})
    for kind in SIZES:
        model, batch = model_of(kind), joined(items_of(kind, 4))
        structure = find_structure(model, Classification(), batch, find_layers(model))
        assert structure.factored == ("first", "second", "head")


@pytest.mark.parametrize("kind", ["line", "plane"])
def test_kronecker_factors_of_a_transposed_convolution_are_in_its_order(kind):
    """``½ tr(G δ A δᵀ)`` from rows and output gradients by hand, along a change of the weight."""
    model = model_of(kind, dtype=torch.float64)
    items = items_of(kind, 4, dtype=torch.float64)
    layer = find_layers(model)["second"]
    batch = joined(items)
    x = rows_of(model, batch)["second"][0]
    outputs = model.second(model.first(batch[0]).tanh())
    loss = nn.functional.cross_entropy(model.head(outputs.flatten(2).mean(2)), batch[1])
    g = torch.autograd.grad(4 * loss, outputs)[0].flatten(2).transpose(1, 2).reshape(-1, 3)
    left, right = g.T @ g / 4, x.T @ x / len(x)
    delta = torch.randn(layer.shape, dtype=torch.float64)
    value = float((delta * (left @ delta @ right)).sum())
    K = cp.kfac(model, [batch], layers="second", fisher="empirical", bias="separate")
    K = K.restrict(["second.weight"])
    assert float(K.quad(layer.from_matrix(delta).flatten())) == pytest.approx(value)


@pytest.mark.parametrize("kind", SIZES)
def test_the_price_of_inputs_is_the_squared_error_of_the_outputs(kind):
    """Halved, of a row, for a grid of three bits, with all items in one part."""
    model = model_of(kind, dtype=torch.float64)
    items = items_of(kind, 1, dtype=torch.float64)
    layers = find_layers(model)
    name = "second"
    delta = torch.randn(layers[name].shape, dtype=torch.float64)
    forms = quadratic_forms(
        "input", model, Classification(), items, {name: layers[name]}, {name: [Change.of(delta)]}
    )
    changed = copy.deepcopy(model)
    find_layers(changed)[name].write_(delta + layers[name].as_matrix(layers[name].weight.detach()))
    with torch.no_grad():
        x = model.first(items[0][0]).tanh()
        moved = (changed.second(x) - model.second(x)).square()
    error = 0.5 * float(moved.sum(1).mean())
    assert float(forms.sums[name][0, 0]) == pytest.approx(error)


# ------------------------------------------------------------------------------------------- verbs

OPTIONS = [
    cp.Quantize(bits=3, group_size=4, symmetric=False),
    cp.Quantize(bits=8),
    cp.Cast(dtype="bfloat16"),
    cp.Prune(sparsity=0.5),
    cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=4)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.key)
def test_every_option_comes_back_in_the_bytes_that_were_promised(kind, option, tmp_path):
    model, items = model_of(kind), items_of(kind, 6)
    result = cp.compress(model, items, options=[option])
    result.save(tmp_path)
    stored = artifact.tensor_names(tmp_path)
    assert result.plan.bytes == sum(size for _, size in stored.values())
    x = joined(items)[0]
    packed = cp.load(tmp_path, model=copy.deepcopy(model), packed=True)
    plain = cp.load(tmp_path, model=copy.deepcopy(model))
    with torch.no_grad():
        expected = result.model(x)
        assert not torch.equal(expected, model(x))
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
        held = bytes_held(packed)
        for _ in range(2):
            torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-6)
    assert bytes_held(packed) == held
    for name in inner(model):
        layer = find_layers(plain)[name]
        matrix = layer.as_matrix(layer.weight.detach())
        torch.testing.assert_close(matrix, result.solved[name].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_fit_where_rows_are_long_enough(kind):
    model, items = model_of(kind), items_of(kind, 6)
    name = next(n for n in inner(model) if find_layers(model)[n].shape[1] % 4 == 0)
    pruned = cp.prune(model, items, pattern="2:4", layers=name)
    layer = find_layers(pruned.model)[name]
    matrix = layer.as_matrix(layer.weight.detach())
    assert int((matrix.reshape(-1, 4) != 0).sum(1).max()) <= 2


def test_packed_recurrent_weights_are_not_kept_after_a_pass(tmp_path):
    model, items = model_of("lstm"), items_of("lstm", 4)
    cp.quantize(model, items, bits=4, layers="rnn.weight_hh*").save(tmp_path)
    packed = cp.load(tmp_path, model=copy.deepcopy(model), packed=True)
    x = joined(items)[0]
    with torch.no_grad():
        first = packed(x)
        assert not packed.rnn.weight_hh_l0.numel() and packed.rnn.weight_ih_l0.numel()
        again = copy.deepcopy(packed).double().float()  # moves what is packed as well
        torch.testing.assert_close(again(x), first)
    with pytest.raises(ValueError, match=r"layer rnn\..*hh_l0: its weight is not a parameter"):
        find_layers(packed, "*weight_hh_l0")


@pytest.mark.parametrize("kind", ["lstm", "gru", "plane"])
def test_a_budget_chooses_and_recovery_trains(kind):
    model = model_of(kind)
    items = items_of(kind, 40)
    ledger = cp.price(model, items[:20], options=[cp.Quantize(bits=b) for b in (2, 4)])
    for name in inner(model):
        rows = ledger.layer_rows(name)
        assert rows["int2-pc-sym"].price > 0 and rows["int4-pc-sym"].price > 0
    result = cp.quantize(model, items[:20], bits=[2, 4, 8], budget=cp.Budget(max_bits=20))
    assert set(inner(model)) <= set(result.plan.choices)
    # Scales of two bits are trained, and every weight is again so many of them.
    rounded = cp.quantize(model, items[:20], bits=2, layers=inner(model))
    recovered = cp.recover(rounded, model, items[20:], steps=8)
    assert recovered.plan.bytes == rounded.plan.bytes
    moved = [n for n in inner(model) if not same_weight(recovered.model, rounded.model, n)]
    assert moved
    for name in moved:
        layer = find_layers(recovered.model)[name]
        matrix = layer.as_matrix(layer.weight.detach())
        assert max(len(row.unique()) for row in matrix) <= 4


def same_weight(one: nn.Module, other: nn.Module, name: str) -> bool:
    return torch.equal(*(find_layers(model)[name].weight for model in (one, other)))


class Counter(nn.Module):
    """Classes from the mean of the rows that tokens name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(7, 8, mode="mean")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


def test_a_bag_of_embeddings_is_rounded_row_by_row(tmp_path):
    model, items = Counter(), items_of("lstm", 8)
    result = cp.quantize(model, items, bits=4)
    result.save(tmp_path)
    x = joined(items)[0]
    packed = cp.load(tmp_path, model=Counter(), packed=True)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), result.model(x), rtol=1e-5, atol=1e-6)
    # Round to nearest in every row: no weight moves by more than half a step.
    solved = result.solved["bag"]
    step = solved.scale.float().expand(-1, 8)
    assert bool(((solved.weight - model.bag.weight).abs() <= 0.5001 * step).all())
    double = Counter().double()
    own = cp.analyze(double, items, layers="bag", matrix="empirical-fisher", quantities=["trace"])
    squares = 0.0
    for x, y in items:
        loss = nn.functional.cross_entropy(double(x), y)
        squares += float(torch.autograd.grad(loss, double.bag.weight)[0].square().sum())
    assert own.layers["bag"].trace.value == pytest.approx(squares / len(items))


class Own(nn.LSTM):
    """A recurrent class whose forward pass is another one."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # type: ignore[override]
        return super().forward(2 * input, hx)


def test_a_forward_pass_of_its_own_leaves_a_recurrent_module_as_it_is():
    model, items = Reader(Own(4, 5, batch_first=True)), items_of("lstm", 6)
    result = cp.quantize(model, items, bits=4)
    assert "rnn.weight_ih_l0" not in result.solved
    assert any("Own has a forward pass of its own" in note for note in result.plan.notes)
