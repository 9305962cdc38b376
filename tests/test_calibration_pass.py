"""The one forward pass: second moments against the layers' own inputs, order, masks, and sequential
replacement."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvprune.compression import coarse_copy, visit_layers
from curvprune.model import CausalLM, Classification, find_layers


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def collect(model, batch, layers, objective=None):
    moments, order = {}, []

    def visit(layer, moment):
        order.append(layer.name)
        moments[layer.name] = moment()

    visit_layers(model, objective or CausalLM(), batch, layers, visit)
    return moments, order


def test_second_moments_exclude_padding_and_are_shared_by_layers_with_one_input():
    model = llama()
    ids = torch.randint(0, 30, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch, layers = {"input_ids": ids, "attention_mask": mask}, find_layers(model)
    seen = inputs_of(model, batch, mask)
    moments, order = collect(model, batch, layers)
    assert len(order) == len(layers) == 15
    assert order[-1] == "model.embed_tokens", "tied: visited where it multiplies"
    for name, moment in moments.items():
        x = seen[name].double()
        torch.testing.assert_close(
            moment.second[0].double(), x.t() @ x / len(x), rtol=1e-5, atol=1e-6
        )
    q, k = (f"model.layers.0.self_attn.{n}_proj" for n in "qk")
    assert moments[q] is moments[k]
    assert moments[q] is not moments["model.layers.0.self_attn.o_proj"]


def test_later_layers_see_what_earlier_ones_became():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(20, 3)
    new = torch.randn(4, 3)
    moments = {}

    def visit(layer, moment):
        moments[layer.name] = moment()
        if layer.name == "0":
            layer.write_(new)

    visit_layers(
        model, Classification(), (x, torch.zeros(20, dtype=torch.long)), find_layers(model), visit
    )
    hidden = torch.relu(x @ new.t() + model[0].bias).detach()
    torch.testing.assert_close(moments["2"].second[0], hidden.t() @ hidden / 20)


def test_convolutions_do_not_share_moments_although_they_read_one_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Conv2d(2, 3, 3, padding=1, stride=2)
            self.a = nn.Conv2d(2, 4, 3, padding=1, groups=2)

        def forward(self, x):
            return self.a(x).mean((2, 3))[:, :3] + self.b(x).mean((2, 3))

    model, x = Two(), torch.randn(5, 2, 6, 6)
    layers = find_layers(model)
    moments, _ = collect(model, (x, torch.zeros(5, dtype=torch.long)), layers, Classification())
    for name in ("a", "b"):
        rows = layers[name].rows(layers[name].module, x)
        expected = rows.transpose(1, 2) @ rows / rows.shape[1]
        torch.testing.assert_close(moments[name].second, expected, rtol=1e-4, atol=1e-5)
    assert moments["a"].second.shape == (2, 9, 9) and moments["b"].second.shape == (1, 18, 18)


def test_the_pass_stops_before_the_last_layer_and_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Dropout(0.5))
    calls = []
    model[1].register_forward_hook(lambda module, given, output: calls.append(len(output)))
    model.train()
    collect(
        model,
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)),
        find_layers(model),
        Classification(),
    )
    assert calls == [1], "the last layer runs for the first item alone"
    assert model.training and model[2].training
    assert not model[0]._forward_pre_hooks and not model[1]._forward_pre_hooks


def test_lookup_embeddings_are_visited_without_a_moment_and_unreached_layers_are_named():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head, self.spare = nn.Embedding(5, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, ids):
            return self.head(self.table(ids).mean(1))

    model = Bag()
    batch = (torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]))
    moments, order = collect(model, batch, find_layers(model, ["table", "head"]), Classification())
    assert order == ["head", "table"] and moments["table"] is None
    with pytest.raises(ValueError, match=r"never reached 1 layer.*first spare"):
        collect(model, batch, find_layers(model), Classification())
    assert not model.head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_drift_is_the_difference_of_two_models_inputs(dtype):
    """Against both models' inputs, captured apart; padding does not count, layers with one input
    share its moments."""
    model = llama().to(dtype)
    reference = copy.deepcopy(model)
    ids = torch.randint(0, 30, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = {}

    def visit(layer, moments):
        found[layer.name] = moments()
        layer.write_(0.5 * layer.as_matrix(layer.weight.detach()))

    layers = find_layers(model, "model.layers.*")
    visit_layers(
        model, CausalLM(), batch, layers, visit, reference=(reference, find_layers(reference))
    )
    before, now = (inputs_of(m, batch, mask) for m in (reference, model))
    tolerance = 1e-6 if dtype == torch.float64 else 0.05  # bfloat16 products
    for name, moments in found.items():
        expected = (before[name] - now[name]).t() @ now[name] / int(mask.sum())
        if float(expected.abs().max()) == 0:
            assert moments.drift is None  # nothing before it has changed
        else:
            assert float((moments.drift[0] - expected).norm() / expected.norm()) < tolerance, name
    assert found["model.layers.0.self_attn.q_proj"].drift is None
    q, k = (f"model.layers.1.self_attn.{n}_proj" for n in "qk")
    assert found[q] is found[k] and found[q].drift is not None
    assert not [t for t in threading.enumerate() if t.name == "uncompressed model"]


def inputs_of(model, batch, mask):
    """The inputs of every layer that count, ``(tokens, in)``."""
    seen, handles = {}, []

    def keep(name, _, arguments):
        seen[name] = arguments[0][mask.bool()]

    for name, layer in find_layers(model).items():
        hook = functools.partial(keep, name)
        handles.append(layer.readers[0].register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


class Routed(nn.Module):
    """Sends the rows with a positive first feature through one expert, the others through a second
    one."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        up = h[:, 0] > 0
        out = h.new_zeros(len(h), 2)
        out[up] = self.a(h[up])
        out[~up] = self.b(h[~up])
        return out


def test_there_is_no_drift_where_a_router_sends_other_rows():
    torch.manual_seed(0)
    model = Routed().double()
    reference = copy.deepcopy(model)
    found = {}

    def visit(layer, moments):
        found[layer.name] = moments()
        if layer.name == "first":
            layer.module.bias.data[0] += 1.0

    batch = (torch.randn(20, 3, dtype=torch.float64), torch.zeros(20, dtype=torch.long))
    visit_layers(
        model,
        Classification(),
        batch,
        find_layers(model),
        visit,
        reference=(reference, find_layers(reference)),
    )
    assert all(moments.drift is None for moments in found.values()) and set(found) == {
        "first",
        "a",
        "b",
    }


def test_a_failing_visit_ends_the_pass_beside_it():
    model = llama()
    reference = copy.deepcopy(model)

    def visit(layer, moments):
        raise KeyError(layer.name)

    batch = {"input_ids": torch.randint(0, 30, (2, 4))}
    with pytest.raises(KeyError):
        visit_layers(
            model,
            CausalLM(),
            batch,
            find_layers(model),
            visit,
            reference=(reference, find_layers(reference)),
        )
    assert not [t for t in threading.enumerate() if t.name == "uncompressed model"]
    assert not any(m._forward_pre_hooks for m in (*reference.modules(), *model.modules()))


def test_a_gram_matrix_of_several_blocks_is_whole_and_symmetric():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(500, 3, dtype=torch.float64)),
        torch.randn(70, 500, dtype=torch.float64),
    )
    moments, _ = collect(
        model, (x, torch.zeros(70, dtype=torch.long)), find_layers(model), Classification()
    )
    torch.testing.assert_close(moments["0"].second[0], x.t() @ x / 70, rtol=1e-12, atol=1e-12)


def test_products_in_eight_bits_are_those_of_slightly_noisy_inputs():
    """Against float64: of the second moments nothing is off by more than n / 193,548, and of usual
    columns, whose noise is a twelfth of (4/127)^2, by no more than four standard errors of twice
    its mean product with n inputs."""
    torch.manual_seed(0)
    n, width = 4096, 260
    x = torch.randn(n, width) @ (torch.eye(width) + 0.3 * torch.randn(width, width))
    x[7, 3], x[:, 5] = 1e4, 0  # one token that outweighs all others; a dead input
    model, others = nn.Sequential(nn.Linear(width, 3)), x.double()
    moments, _ = collect(
        model, (x, torch.zeros(n, dtype=torch.long)), find_layers(model), Classification()
    )
    exact, found = others.t() @ others / n, moments["0"].second[0].double()
    size = exact.diagonal().clamp_min(1e-30).sqrt()
    error = (found - exact) / size / size[:, None]
    usual = torch.ones(width, dtype=torch.bool)
    usual[[3, 5]] = False
    assert float(error[usual][:, usual].abs().max()) < 4 * 2 * (4 / 127) / (12 * n) ** 0.5
    assert float(error.abs().max()) < n / 193548
    assert float(found[5].abs().max()) == 0
    torch.testing.assert_close(found, found.t(), rtol=1e-6, atol=0)


def test_a_drift_in_eight_bits_is_that_of_slightly_noisy_inputs():
    """Against float64 and the inputs that both models really had; it is not symmetric."""
    torch.manual_seed(0)
    n, width = 4096, 260
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(width))
    read = {}
    for name, net in (("now", model), ("before", reference)):
        net[1].register_forward_pre_hook(lambda _, a, name=name: read.__setitem__(name, a[0]))
    moments, x = {}, torch.randn(n, width)
    x[7, 3], x[:, 5] = 1e3, 0
    visit_layers(
        model,
        Classification(),
        (x, torch.zeros(n, dtype=torch.long)),
        find_layers(model),
        lambda layer, of_inputs: moments.__setitem__(layer.name, of_inputs()),
        reference=(reference, find_layers(reference)),
    )
    now, moved = read["now"].double(), read["before"].double() - read["now"].double()
    exact = moved.t() @ now / n
    sizes = [t.square().mean(0).clamp_min(1e-30).sqrt() for t in (moved, now)]
    error = (moments["1"].drift[0].double() - exact) / sizes[0][:, None] / sizes[1]
    assert float(error.abs().max()) < n / 193548
    asymmetry = (exact - exact.t()) / sizes[0][:, None] / sizes[1]
    assert float(asymmetry.abs().max()) > 10 * n / 193548


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_in_eight_bits_do_not_hide_what_is_not_finite(bad):
    x = torch.randn(20, 300)
    x[3, 4] = bad
    model = nn.Sequential(nn.Linear(300, 2))
    moments, _ = collect(
        model, (x, torch.zeros(20, dtype=torch.long)), find_layers(model), Classification()
    )
    assert not bool(moments["0"].second[0, 4].isfinite().any())


class NoHalf(nn.Module):
    """Has an operation that refuses bfloat16, or everything from the second model on."""

    def __init__(self, always=False):
        super().__init__()
        self.first, self.second, self.always = nn.Linear(3, 3), nn.Linear(3, 2), always

    def forward(self, x):
        h = self.first(x)
        if h.dtype == torch.bfloat16 or self.always:
            raise RuntimeError("not implemented for this type")
        return self.second(h)


def test_a_model_without_bfloat16_runs_beside_in_its_own_type_and_other_failures_are_told():
    torch.manual_seed(0)
    model, x = NoHalf(), torch.randn(20, 3)
    reference = copy.deepcopy(model)
    batch = (x, torch.zeros(20, dtype=torch.long))
    found = {}

    def visit(layer, moments):
        found[layer.name] = moments()
        layer.write_(0.5 * layer.as_matrix(layer.weight.detach()))

    layers = find_layers(model)
    visit_layers(
        model, Classification(), batch, layers, visit, reference=(reference, find_layers(reference))
    )
    with torch.no_grad():
        before, now = reference.first(x), model.first(x)
    expected = (before - now).t() @ now / 20
    assert float((found["second"].drift[0] - expected).norm() / expected.norm()) < 0.02
    reference.always = True
    with pytest.raises(
        RuntimeError, match="uncompressed model failed before layer second: not implemented"
    ):
        visit_layers(
            model,
            Classification(),
            batch,
            layers,
            visit,
            reference=(reference, find_layers(reference)),
        )


def test_the_copy_beside_a_model_that_is_overwritten_holds_its_own_weights_and_shares_the_rest():
    model = llama()  # its embedding is tied: looked up as well as multiplied
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    layers = find_layers(model, ["model.embed_tokens", "*.q_proj", "*.down_proj"])
    original = coarse_copy(model, layers)
    for layer in layers.values():
        layer.write_(torch.zeros(layer.shape))
    for name, weight in original.named_parameters():
        own = name.removesuffix(".weight") in layers
        assert own or weight is model.get_parameter(name)
        multiplied = own and name != "model.embed_tokens.weight"
        assert weight.dtype == (torch.bfloat16 if multiplied else torch.float32)
        assert torch.equal(weight, kept[name].to(weight.dtype))
    assert original.lm_head.weight is original.model.embed_tokens.weight
    wide = coarse_copy(model.double(), find_layers(model, "*.q_proj"))
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
