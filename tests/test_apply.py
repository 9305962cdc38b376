"""The one forward pass: second moments against the layers' own inputs, order, masks, and sequential replacement."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvprune.apply import visit_layers
from curvprune.layers import find_layers
from curvprune.objective import CausalLM, Classification


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
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
    seen = {}
    layers = find_layers(model)
    handles = [
        layer.readers[0].register_forward_pre_hook(lambda m, a, n=n: seen.__setitem__(n, a[0][mask.bool()]))
        for n, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    moments, order = collect(model, {"input_ids": ids, "attention_mask": mask}, layers)
    assert order[-1] == "model.embed_tokens" and len(order) == len(layers) == 15  # tied: visited where it multiplies
    for name, moment in moments.items():
        x = seen[name].double()
        torch.testing.assert_close(moment[0].double(), x.t() @ x / len(x), rtol=1e-5, atol=1e-6)
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

    visit_layers(model, Classification(), (x, torch.zeros(20, dtype=torch.long)), find_layers(model), visit)
    hidden = torch.relu(x @ new.t() + model[0].bias).detach()
    torch.testing.assert_close(moments["2"][0], hidden.t() @ hidden / 20)


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
        torch.testing.assert_close(moments[name], expected, rtol=1e-4, atol=1e-5)
    assert moments["a"].shape == (2, 9, 9) and moments["b"].shape == (1, 18, 18)


def test_the_pass_stops_before_the_last_layer_and_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Dropout(0.5))
    calls = []
    model[1].register_forward_hook(lambda *a: calls.append("last layer ran"))
    model.train()
    collect(model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), find_layers(model), Classification())
    assert not calls
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
