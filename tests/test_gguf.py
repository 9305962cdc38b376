"""GGUF files against the artifact that they are views of: bit by bit through the ``gguf`` package,
as logits through transformers' own reader, and through llama.cpp where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

import curvprune as cp
from curvprune.cli import app
from curvprune.run import source_gguf
from curvprune.targets import (
    gguf_fields,
    gguf_layer_bytes,
    gguf_other_bytes,
    gguf_type,
    shape_of,
    tensors_of,
)

VOCABULARY = 288
OURS = cp.Settings(portable=False)
IDS = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": IDS}]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama with biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    # transformers reads no other width of a head from such a file than the class's own.
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
}


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32, **more: object):
    config, kind, own = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**{**SIZES, **own, **more})).eval().to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.data.uniform_(0.5, 1.5)
    return model


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello there"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def saved(folder: Path, option: object, family: str = "llama", **more: object) -> Path:
    result = cp.compress(model_of(family, **more), DATA, options=[option], settings=OURS)
    result.save(folder, tokenizer=byte_level())
    return folder


def tensors_in(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values_of(tensor: gguf.ReaderTensor) -> torch.Tensor:
    found = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(found, dtype=np.float32))


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    return saved(folder / "saved", cp.Quantize(bits=4, group_size=32))


# ------------------------------------------------------------------------------ exactness


# transformers takes biases of Llama for tensors too many; llama.cpp below reads them.
@pytest.mark.parametrize("family", [name for name in FAMILIES if "biases" not in name])
def test_transformers_reads_the_file_as_the_model_of_the_artifact(family, tmp_path):
    option = cp.Quantize(bits=5, group_size=32, symmetric=False)
    folder = saved(tmp_path / "saved", option, family)
    out = cp.export_gguf(folder, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name).eval()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, cp.load(folder)(IDS).logits)
    tied = family == "llama"
    assert ("output.weight" in tensors_in(out)) is not tied


SYMMETRIC = {1: "Q4_0", 2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}
ZERO_POINTS = {2: "Q4_0", 3: "Q4_0", 4: "Q5_0", 5: "Q8_0", 7: "Q8_0"}
HELD = [
    *[(cp.Quantize(bits=b, group_size=32), name) for b, name in SYMMETRIC.items()],
    *[(cp.Quantize(bits=b, symmetric=False), name) for b, name in ZERO_POINTS.items()],
    (cp.Quantize(bits=4), "Q4_0"),
    (cp.PruneQuantize(prune=cp.Prune(sparsity=0.5), quantize=cp.Quantize(bits=4)), "Q4_0"),
    (cp.Prune(pattern="2:4"), "F32"),
    (cp.PruneCast(prune=cp.Prune(sparsity=0.6), cast=cp.Cast(dtype="float16")), "F16"),
    (cp.Cast(dtype="float16"), "F16"),
    (cp.Cast(dtype="bfloat16"), "BF16"),
    (cp.Keep(), "F32"),
]


@pytest.mark.parametrize(("option", "name"), HELD, ids=lambda part: getattr(part, "key", part))
def test_every_option_is_held_to_the_last_bit_in_the_bytes_that_were_promised(
    option, name, tmp_path
):
    folder = saved(tmp_path / "saved", option)
    out = cp.export_gguf(folder, tmp_path / "model.gguf")
    model, found = cp.load(folder), tensors_in(out)
    for part in ("gate", "up", "down"):
        tensor = found[f"blk.0.ffn_{part}.weight"]
        weight = model.get_submodule(f"model.layers.0.mlp.{part}_proj").weight
        assert tensor.tensor_type.name == name
        assert torch.equal(values_of(tensor), weight.detach())
    assert torch.equal(values_of(found["token_embd.weight"]), model.lm_head.weight.detach())
    # The size of the file, from options and shapes alone.
    shape, names = shape_of(model.config), [one.name for one in tensors_of(model)]
    layers = {n: m.weight.shape for n, m in model.named_modules() if hasattr(m, "weight")}
    layers = {n: tuple(s) for n, s in layers.items() if len(s) == 2 and n != "lm_head"}
    total = gguf_other_bytes(model, layers, gguf_fields(shape, folder, names))
    total += sum(gguf_layer_bytes(option, size) for size in layers.values())
    assert total == os.path.getsize(out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_16_bit_models_are_not_rounded_once_more(dtype, tmp_path):
    model = model_of(dtype=dtype)
    result = cp.quantize(model, DATA, bits=4, group_size=32, settings=OURS)
    result.save(tmp_path / "saved", tokenizer=byte_level())
    out = cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf")
    found = values_of(tensors_in(out)["blk.0.ffn_up.weight"])
    held = result.model.model.layers[0].mlp.up_proj.weight.detach()
    # What curvprune.load gives is that, in the model's type.
    assert torch.equal(found.to(dtype), held) and not torch.equal(found, held.float())
    assert tensors_in(out)["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("portable", [True, False])
def test_a_rounded_embedding_is_codes_again(portable, tmp_path):
    option = cp.Quantize(bits=8, group_size=32)
    settings = cp.Settings(portable=portable)
    result = cp.compress(
        model_of(), DATA, options=[option], layers="model.embed_tokens", settings=settings
    )
    result.save(tmp_path / "saved", tokenizer=byte_level())
    out = cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf")
    tensor = tensors_in(out)["token_embd.weight"]
    assert tensor.tensor_type.name == "Q8_0" and "output.weight" not in tensors_in(out)
    assert torch.equal(values_of(tensor), result.model.lm_head.weight.detach())


def test_floats_that_left_their_grid_stay_floats(tmp_path):
    # In bfloat16 a product of code and scale is rounded once more.
    result = cp.compress(
        model_of(dtype=torch.bfloat16),
        DATA,
        options=[cp.Quantize(bits=8, group_size=32)],
        layers="model.embed_tokens",
    )
    result.save(tmp_path / "saved", tokenizer=byte_level())
    out = cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf")
    tensor = tensors_in(out)["token_embd.weight"]
    assert tensor.tensor_type.name == "BF16"
    # The package gives the bits of the other halves.
    assert torch.equal(values_of(tensor), result.model.lm_head.weight.detach().float())


def test_llama3s_positions_are_those_of_transformers(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = saved(tmp_path / "saved", cp.Keep(), rope_parameters=rope, head_dim=64)
    out = cp.export_gguf(folder, tmp_path / "model.gguf")
    factors = values_of(tensors_in(out)["rope_freqs.weight"])
    plain = 500.0 ** (-torch.arange(0, 64, 2) / 64)
    turned = cp.load(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(plain / factors, turned, rtol=1e-5, atol=0)
    assert len(factors.unique()) > 4


# ------------------------------------------------------------------- what cannot be held


@pytest.mark.parametrize(
    ("option", "width", "nearest"),
    [
        (cp.Quantize(bits=4, group_size=16), 64, "int4-g32-sym"),
        (cp.Quantize(bits=4, group_size=48), 96, "int4-g64-sym"),
        (cp.Quantize(bits=8, symmetric=False), 64, "int8-pc-sym"),
        (cp.Quantize(bits=1, symmetric=False), 64, "int1-pc-sym"),
        (cp.Quantize(bits=4), 48, "float16"),
    ],
    ids=lambda part: getattr(part, "key", part),
)
def test_what_no_type_holds_comes_with_the_nearest_that_one_does(option, width, nearest):
    form = gguf_type(option, (8, width))
    assert form.type is None and form.nearest is not None and form.nearest.key == nearest
    assert gguf_type(form.nearest, (8, width)).type is not None
    with pytest.raises(ValueError, match=f"{option.key}.*nearest: {nearest}"):
        gguf_layer_bytes(option, (8, width))


def test_a_group_as_wide_as_the_row_is_a_channel():
    assert gguf_type(cp.Quantize(bits=4, group_size=100), (8, 64)).type == "Q4_0"


def test_an_option_that_is_not_held_is_named_with_its_tensor(tmp_path):
    folder = saved(tmp_path / "saved", cp.Quantize(bits=4, group_size=16))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*int4-g16-sym.*int4-g32-sym"):
        cp.export_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_scales_that_float16_cannot_say_are_named(tmp_path):
    model = model_of(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 2**-17 * 1.1
    result = cp.quantize(model, DATA, bits=4, group_size=32, settings=OURS)
    result.save(tmp_path / "saved", tokenizer=byte_level())
    with pytest.raises(ValueError, match=r"up_proj\.weight: its scales do not fit into float16"):
        cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_another_family_is_refused_with_those_that_there_are(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    cp.compress(GPT2LMHeadModel(config), DATA, options=[cp.Keep()]).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*Llama.*Mistral.*Qwen2.*Qwen3"):
        cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf")


def test_a_file_that_is_there_is_kept(four_bits, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"model\.gguf is there already"):
        cp.export_gguf(four_bits, out)
    assert out.read_text() == "mine"
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        cp.export_gguf(four_bits, tmp_path / "model")


def test_a_damaged_artifact_is_refused(tmp_path):
    folder = saved(tmp_path / "saved", cp.Quantize(bits=4, group_size=32))
    file = folder / "packed.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"packed\.safetensors is not what was written"):
        cp.export_gguf(folder, tmp_path / "model.gguf")


# --------------------------------------------------------------------- metadata, tokenizer


def entries(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_tokenizer_is_that_of_the_folder(four_bits, tmp_path):
    said = entries(cp.export_gguf(four_bits, tmp_path / "model.gguf"))
    own = byte_level()
    tokens = said["tokenizer.ggml.tokens"]
    assert tokens[: len(own)] == own.convert_ids_to_tokens(range(len(own)))
    assert len(tokens) == VOCABULARY and said["tokenizer.ggml.token_type"][-1] == 5
    assert said["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert said["tokenizer.ggml.pre"] == "gpt-2" and said["tokenizer.ggml.eos_token_id"] == 1
    merges = json.loads((four_bits / "tokenizer.json").read_text())["model"]["merges"]
    assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_sentencepiece_pieces_have_the_ranks_of_their_merges_as_scores(tmp_path):
    tokens = ["<unk>", "<s>", *[f"<0x{b:02X}>" for b in range(256)], "▁", "a", "b", "▁a", "▁ab"]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("▁", "a"), ("▁a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    result = cp.compress(model_of(), DATA, options=[cp.Keep()], settings=OURS)
    result.save(tmp_path / "saved", tokenizer=fast)
    said = entries(cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf"))
    assert said["tokenizer.ggml.model"] == "llama"
    score = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    assert 0 == score["▁a"] > score["▁ab"] > score["a"] == score["b"]
    types = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert [types[t] for t in ("<0x41>", "<s>", "a")] == [6, 3, 1]
    assert said["tokenizer.ggml.add_space_prefix"] is True


def test_a_folder_without_a_tokenizer_says_what_helps(tmp_path):
    result = cp.compress(model_of(), DATA, options=[cp.Keep()], settings=OURS)
    result.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no tokenizer\.json.*--like.*tokenizer=False"):
        cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf")
    out = cp.export_gguf(tmp_path / "saved", tmp_path / "model.gguf", tokenizer=False)
    assert entries(out)["tokenizer.ggml.model"] == "none"


def test_a_split_of_texts_that_is_not_known_is_refused(tmp_path):
    folder = saved(tmp_path / "saved", cp.Keep())
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    result = cp.compress(model_of(), DATA, options=[cp.Keep()], settings=OURS)
    result.save(folder, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*pre_tokenizer.*--like"):
        cp.export_gguf(folder, tmp_path / "model.gguf")


def test_metadata_of_a_file_of_the_same_model_is_taken(four_bits, tmp_path):
    first = cp.export_gguf(four_bits, tmp_path / "first.gguf")
    eight = saved(tmp_path / "eight", cp.Quantize(bits=8, group_size=32))
    command = ["export", str(eight), str(tmp_path / "second.gguf"), "--target", "gguf"]
    found = CliRunner().invoke(app, [*command, "--like", str(first)])
    assert found.exit_code == 0, found.output
    one, two = entries(first), entries(tmp_path / "second.gguf")
    assert {key for key in one if one[key] != two[key]} == {"general.file_type"}
    assert two["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


@pytest.mark.parametrize(
    ("family", "more", "what"),
    [
        ("qwen2", {}, "general.architecture is 'qwen2'"),
        ("llama", {"num_hidden_layers": 2}, "llama.block_count is 2"),
        ("llama", {"intermediate_size": 64}, "llama.feed_forward_length is 64"),
        ("llama", {"vocab_size": 320}, "the number of tokens is 320"),
        ("llama", {"rms_norm_eps": 1e-5}, "layer_norm_rms_epsilon"),
        ("llama with biases", {}, "it has blk.0.attn_k.bias"),
    ],
)
def test_a_file_of_another_model_is_named_with_what_differs(
    family, more, what, four_bits, tmp_path
):
    other = cp.export_gguf(saved(tmp_path / "o", cp.Keep(), family, **more), tmp_path / "o.gguf")
    with pytest.raises(ValueError, match=r"o\.gguf is of another model") as error:
        cp.export_gguf(four_bits, tmp_path / "model.gguf", like=other)
    assert what in str(error.value) and not (tmp_path / "model.gguf").exists()


def test_like_is_a_whole_file(four_bits, tmp_path):
    whole = cp.export_gguf(four_bits, tmp_path / "whole.gguf")
    (tmp_path / "half.gguf").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.gguf").write_text("not a model")
    for name in ("half", "text", "none"):
        with pytest.raises(ValueError, match=rf"{name}\.gguf"):
            cp.export_gguf(four_bits, tmp_path / "m.gguf", like=tmp_path / f"{name}.gguf")


def test_like_goes_with_gguf_alone(four_bits, tmp_path):
    command = ["export", str(four_bits), str(tmp_path / "out"), "--like", "a.gguf"]
    found = CliRunner().invoke(app, [*command, "--format", "dense"])
    assert found.exit_code == 2 and not (tmp_path / "out").exists()


def test_the_file_that_a_run_began_with_is_found(tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    (tmp_path / "recipe.lock.yaml").write_text(recipe.read_text())
    found = source_gguf(tmp_path / "model")
    assert found is not None and found.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert source_gguf(tmp_path / "elsewhere" / "model") is None


# ----------------------------------------------------------------------------- llama.cpp

ASK = """\
import json, os, sys
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.n_gpu_layers = sys.argv[1], 64, 1, False, 0
p.cpuparams.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
asked = {"prompt": json.loads(sys.argv[2]), "n_predict": 1, "n_probs": 288, "samplers": []}
found = server.handle_completions({**asked, "temperature": 1.0})
found = found if isinstance(found, dict) else json.loads(found)
first = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
with open(sys.argv[3], "w") as file:
    json.dump({str(one["id"]): one["logprob"] for one in first}, file)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(family, tmp_path):
    pytest.importorskip("xllamacpp")
    # It rounds the inputs of all types but this one.
    folder = saved(tmp_path / "saved", cp.Keep(), family)
    out = cp.export_gguf(folder, tmp_path / "model.gguf")
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-c", ASK, out, json.dumps(IDS[0].tolist()), answer]
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=100)
    with torch.no_grad():
        expected = cp.load(folder)(IDS[:1]).logits[0, -1].log_softmax(-1)
    said = json.loads(answer.read_text())
    found = torch.tensor([said[str(token)] for token in range(VOCABULARY)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
