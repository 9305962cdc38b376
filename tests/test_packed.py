"""Weights that stay packed in memory, against the unpacked ones."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import curvprune as cp
from curvprune.artifact import PackedWeight
from curvprune.compression import solve
from curvprune.options import Quantize
from tests import tiny
from tests.test_artifact import batches, bytes_held


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric"), [(None, True), (3, False), (4, False), (5, True), (20, True)]
)
def test_packed_weights_are_the_unpacked_ones(bits, group_size, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator)  # an odd number of inputs
    quantize = Quantize(bits=bits, group_size=group_size, symmetric=symmetric)
    solved = solve(weight, [quantize], layer="a")[0]
    held = PackedWeight(solved.codes, solved.scale, solved.zero, quantize, torch.float32)
    assert torch.equal(held.rows(), solved.weight)
    assert torch.equal(held.rows(torch.tensor([4, 0, 4])), solved.weight[[4, 0, 4]])
    stored = held.codes.numel() * held.codes.element_size()
    assert stored == (6 * 5 if bits <= 4 else 6 * 9)


def kinds_of_models() -> list[tuple]:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 8))
    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    convnext = ConvNextConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=5, image_size=32
    )
    return [
        ("tied llama", LlamaForCausalLM(llama), {"input_ids": ids}, 8),
        ("gpt2", GPT2LMHeadModel(gpt2), {"input_ids": ids}, 4),
        (
            "convnext",
            ConvNextForImageClassification(convnext),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
            4,
        ),
    ]


@pytest.mark.parametrize("case", kinds_of_models(), ids=lambda case: case[0])
def test_a_packed_load_gives_the_outputs_of_an_unpacked_one_in_less_memory(case, tmp_path):
    _, model, batch, bits = case
    model.eval()
    result = cp.quantize(
        model, [batch], bits=bits, objective="label-free", settings=cp.Settings(portable=False)
    )
    result.save(tmp_path)
    dense, packed = cp.load(tmp_path), cp.load(tmp_path, packed=True)
    with torch.no_grad():
        torch.testing.assert_close(
            packed(**batch).logits, dense(**batch).logits, rtol=1e-5, atol=1e-6
        )
        few = {name: tensor[:1] for name, tensor in batch.items()}
        if "input_ids" in few:
            few["input_ids"] = few["input_ids"][:, :1]  # the int8 kernel
        torch.testing.assert_close(packed(**few).logits, dense(**few).logits, rtol=1e-4, atol=1e-5)

    assert bytes_held(packed) < 0.5 * bytes_held(dense)
    if "input_ids" in batch:
        start = batch["input_ids"][:, :4]
        generated = [
            m.generate(start, max_new_tokens=3, do_sample=False, pad_token_id=0)
            for m in (dense, packed)
        ]
        assert torch.equal(*generated)


def test_convolutions_that_share_a_weight_stay_packed_together(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten()
    )
    model[2].weight = model[0].weight
    x = torch.randn(4, 3, 2, 2)
    result = cp.quantize(model, [(x, torch.zeros(4, dtype=torch.long))], bits=4)
    result.save(tmp_path)
    fresh = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten()
    )
    fresh[2].weight = fresh[0].weight
    packed = cp.load(tmp_path, model=fresh, packed=True)
    assert packed[0].packed is packed[2].packed
    with torch.no_grad():
        torch.testing.assert_close(packed(x), result.model.eval()(x))


def test_a_portable_folder_loads_packed_as_well(tmp_path):
    model = tiny.llama(tied=False)
    (batch,) = batches(1)
    cp.quantize(model, [batch], bits=3, group_size=16, symmetric=False).save(tmp_path)
    dense, packed = cp.load(tmp_path), cp.load(tmp_path, packed=True)
    assert not hasattr(packed.config, "quantization_config") and hasattr(packed.lm_head, "packed")
    with torch.no_grad():
        torch.testing.assert_close(
            packed(**batch).logits, dense(**batch).logits, rtol=1e-5, atol=1e-6
        )


def saved_net(folder, *, bits, group_size, symmetric, dtype=torch.bfloat16):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 5)).to(dtype).eval()
    data = [(torch.randn(8, 64).to(dtype), torch.zeros(8, dtype=torch.long))]
    result = cp.quantize(
        net, data, bits=bits, group_size=group_size, symmetric=symmetric, layers="0"
    )
    result.save(folder)
    return net


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_kernel_multiplies_by_the_weights_of_a_dense_load(
    bits, group_size, symmetric, tmp_path
):
    net = saved_net(tmp_path, bits=bits, group_size=group_size, symmetric=symmetric)
    dense = cp.load(tmp_path, model=copy.deepcopy(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = cp.load(tmp_path, model=copy.deepcopy(net), packed=True)
    layer, weight = packed[0], dense[0].weight
    assert torch.equal(layer.weight, weight)
    for shape in [(64,), (1, 64), (2, 3, 64), (0, 64), (100, 64)]:
        x = torch.randn(shape).bfloat16()
        with torch.no_grad():
            found = layer(x)
        expected = x.double() @ weight.double().t() + dense[0].bias.double()
        assert found.shape == expected.shape and found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2**-6)
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(2, -1), rtol=0.02, atol=0.02)
    assert torch.equal(copy.deepcopy(packed)[0].weight, weight)
    assert torch.equal(packed.float()[0].weight, weight.float())
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_layers_without_a_kernel_are_named_once(tmp_path):
    net = saved_net(tmp_path, bits=4, group_size=32, symmetric=True, dtype=torch.float32)
    with pytest.warns(UserWarning, match="0 unpack whenever they run") as notes:
        cp.load(tmp_path, model=copy.deepcopy(net), packed=True)
    assert len(notes) == 1
    packed = cp.load(tmp_path, model=copy.deepcopy(net), packed=True, dtype="bfloat16")
    assert packed(torch.randn(1, 64).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='int9' is no floating-point type"):
        cp.load(tmp_path, model=net, dtype="int9")
