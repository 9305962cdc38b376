"""Layers as matrices: reading, writing, and inputs as rows, against the modules' own forward
pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from curvprune.model import computed_weights, find_layers, left_over

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    nn.Conv2d(4, 6, 3, padding="valid"),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"),
    nn.Conv2d(4, 6, 2, padding="same", padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2),
    nn.Conv1d(4, 6, 4, padding="same"),
    nn.Conv1d(4, 6, 3, groups=2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolution_is_its_matrix_times_its_rows(conv):
    model = nn.Sequential(conv)
    layer = find_layers(model)["0"]
    x = torch.randn(3, 4, 9) if isinstance(conv, nn.Conv1d) else torch.randn(3, 4, 9, 8)
    rows = layer.rows(conv, x)
    weight = layer.as_matrix(conv.weight).reshape(layer.groups, -1, layer.shape[1])
    output = torch.einsum("goi,gni->gno", weight, rows)
    own = (
        (conv(x) - conv.bias.reshape(1, -1, *[1] * (x.ndim - 2)))
        .movedim(1, -1)
        .reshape(-1, conv.out_channels)
    )
    torch.testing.assert_close(
        output.movedim(0, 1).reshape(-1, conv.out_channels), own, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "module", [nn.Linear(5, 3), Conv1D(3, 5), nn.Embedding(7, 4), *CONVOLUTIONS[:2]], ids=str
)
def test_writing_a_matrix_reads_back(module):
    layer = find_layers(nn.Sequential(module))["0"]
    matrix = torch.randn(layer.shape)
    layer.write_(matrix)
    torch.testing.assert_close(layer.as_matrix(module.weight), matrix)
    if isinstance(module, (nn.Linear, Conv1D)):
        x = torch.randn(2, 6, 5)
        torch.testing.assert_close(module(x) - module.bias, x @ matrix.t(), rtol=1e-4, atol=1e-5)
        assert layer.rows(module, x).shape == (1, 12, 5)


def test_tied_weights_are_one_layer():
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    config.tie_word_embeddings = True
    layers = find_layers(LlamaForCausalLM(config))
    assert layers["model.embed_tokens"].aliases == ("lm_head",)
    assert layers["model.embed_tokens"].kind == "embedding"
    assert len(layers["model.embed_tokens"].readers) == 1
    assert "lm_head" not in layers and len(layers) == 8
    assert list(find_layers(LlamaForCausalLM(config), "lm_head")) == ["model.embed_tokens"]


def test_transformers_conv1d_is_found_as_out_by_in():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=6))
    layers = find_layers(model, "transformer.h.*")
    assert layers["transformer.h.0.attn.c_attn"].shape == (24, 8)
    assert layers["transformer.h.0.attn.c_attn"].kind == "conv1d"


def test_a_glob_without_a_match_names_the_nearest_layer():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"'encodr' matches none of the 2 .* nearest layer is 'encoder'"
    ):
        find_layers(model, ["decoder", "encodr"])
    with pytest.raises(ValueError, match="no compressible layers"):
        find_layers(nn.ReLU())


TRANSPOSED = [
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1, output_padding=2, dilation=2, groups=2),
    nn.ConvTranspose1d(4, 6, 2, padding=3, dilation=2),  # the border of the output is cut off
    nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
    nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4),
    nn.ConvTranspose3d(4, 6, (1, 2, 3), stride=(1, 2, 2), padding=(0, 1, 0), groups=2),
]
SOLID = [
    nn.Conv3d(4, 6, 3, padding=1),
    nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), dilation=(1, 1, 2), groups=2),
    nn.Conv3d(4, 4, 3, padding=2, padding_mode="circular", groups=4),
    nn.Conv3d(4, 6, 2, padding="same", padding_mode="replicate"),
]


@pytest.mark.parametrize("conv", [*TRANSPOSED, *SOLID], ids=str)
def test_transposed_and_solid_convolutions_are_their_matrix_times_their_rows(conv):
    conv = copy.deepcopy(conv).double()
    layer = find_layers(nn.Sequential(conv))["0"]
    x = torch.randn(2, 4, *(5, 6, 7)[: conv.weight.ndim - 2], dtype=torch.float64)
    rows = layer.rows(conv, x)
    weight = layer.as_matrix(conv.weight).reshape(layer.groups, -1, layer.shape[1])
    output = torch.einsum("goi,gni->gno", weight, rows).movedim(0, 1).flatten(1)
    own = conv(x).movedim(1, -1) - conv.bias
    torch.testing.assert_close(output, own.flatten(0, -2))
    # One item without its dimension has the same rows.
    torch.testing.assert_close(layer.rows(conv, x[0]), layer.rows(conv, x[:1]))
    assert torch.equal(layer.from_matrix(layer.as_matrix(conv.weight)), conv.weight)
    matrix = torch.randn(layer.shape, dtype=torch.float64)
    assert torch.equal(layer.as_matrix(layer.from_matrix(matrix)), matrix)


def test_a_lazy_layer_says_what_to_do_first():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="layer 0: its LazyLinear has no size yet; run the model"):
        find_layers(model)
    model(torch.randn(2, 5))
    assert find_layers(model)["0"].shape == (3, 5)


def test_a_bilinear_weight_is_told_of_as_left_over():
    model = nn.Sequential(nn.Bilinear(4, 4, 6), nn.Linear(6, 2))
    assert list(find_layers(model)) == ["1"]
    assert "0.weight" in (left_over(model) or "")


def test_excluded_layers_are_left_out_under_any_of_their_names():
    model = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 3)})
    model["c"].weight = model["a"].weight
    assert list(find_layers(model, exclude="b")) == ["a"]
    assert list(find_layers(model, ["*"], exclude=["c"])) == ["b"]
    assert not find_layers(model, "b", exclude=["?"])
    with pytest.raises(ValueError, match=r"exclude='d\*' matches none of the 2 .* nearest layer"):
        find_layers(model, exclude=["b", "d*"])


def test_weights_that_are_computed_are_no_layers_and_refused_by_name_alone():
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    pruned = l1_unstructured(nn.Linear(2, 2), "weight", amount=0.5)
    old = torch.nn.utils.spectral_norm(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "n": normed, "p": pruned, "s": old})
    assert list(find_layers(model)) == ["a"]
    assert computed_weights(model) == ["n", "p", "s"]
    assert list(find_layers(model, exclude="n")) == ["a"]
    for glob in ("n", "[np]", ["a", "s"]):
        with pytest.raises(ValueError, match=r"layer [ns]: its weight is not a parameter"):
            find_layers(model, glob)
