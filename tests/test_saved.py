"""After every save a folder is what it claims to be: transformers reads it where it is called
portable, and ours reads nothing that is not whole. One test for each cause."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import curvprune as cp
from curvprune import artifact
from tests import tiny

IDS = torch.arange(16).reshape(2, 8)
BATCH = {"input_ids": IDS}


def same_outputs(one: nn.Module, other: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        assert torch.equal(one.eval()(**batch).logits, other.eval()(**batch).logits)


def test_experts_that_transformers_renames_when_a_folder_is_packed_come_back(tmp_path):
    """With a quantization config, Llama 4's stacked experts are looked for one by one, not found,
    and drawn at random: its layers are stored dense."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
    )
    model = Llama4ForCausalLM(config).eval()
    result = cp.quantize(model, [BATCH], bits=4, layers=["*self_attn*", "lm_head"])
    folder = result.save(tmp_path)
    assert artifact.read_manifest(folder).portable is True
    theirs = Llama4ForCausalLM.from_pretrained(folder)
    for read in (theirs, cp.load(folder)):
        found = read.state_dict()
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(found[name], tensor), name


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
    config = T5Config(**sizes, num_heads=4, decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def test_a_class_that_initialises_packed_weights_by_name_is_stored_dense_with_a_note(tmp_path):
    model, batch = t5(), {"input_ids": IDS, "decoder_input_ids": IDS}
    asked = {"bits": 4, "objective": "label-free"}
    result = cp.quantize(model, [batch], **asked)
    folder = result.save(tmp_path / "dense")
    (note,) = [text for text in result.plan.notes if "stored dense" in text]
    assert "T5ForConditionalGeneration" in note and "target: curvprune" in note
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    on_disk = sum(size for _, size in artifact.tensor_names(folder).values())
    assert on_disk == result.plan.bytes
    for read in (T5ForConditionalGeneration.from_pretrained(folder), cp.load(folder)):
        same_outputs(read, result.model, batch)
    packed = cp.quantize(model, [batch], **asked, settings=cp.Settings(portable=False))
    assert packed.plan.bytes < 0.3 * result.plan.bytes
    same_outputs(cp.load(packed.save(tmp_path / "packed")), packed.model, batch)


def test_a_class_that_reads_some_layers_packed_gets_those():
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    model = MambaForCausalLM(MambaConfig(**sizes, tie_word_embeddings=False))
    found = artifact.readable(model)
    assert found.why_not == "" and "weight" in found.why_dense
    assert 0 < len(found.packed) < 9
    assert not any(name.endswith("dt_proj") for name in found.packed)


class Longer(LlamaForCausalLM):
    """A user's own class: no config says its adapter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_parameter("extra", nn.Parameter(torch.ones(3)))


def test_what_no_reader_but_ours_takes_is_not_called_portable(tmp_path):
    model = tiny.llama()
    model.register_parameter("extra", nn.Parameter(torch.ones(3)))
    result = cp.quantize(model, [BATCH], bits=4, layers="model.layers.*")
    assert any("from_pretrained does not read" in note for note in result.plan.notes)
    with pytest.warns(UserWarning, match=r"from_pretrained does not read.*extra"):
        folder = result.save(tmp_path)
    manifest = artifact.read_manifest(folder)
    assert manifest.portable is False and "extra" in manifest.unread
    assert (folder / "config.json").is_file() and not (folder / "model.safetensors").exists()
    assert artifact.weights_file(folder).stat().st_size > result.plan.bytes
    same_outputs(cp.load(folder, model=Longer(model.config)), result.model, BATCH)
    with pytest.raises(ValueError, match=r"packed\.safetensors: tensor 'extra' has no place"):
        cp.load(folder)


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_with_other_tensors_is_refused_by_name(packed, tmp_path):
    result = cp.quantize(tiny.llama(), [BATCH], bits=4, layers="model.layers.*")
    folder = result.save(tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight_packed"

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as raised:
            cp.load(folder, packed=packed, verify=False)
        assert str(file) in str(raised.value)

    refused({k: t for k, t in whole.items() if k != norm}, f"no tensor for '{norm}'")
    refused({k: t for k, t in whole.items() if k != up}, r"layer .*up_proj lacks its weight_packed")
    refused({**whole, "more": torch.ones(1)}, "tensor 'more' has no place")
    refused({**whole, norm: torch.ones(31)}, r"model\.norm\.weight is \(31,\)")
    refused({**whole, norm: torch.ones(32).int()}, r"model\.norm\.weight holds torch\.int32")


@pytest.mark.parametrize("said", [True, False])
def test_a_config_says_whether_the_head_is_tied_as_it_is_in_memory(said, tmp_path):
    model = tiny.llama(tied=said)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(embedding.detach() * 2) if said else embedding
    result = cp.quantize(model, [BATCH], bits=4, layers="model.layers.*")
    folder = result.save(tmp_path)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not said
    for read in (LlamaForCausalLM.from_pretrained(folder), cp.load(folder)):
        same_outputs(read, result.model, BATCH)
        assert (read.lm_head.weight is read.model.embed_tokens.weight) is not said


def test_a_config_with_an_infinite_number_is_read(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    config = Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1, chunk_size=8)
    model = Mamba2ForCausalLM(config).eval()
    assert float("inf") in config.time_step_limit
    result = cp.quantize(model, [BATCH], bits=4, layers="lm_head")
    folder = result.save(tmp_path)
    assert artifact.read_manifest(folder).portable is True
    for read in (Mamba2ForCausalLM.from_pretrained(folder), cp.load(folder)):
        same_outputs(read, result.model, BATCH)


def test_a_generation_config_that_contradicts_itself_is_saved_as_it_is(tmp_path):
    model = tiny.llama()
    model.generation_config.temperature = 0.5  # and no sampling
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    result = cp.quantize(model, [BATCH], bits=4)
    folder = result.save(tmp_path / "saved")
    out = cp.export_dense(folder, tmp_path / "dense")
    for read in (cp.load(folder), LlamaForCausalLM.from_pretrained(out)):
        assert read.generation_config.temperature == 0.5


@pytest.mark.parametrize("portable", [True, False])
def test_tensors_of_several_types_keep_them(portable, tmp_path):
    model, batch = t5().to(torch.bfloat16), {"input_ids": IDS, "decoder_input_ids": IDS}
    wide = "encoder.block.0.layer.1.DenseReluDense.wo"
    model.get_submodule(wide).float()
    result = cp.quantize(
        model,
        [batch],
        bits=4,
        layers="*SelfAttention.[qkv]",
        objective="label-free",
        settings=cp.Settings(portable=portable),
    )
    if portable:  # transformers would round it
        with pytest.warns(UserWarning, match=rf"{wide}\.weight becomes bfloat16 from float32"):
            result.save(tmp_path)
    else:
        result.save(tmp_path)
    assert artifact.read_manifest(tmp_path).dtypes[f"{wide}.weight"] == "float32"
    found = cp.load(tmp_path).state_dict()
    for name, tensor in result.model.state_dict().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_model_without_memory_cannot_be_filled(tmp_path):
    result = cp.quantize(tiny.llama(), [BATCH], bits=4, layers="model.layers.*")
    folder = result.save(tmp_path)
    with torch.device("meta"):
        empty = LlamaForCausalLM(tiny.llama().config)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is on the meta device"):
        cp.load(folder, model=empty)
