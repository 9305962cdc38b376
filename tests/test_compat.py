"""What curvprune relies on in private names of torch, transformers and compressed-tensors: a
release that changes one fails here first."""

from __future__ import annotations

import io
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts
from transformers.utils import logging

import curvprune as cp
from curvprune import compat
from tests import tiny


def integers(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


# ---------------------------------------------------------------------------------- torch: products


def test_a_product_of_bytes_is_exact_and_has_32_bits():
    a, b = integers(40, 600, seed=0), integers(600, 24, seed=1)
    found = compat.int8_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long())


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_linear_of_bytes_is_that_of_the_unpacked_weight(rows):
    codes, scale = integers(24, 64, seed=0), torch.rand(24) + 0.5
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))
    expected = (x.double() @ (codes.double() * scale[:, None].double()).t()).float()
    found = compat.int8_linear(x, codes, scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("outputs", "width", "group"), [(80, 256, 64), (16, 32, 32), (48, 512, 256)]
)
def test_a_linear_of_four_bits_is_that_of_the_unpacked_weight(outputs, width, group):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (outputs, width), generator=generator).to(torch.int8)
    pair = torch.randn(width // group, outputs, 2, generator=generator).bfloat16()
    scale, zero = pair.double().permute(2, 1, 0).repeat_interleave(group, dim=2)
    found = compat.int4_linear(
        torch.eye(width).bfloat16(), compat.int4_packed(codes), group, pair.contiguous()
    )
    assert torch.equal(found, (codes.double() * scale + zero).t().bfloat16())


def test_what_the_processor_is_fast_at_is_known():
    assert isinstance(compat.multiplies_bytes_fast(), bool)
    assert isinstance(compat.multiplies_bfloat16_fast("cpu"), bool)
    assert not compat.multiplies_bfloat16_fast("meta")
    if not torch.cuda.is_available():
        assert not compat.multiplies_bfloat16_fast("cuda")


def test_writing_in_place_is_counted_and_reading_is_not():
    x = torch.zeros(3)
    before = compat.times_written(x)
    assert float(x.sum() + (x + 1).sum()) == 3
    assert compat.times_written(x) == before
    x[0] = 1
    assert compat.times_written(x) > before


# -------------------------------------------------------------------------- torch: autograd's graph


def test_operations_of_the_graph_have_the_names_that_the_analysis_knows():
    x = torch.randn(2, 3, requires_grad=True)
    weight, bias = torch.randn(4, 3), torch.randn(4)
    named = {
        "Addmm": F.linear(x, weight, bias),
        "Mm": x @ weight.t(),
        "Bmm": torch.bmm(x[None], weight.t()[None]),
        "Mul": x * x,
        "Div": x / 2,
        "View": x.view(6),
        "UnsafeView": F.linear(x[None], weight),
        "Clone": x.clone(),
        "ToCopy": x.double(),
        "Convolution": F.conv1d(x[None], torch.randn(2, 2, 1)),
        "NativeBatchNorm": F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
        "Relu": x.relu(),
    }
    assert {name: compat.operation_of(y.grad_fn) for name, y in named.items()} == {
        name: name for name in named
    }


def test_a_batch_norm_knows_whether_it_looked_at_its_batch():
    x, norm = torch.randn(5, 3, requires_grad=True), nn.BatchNorm1d(3)
    assert compat.normalises_by_batch(norm(x).grad_fn)
    assert not compat.normalises_by_batch(norm.eval()(x).grad_fn)


# -------------------------------------------------------------------- transformers: stacked experts

MIXTRAL = MixtralConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=3,
)


def test_stacked_experts_are_told_by_what_transformers_gives_them():
    gated = MixtralExperts(MIXTRAL)
    assert compat.is_stacked_experts(gated)
    assert (gated.has_gate, gated.has_bias, gated.is_transposed) == (True, False, False)
    config = NemotronHConfig(hidden_size=8, n_routed_experts=4, moe_intermediate_size=5)
    plain = NemotronHExperts(config)
    assert compat.is_stacked_experts(plain) and not plain.has_gate
    assert not compat.is_stacked_experts(nn.Linear(2, 2))
    rows = torch.randn(5, 24)
    gate, up = rows.chunk(2, dim=1)
    torch.testing.assert_close(compat.activate_experts(gated, rows), F.silu(gate) * up)
    torch.testing.assert_close(compat.activate_experts(plain, rows), rows.relu().square())


def test_experts_run_one_by_one_for_a_while():
    model: Any = compat.model_from_config(MixtralForCausalLM, MIXTRAL, torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    experts = model.model.layers[0].mlp.experts
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with compat.experts_one_by_one(model):
            # The other implementations have no float64.
            x, shares = torch.randn(2, 8).double(), torch.ones(2, 1).double()
            assert experts.double()(x, torch.zeros(2, 1).long(), shares).dtype == torch.float64
            experts.float()
            torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(RuntimeError, match="boom"), compat.experts_one_by_one(model):
        assert model.config._experts_implementation == "eager"
        raise RuntimeError("boom")
    assert model.config._experts_implementation == "grouped_mm"


# ------------------------------------------------------------------ transformers: building, loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_a_config_has_the_type_that_is_asked_for(dtype):
    model = compat.model_from_config(LlamaForCausalLM, tiny.llama().config, dtype)
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_plain_config_forgets_where_it_comes_from():
    config = tiny.llama().config
    config._name_or_path, config.quantization_config = "somewhere", {"quant_method": "gguf"}
    plain = compat.plain_config(config)
    assert type(plain) is type(config) and plain.hidden_size == config.hidden_size
    assert plain._name_or_path != "somewhere" and not hasattr(plain, "quantization_config")
    assert config._name_or_path == "somewhere"


def test_transformers_says_what_a_folder_lacks_and_reads_no_numbers():
    model = tiny.llama()
    config = {**model.config.to_diff_dict(), "dtype": "float32"}
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    before = torch.random.get_rng_state()
    read, problems = compat.read_by_transformers(type(model), config, tensors, empty=True)
    assert problems == [] and {p.device.type for p in read.parameters()} == {"meta"}
    # What is missing would be drawn at random; what is left over would be forgotten.
    tensors["model.nrom.weight"] = tensors.pop("model.norm.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.empty(47, 32, device="meta")
    _, problems = compat.read_by_transformers(type(model), config, tensors, empty=True)
    assert problems == [
        "missing keys: model.norm.weight",
        "unexpected keys: model.nrom.weight",
        "mismatched keys: model.layers.0.mlp.up_proj.weight",
    ]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_parts_of_a_composite_model_are_initialised_by_their_own_classes():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    owners = compat.initialized_by(model)
    assert owners["lm_head"] is T5ForConditionalGeneration
    assert owners["encoder.block.0.layer.0.SelfAttention.q"] is type(model.encoder)


def test_a_model_read_packed_becomes_an_ordinary_one(tmp_path):
    model = tiny.llama(layers=1)
    batch = {"input_ids": torch.arange(8)[None]}
    result = cp.quantize(model, [batch], bits=4, layers="model.layers.*")
    result.save(tmp_path)
    read = LlamaForCausalLM.from_pretrained(tmp_path)
    assert read.config.quantization_config is not None
    compat.decompress_(read)
    assert not hasattr(read.config, "quantization_config")
    expected = result.model.state_dict()
    found = read.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # It runs where it is moved to, not where it was read.
    assert read.to("meta")(input_ids=batch["input_ids"].to("meta")).logits.device.type == "meta"


# ------------------------------------------------------------------------------------ Progress bars


def bars() -> tuple[str, str]:
    """What tqdm itself and transformers write for a bar each."""
    found = []
    for draw in (tqdm, logging.tqdm):
        out = io.StringIO()
        for _ in draw(range(3), desc="Applying quantization config", file=out):
            pass
        found.append(out.getvalue())
    return found[0], found[1]


def test_libraries_are_quiet_for_a_while():
    assert all("Applying" in text for text in bars())
    with compat.quiet_libraries():
        assert bars() == ("", "")
        with compat.quiet_libraries():
            assert bars() == ("", "")
        assert bars() == ("", "")
    assert all("Applying" in text for text in bars())
    with pytest.raises(RuntimeError, match="boom"), compat.quiet_libraries():
        raise RuntimeError("boom")
    assert all("Applying" in text for text in bars())


def test_loading_and_exporting_draw_no_bars(tmp_path, capfd):
    batch = {"input_ids": torch.arange(8)[None]}
    cp.quantize(tiny.llama(layers=1), [batch], bits=4).save(tmp_path / "saved")
    capfd.readouterr()
    LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert "Applying quantization config" in capfd.readouterr().err, "a bar that we must silence"
    cp.load(tmp_path / "saved")
    cp.export_dense(tmp_path / "saved", tmp_path / "dense")
    assert "it/s" not in capfd.readouterr().err


def test_checkpoints_and_compiled_modules_run_as_they_are_written():
    called = []

    def squared(x: torch.Tensor) -> torch.Tensor:
        called.append(1)
        return x * x

    x = torch.ones(3, requires_grad=True)
    for reentrant in (True, False):
        called.clear()
        with compat.running_eagerly():
            checkpoint(squared, x, use_reentrant=reentrant).sum().backward()
        assert len(called) == 1
        # Outside of it the function runs once more for the backward pass.
        called.clear()
        checkpoint(squared, x, use_reentrant=reentrant).sum().backward()
        assert len(called) == 2


def test_the_inside_of_a_compiled_module_is_found():
    model = nn.Linear(2, 2)
    assert compat.inside_of_compiled(torch.compile(model)) is model
    assert compat.inside_of_compiled(model) is None


def test_a_recurrent_module_lets_go_of_weights_that_it_ran_with():
    module = nn.LSTM(2, 3)
    compat.keep_unflattened_(module)
    own = module.weight_hh_l0
    other = torch.zeros(12, 3)
    gone = weakref.ref(other)
    torch.func.functional_call(module, {"weight_hh_l0": other}, (torch.ones(1, 1, 2),))
    del other
    assert gone() is not None
    compat.forget_weights_(module)
    assert gone() is None and module.weight_hh_l0 is own


def test_hooks_that_others_leave_on_a_model_are_taken_off():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("ours"))
    with pytest.raises(KeyError), compat.hooks_kept(model):
        model[0].register_forward_hook(lambda *_: calls.append("theirs"))
        raise KeyError
    model(torch.zeros(1, 2))
    assert calls == ["ours"]
