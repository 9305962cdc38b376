"""Layers that are not where one would look: never reached, without a gradient, with inputs of zero,
read by functions instead of their modules, or read several times."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

import curvprune as cp
from curvprune.compression import visit_layers
from curvprune.model import Classification, find_layers


class Idle(nn.Module):
    """``spare`` is never called, the loss ignores ``side``, and a ReLU that never fires stands
    between ``dead`` and ``after``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.spare, self.side = nn.Linear(8, 8), nn.Linear(8, 3)
        self.dead, self.after = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.dead.bias.fill_(-1000.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        self.side(hidden)
        return self.head(hidden) + self.after(torch.relu(self.dead(hidden)))


def items(count: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(count):
        inputs = torch.randn(4, 8, generator=generator)
        data.append((inputs, torch.randint(0, 4, (4,), generator=generator)))
    return data


def idle() -> Idle:
    torch.manual_seed(0)
    return Idle().eval()


def same_weights(model: nn.Module, other: nn.Module) -> set[str]:
    own = find_layers(other)
    return {n for n, la in find_layers(model).items() if torch.equal(la.weight, own[n].weight)}


VERBS = {
    "quantize": lambda m, **how: cp.quantize(m, items(), bits=3, **how),
    "prune": lambda m, **how: cp.prune(m, items(), sparsity=0.5, **how),
    "allocate": lambda m, **how: cp.prune(m, items(), sparsity=0.5, allocate=True, **how),
    "budget": lambda m, **how: cp.quantize(
        m, items(), bits=[2, 3], budget=cp.Budget("loss", max_drop=0.5), **how
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_cannot_be_solved_or_priced_stays_as_it_is_with_its_bytes(verb):
    model = idle()
    with pytest.warns(UserWarning, match=r"stay as they are \(.*\): spare$"):
        result = VERBS[verb](model)
    kept = same_weights(model, result.model)
    assert "spare" in kept
    assert ("side" in kept) == (verb in ("allocate", "budget"))
    assert not kept & {"first", "head", "after"}
    notes = result.plan.notes
    told = [note for note in notes if "stay as they are" in note]
    assert told[0].startswith("1 layer(s) of 256 bytes") and told[0].endswith(": spare")
    if "side" in kept:
        assert told[1].startswith("1 layer(s) of 96 bytes") and told[1].endswith(": side")
    assert len(told) == 1 + ("side" in kept)
    assert sum("inputs that are all zero" in note and "after" in note for note in notes) == 1


def test_prices_are_of_what_the_loss_depends_on_and_dead_layers_are_free():
    with pytest.warns(UserWarning, match="spare|side"):
        ledger = cp.price(idle(), items(), options=[cp.Quantize(bits=b) for b in (2, 4)])
    price = {(row.layer, row.option): row.price for row in ledger.rows}
    assert {layer for layer, _ in price} == {"first", "head", "dead", "after"}
    for (layer, _), value in price.items():
        assert value == 0 if layer in ("dead", "after") else value > 0


def test_a_layer_asked_for_by_name_is_rounded_to_nearest_or_refused_with_the_way_on():
    model = idle()
    result = cp.quantize(model, items(), bits=8, layers=["first", "spare"])
    assert any("rounded to nearest" in note and "spare" in note for note in result.plan.notes)
    before, after = model.spare.weight.detach(), result.model.spare.weight.detach()
    step = before.abs().amax(1, keepdim=True) / 127
    assert not torch.equal(before, after)
    assert bool(((before - after).abs() <= 0.55 * step).all())
    pruned = cp.prune(model, items(), sparsity=0.5, layers=["spare"]).model.spare.weight.detach()
    kept = before.abs() > before.abs().flatten().kthvalue(32).values
    torch.testing.assert_close(pruned, before * kept)
    budget = cp.Budget("loss", max_drop=0.5)
    for how in ({"budget": budget}, {"bits": 4, "layers": "spar*"}):
        with pytest.raises(ValueError, match=r"layer spare: the forward pass .* never uses its"):
            cp.quantize(model, items(), **({"layers": ["spare"]} | how))
    with pytest.raises(ValueError, match=r"side: the loss .* leave it out, give data"):
        cp.price(model, items(), options=[cp.Quantize(bits=4)], layers=["first", "side"])


def test_excluded_layers_are_left_alone_without_a_note():
    model = idle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cp.quantize(model, items(), bits=3, exclude=["spare", "hea*"])
    assert same_weights(model, result.model) == {"spare", "head"}
    with pytest.raises(ValueError, match=r"exclude='hed' matches none .* nearest layer is 'head'"):
        cp.quantize(model, items(), bits=3, exclude="hed")
    with pytest.raises(ValueError, match="leaves no layer"):
        cp.quantize(model, items(), bits=3, layers="head", exclude="*")


def test_computed_weights_stay_as_they_are_with_their_bytes():
    torch.manual_seed(0)
    masked = l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(masked, nn.ReLU(), normed, nn.ReLU(), nn.Linear(8, 4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="because their weight is computed from others"):
        result = cp.prune(model, items(), sparsity=0.5)
    # A mask and its weight, a direction and its length: matrices of 64, 64, 64 and 8 floats.
    (note,) = result.plan.notes
    assert "2 layer(s) of 800 bytes" in note
    after = result.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"4.weight"}


# ------------------------------------------------------------------------------ reads by functions


class Functions(nn.Module):
    """Every way to multiply a weight without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.turned, self.left = (nn.Linear(8, 8) for _ in range(3))
        self.conv = nn.Conv1d(8, 8, 3, groups=8)
        self.head = nn.Embedding(4, 8)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        seen = self.seen
        seen["linear"] = x
        x = torch.tanh(F.linear(x, self.linear.weight, self.linear.bias))
        seen["turned"] = x
        x = torch.tanh(x @ self.turned.weight.T.contiguous())
        seen["left"] = x
        x = torch.tanh((self.left.weight @ x.transpose(0, 1)).transpose(0, 1))
        padded = F.pad(x[..., None], (1, 1), value=0.5)
        seen["conv"] = padded
        weight = self.conv.weight.squeeze(1)  # as Mamba hands it over
        x = torch.tanh(F.conv1d(padded, weight.unsqueeze(1), groups=8))[..., 0]
        seen["head"] = x
        return torch.matmul(x, self.head.weight.t())


def test_moments_of_weights_that_functions_read():
    """Against the inputs that the model itself notes down."""
    torch.manual_seed(0)
    model, (x, y) = Functions().eval(), items(1)[0]
    layers, found = find_layers(model), {}

    def visit(layer, moments):
        found[layer.name] = moments()

    visit_layers(model, Classification(), (x, y), layers, visit)
    assert set(found) == set(layers)
    seen = {name: tensor.detach() for name, tensor in model.seen.items()}
    for name, moments in found.items():
        rows = seen[name][None]
        if name == "conv":
            rows = seen[name].transpose(0, 1)
        expected = rows.mT @ rows / rows.shape[1]
        torch.testing.assert_close(moments.second, expected, rtol=1e-5, atol=1e-6)
    result = cp.quantize(model, [(x, y)], bits=2)
    assert not same_weights(model, result.model) and not result.plan.notes


def test_the_last_projection_of_attention_reads_what_attention_has_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x, found = torch.randn(3, 5, 8), {}

    def visit(layer, moments):
        found[layer.name] = moments()

    layers = find_layers(model)
    visit_layers(model, Classification(), (x, torch.zeros(3)), layers, visit)
    # Attention by hand, without its last projection.
    attention = model[0].self_attn
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
    rows = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(-1, 8).detach()
    second = found["0.self_attn.out_proj"].second[0]
    torch.testing.assert_close(second, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert (
        set(found)
        == set(layers)
        == {
            "0.self_attn.out_proj",
            "0.linear1",
            "0.linear2",
        }
    )


def test_a_weight_of_which_only_a_product_is_used_is_not_called_pruned():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            self.both = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.inner.weight * 2)
            return self.head(self.both(x)) + self.both.weight.sum(0)[:4]

    torch.manual_seed(0)
    model = Masked().eval()
    with pytest.warns(UserWarning, match=r"not known \(mul\)\): inner"):
        result = cp.prune(model, items(), sparsity=0.5)
    assert same_weights(model, result.model) == {"inner"}
    assert any("of both: sum" in note for note in result.plan.notes)
    with pytest.raises(ValueError, match="layer inner: its weight goes to a function"):
        cp.prune(model, items(), sparsity=0.5, layers="inner")


# ------------------------------------------------------------------------------ read several times


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(self.step(x))
        return self.head(F.linear(x[: len(x) // 2 + 1], self.step.weight).repeat(2, 1)[: len(x)])


def test_a_layer_that_is_read_several_times_has_the_moment_of_all_reads():
    torch.manual_seed(0)
    model = Loop().double().eval()
    x, found, seen = torch.randn(6, 8).double(), {}, []
    with torch.no_grad():
        hidden = model.first(x)
        for _ in range(2):
            seen.append(hidden)
            hidden = torch.tanh(model.step(hidden))
        seen.append(hidden[:4])
    rows = torch.cat(seen)

    def visit(layer, moments):
        found[layer.name] = moments()
        layer.write_(layer.as_matrix(layer.weight) * 0.5)

    visited = visit_layers(model, Classification(), (x, torch.zeros(6)), find_layers(model), visit)
    torch.testing.assert_close(found["step"].second[0], rows.T @ rows / len(rows))
    torch.testing.assert_close(found["step"].mean[0], rows.mean(0))
    assert found["step"].drift is None
    assert visited.repeated == ("step",) and not visited.again and not visited.unreached
    result = cp.quantize(Loop(), items(), bits=3)
    assert any("used several times" in note and "step" in note for note in result.plan.notes)
