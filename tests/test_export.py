"""The GPTQ export against an unpacking of its own, bit by bit, and against GPTQModel where that is
installed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import curvprune as cp
from curvprune.cli import app
from tests import tiny

GRIDS = [
    *[cp.Quantize(bits=bits) for bits in (2, 3, 4, 8)],
    *[cp.Quantize(bits=bits, group_size=32, symmetric=False) for bits in (2, 3, 4, 8)],
    cp.Quantize(bits=4, group_size=32),
    cp.Quantize(bits=4, symmetric=False),
]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(dtype: torch.dtype = torch.float16) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        attention_bias=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(dtype)


DATA = [{"input_ids": torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))}]


def bits_of(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned codes along an axis of int32 words: code i is bits ``i * bits`` to ``(i + 1) * bits
    - 1`` of the words read as one long little-endian number."""
    words = np.moveaxis(words, axis, 0).view(np.uint32).astype(np.uint64)
    stream = np.stack([(words >> np.uint64(b)) & np.uint64(1) for b in range(32)], axis=1)
    stream = stream.reshape(-1, bits, *words.shape[1:])
    codes = sum(stream[:, b] << np.uint64(b) for b in range(bits))
    return np.moveaxis(np.asarray(codes).astype(np.int64), 0, axis)


def unpacked(tensors: dict[str, torch.Tensor], name: str, bits: int) -> np.ndarray:
    """The weight ``(out, in)`` of a layer, by the formula of the format's version 2."""
    codes = bits_of(tensors[f"{name}.qweight"].numpy(), bits, 0)  # (in, out)
    zeros = bits_of(tensors[f"{name}.qzeros"].numpy(), bits, 1)  # (groups, out)
    group = tensors[f"{name}.g_idx"].numpy()
    scales = tensors[f"{name}.scales"].numpy().astype(np.float32)
    return ((codes - zeros[group]) * scales[group]).T


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.key)
def test_what_is_exported_unpacks_to_the_weights_of_the_artifact(grid, tmp_path):
    result = cp.compress(llama(), DATA, options=[grid])
    result.save(tmp_path / "saved", tokenizer=tiny.byte_tokenizer())
    out = cp.export_gptq(tmp_path / "saved", tmp_path / "gptq")
    tensors, held = load_file(out / "model.safetensors"), result.model.state_dict()
    count = 0
    for name, weight in held.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(LINEAR) and name.endswith(".weight"):
            found = torch.from_numpy(unpacked(tensors, layer, grid.bits))
            assert torch.equal(found.to(torch.float16), weight), name
            groups = 1 if grid.group_size is None else weight.shape[1] // grid.group_size
            assert tensors[f"{layer}.scales"].shape == (groups, weight.shape[0])
            count += 1
        else:
            assert torch.equal(tensors[name], weight), name
    assert count == 7 and len(tensors) == len(held) + 3 * count
    settings = json.loads((out / "quantize_config.json").read_text())
    assert json.loads((out / "config.json").read_text())["quantization_config"] == settings
    assert settings["checkpoint_format"] == "gptq_v2" and settings["bits"] == grid.bits
    assert (settings["group_size"], settings["sym"]) == (grid.group_size or -1, grid.symmetric)
    assert (out / "tokenizer.json").is_file() and not (out / "curvprune.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.key)
def test_gptqmodel_reads_it(grid, dtype, tmp_path):
    gptqmodel = pytest.importorskip(
        "gptqmodel", reason="pip install gptqmodel: it asks for a newer torch than ours"
    )
    result = cp.compress(llama(dtype), DATA, options=[grid])
    result.save(tmp_path / "saved", tokenizer=tiny.byte_tokenizer())
    out = cp.export_gptq(tmp_path / "saved", tmp_path / "gptq")
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    theirs = gptqmodel.GPTQModel.load(str(out), backend=backend, device="cpu", dtype=dtype).model
    weights, count = result.model.state_dict(), 0
    for name, module in theirs.named_modules():
        if hasattr(module, "qweight"):
            found = type(module).dequantize_weight(module).T
            assert torch.equal(found.to(dtype), weights[f"{name}.weight"]), name
            count += 1
    assert count == 7


def test_an_artifact_that_is_not_portable_is_exported_too(tmp_path):
    result = cp.quantize(
        llama(torch.float32), DATA, bits=4, group_size=32, settings=cp.Settings(portable=False)
    )
    result.save(tmp_path / "saved")
    cp.export_gptq(tmp_path / "saved", tmp_path / "gptq")
    tensors, weights = load_file(tmp_path / "gptq" / "model.safetensors"), result.model.state_dict()
    assert torch.equal(tensors["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(torch.from_numpy(unpacked(tensors, name, 4)), weights[f"{name}.weight"])


def mixed(folder):
    result = cp.quantize(llama(), DATA, bits=4, layers="*_proj")
    result.solved.update(
        cp.quantize(result.model, DATA, bits=3, layers="*.q_proj", inplace=True).solved
    )
    result.save(folder)


def some_kept(folder):
    cp.quantize(llama(), DATA, bits=4, layers=["*.q_proj", "*.k_proj", "*.v_proj"]).save(folder)


def none_rounded(folder):
    cp.prune(llama(), DATA, sparsity=0.5).save(folder)


def five_bits(folder):
    cp.quantize(llama(), DATA, bits=5).save(folder)


def odd_shape(folder):
    cp.quantize(tiny.llama(), DATA, bits=3).save(folder)


def ragged(folder):
    cp.quantize(llama(), DATA, bits=4, group_size=48, settings=cp.Settings(portable=False)).save(
        folder
    )


def experts(folder):
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    cp.quantize(MixtralForCausalLM(config).eval(), DATA, bits=4, layers="*_proj").save(folder)


def other_shapes(folder):
    """Layers of two widths in one model, as structured pruning leaves them."""
    pytest.importorskip("torch_pruning")
    model = cp.prune(
        tiny.llama(), DATA, structured=cp.Structured(share=0.15, kinds=("mlp",), round_to=8)
    ).model
    assert len({m.mlp.up_proj.out_features for m in model.model.layers}) == 2
    cp.quantize(model, DATA, bits=4).save(folder)


def foreign(folder):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    data = [(torch.randn(8, 32), torch.zeros(8, dtype=torch.long))]
    cp.quantize(model, data, bits=4).save(folder)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            mixed,
            r"6 have int4-pc-sym, but not model\.layers\.0\.self_attn\.q_proj \(int3-pc-sym\); "
            "compress with one",
        ),
        (
            some_kept,
            r"3 have int4-pc-sym, but not .*o_proj \(not rounded\), .*down_proj \(not rounded\)",
        ),
        (none_rounded, "none of the 7 Linear layers in its blocks is rounded"),
        (five_bits, "2, 3, 4 or 8 bits, not 5; nearest: 4"),
        (odd_shape, r"k_proj: GPTQ's layout at 3 bits needs .* multiples of 32; it is 16 x 32"),
        (ragged, r"q_proj: .*whole groups of 48 inputs; it is 64 x 64"),
        (
            experts,
            r"no stacked experts, .*layers\.0\.mlp\.experts\.gate_up_proj, .*down_proj and 2 more; "
            "export_dense",
        ),
        (other_shapes, "no config describes its shapes"),
        (foreign, "not an artifact of a transformers model"),
    ],
)
def test_what_the_layout_cannot_hold_is_named(build, message, tmp_path):
    build(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        cp.export_gptq(tmp_path / "saved", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_the_command_line_exports_and_refuses_a_folder_in_use(tmp_path):
    cp.quantize(llama(), DATA, bits=4).save(tmp_path / "saved")
    arguments = ["export", str(tmp_path / "saved"), str(tmp_path / "gptq")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "gptq" / "quantize_config.json").is_file()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "not empty" in again.output
