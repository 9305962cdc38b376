"""One small model of each family that transformers offers: rounded, saved, and loaded in a fresh
process."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import curvprune as cp
from tests.fresh import in_fresh_process, logits_of_saved

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
QWEN3_MOE = {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

FAMILIES: dict[str, tuple[str, dict, str]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "text"),
    "opt": ("OPTForCausalLM", {**TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}, "text"),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, "text"),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, "text"),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**GROUPED, **QWEN3_MOE}, "text"),
    "gpt-oss": ("GptOssForCausalLM", {**GROUPED, "head_dim": 8, "num_local_experts": 4}, "text"),
    "bert": ("BertForSequenceClassification", TEXT, "text"),
    "t5": ("T5ForConditionalGeneration", T5, "both"),
    "vit": ("ViTForImageClassification", {**SMALL, "image_size": 32, "patch_size": 8}, "image"),
    "convnext": ("ConvNextForImageClassification", CONVNEXT, "image"),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, "speech"),
}


def batch_of(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 8))
    return {
        "text": {"input_ids": ids},
        "both": {"input_ids": ids, "decoder_input_ids": ids.flip(1)},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "speech": {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids},
    }[kind]


def build(name: str) -> nn.Module:
    kind, arguments, _ = FAMILIES[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**arguments)).eval()


@pytest.mark.filterwarnings("ignore:.*belong to no Linear")
def test_every_family_comes_back_in_a_fresh_process(tmp_path):
    expected = {}
    for name, (_, _, kind) in FAMILIES.items():
        model, batch = build(name), batch_of(kind)
        result = cp.quantize(model, [batch], bits=4, objective="label-free")
        folder = str(tmp_path / name)
        result.save(folder)
        save_file({k: v.contiguous() for k, v in batch.items()}, folder + ".batch")
        with torch.no_grad():
            expected[folder] = result.model.eval()(**batch).logits
            assert not torch.equal(expected[folder], model(**batch).logits)  # something was rounded
        rounded = result.model.state_dict()
        for key, weight in model.state_dict().items():
            if "experts." in key and weight.ndim == 3:
                assert not torch.equal(rounded[key], weight), key
    found = in_fresh_process(logits_of_saved, [(folder, False) for folder in expected])
    for folder, logits in zip(expected, found, strict=True):
        # The same weights; the sums of a mixture's experts may run in another order in another
        # process.
        torch.testing.assert_close(
            torch.from_numpy(logits),
            expected[folder],
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, f=folder: f"{f}: {m}",
        )
