"""Engines as judges: llama.cpp computes what transformers computes, and the verdict is about it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import curvprune as cp
from curvprune.options import Keep
from curvprune.run import RecipeError, run
from curvprune.targets import export_gguf, open_engine
from tests import tiny

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

IDS = torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(0))
ITEMS = [{"input_ids": row[None]} for row in IDS]


def qwen2() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).eval()


def as_gguf(model: nn.Module, folder: Path, *options) -> Path:
    """A model in one option for all layers, as a GGUF file of its own weights."""
    told = cp.Settings(target="curvprune")
    result = cp.compress(model, ITEMS, options=list(options) or [Keep()], settings=told)
    result.save(folder / "model")
    return export_gguf(folder / "model", folder / "model.gguf", tokenizer=False)


def losses(logits: torch.Tensor) -> torch.Tensor:
    """Mean loss of each item."""
    return -logits.log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None]).mean((1, 2))


@pytest.fixture(scope="module")
def uncompressed(tmp_path_factory) -> Path:
    return as_gguf(tiny.llama(), tmp_path_factory.mktemp("float32"))


@pytest.mark.parametrize("build", [tiny.llama, qwen2])
def test_the_logits_are_those_of_transformers(build, tmp_path):
    model = build()
    with open_engine(as_gguf(model, tmp_path), length=24) as served:
        found = served(input_ids=IDS).logits
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    # Keys and values are cached in float16.
    assert torch.allclose(found.log_softmax(-1), expected.log_softmax(-1), atol=0.05)
    assert torch.allclose(losses(found), losses(expected), atol=1e-3)


def test_what_is_padded_is_not_passed_on(uncompressed):
    mask = torch.ones_like(IDS)
    mask[0, 20:], mask[1, :5], mask[2] = 0, 0, 0
    with open_engine(uncompressed, length=24) as served:
        padded = served(input_ids=IDS, attention_mask=mask).logits
        assert torch.equal(padded[0, :20], served(input_ids=IDS[:1, :20]).logits[0])
        assert torch.equal(padded[1, 5:], served(input_ids=IDS[1:2, 5:]).logits[0])
        assert not padded[2].any() and not padded[0, 20:].any()
        mask[3, 7] = 0
        with pytest.raises(ValueError, match="item 3: its attention mask has holes"):
            served(input_ids=IDS, attention_mask=mask)


def test_a_file_is_certified_and_compared_like_a_model(uncompressed):
    model = tiny.llama()
    with open_engine(uncompressed, length=24) as served:
        verdict = cp.certify(model, served, ITEMS, cp.Budget("loss", max_drop=0.01))
        compared = cp.compare(model, served, ITEMS)
    assert abs(verdict.drop) < 1e-3 and verdict.items == len(ITEMS)
    assert compared.kl.value < 1e-4


# ------------------------------------------------------------------------------------ what can fail


def test_what_is_no_model_is_one_sentence(uncompressed, tmp_path):
    absent = open_engine(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match=r"absent\.gguf is not a file"), absent:
        pass
    whole = uncompressed.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "other": b"GGUX" + whole[4:]}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        opened = open_engine(path)
        with pytest.raises(ValueError, match=rf"{name}\.gguf.*llama\.cpp"), opened:
            pass


def test_tokens_that_do_not_fit_are_refused(uncompressed):
    with open_engine(uncompressed, length=8) as served:
        with pytest.raises(ValueError, match=r"24 tokens, and .* was opened for 8"):
            served(input_ids=IDS)
        with pytest.raises(ValueError, match=r"item 0: token 300, .* has 256"):
            served(input_ids=torch.tensor([[1, 300]]))


def test_an_engine_that_dies_ends_no_run_but_its_own(uncompressed):
    with open_engine(uncompressed, length=24) as served:
        os.kill(served.runner.process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"llama\.cpp ended \(status -9\) while it read"):
            served(input_ids=IDS)


def test_an_engine_that_is_not_installed_is_said_before_anything_long(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    recipe = tiny.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "certify: {engine: llama.cpp}\n")
    with pytest.raises(RecipeError, match=r"certify\.engine: .*pip install xllamacpp") as raised:
        run(recipe, tmp_path / "out", progress=False)
    assert raised.value.line == len(recipe.read_text().splitlines())


def test_models_that_it_cannot_run_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    data = [(torch.randn(1, 4), torch.tensor([0])) for _ in range(8)]
    told = cp.Settings(engine="llama.cpp")
    with pytest.raises(ValueError, match=r"engine llama\.cpp runs tokens alone"):
        cp.quantize(model, data, bits=4, settings=told)


# --------------------------------------------------------------------------------------- a verdict

GRIDS = """\
compress:
  - layers: "model.layers.*"
    exclude: "*.down_proj" # whose rows are no whole blocks
    options:
      - quantize: {bits: 4, group_size: 32}
      - quantize: {bits: 8, group_size: 32}
  - layers: model.embed_tokens
    options: [{quantize: {bits: 8, group_size: 32}}]
budget: {metric: loss, max_drop: 0.5, max_bytes: 120000}
target: gguf
certify: {engine: llama.cpp}
"""


def words() -> PreTrainedTokenizerFast:
    """256 tokens of bytes and pairs of them, with merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:200]
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["Sentence 1 of text 2 says 3."] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def for_llama_cpp(folder: Path) -> Path:
    """A recipe that ends in a GGUF file, of a model whose rows are whole blocks."""
    recipe = tiny.write_recipe(folder, budget="")
    tiny.llama(hidden=64).save_pretrained(folder / "tiny")
    words().save_pretrained(folder / "tiny")
    text = recipe.read_text()
    start, end = text.index("compress:"), text.index("search:")
    before = text[:start].replace("sequence_length: 48", "sequence_length: 16")
    recipe.write_text(before + GRIDS + text[end:])
    return recipe


@pytest.mark.filterwarnings("ignore")
def test_the_verdict_is_about_what_runs(tmp_path):
    recipe, out = for_llama_cpp(tmp_path), tmp_path / "out"
    record = run(recipe, out, progress=False).record
    said = json.loads((out / "verdict.json").read_text())
    engine = said["engine"]
    assert engine["name"] == "llama.cpp" and record.engine is not None
    # Paired on the same items, so that the two parts add up.
    assert said["drop"] == pytest.approx(engine["weights"] + engine["share"], abs=1e-9)
    # 8-bit activations cost something, and little.
    assert 0 < abs(engine["share"]) < 0.1
    # The bytes that were planned are those of the file.
    size = (out / "model.gguf").stat().st_size
    assert size == engine["bytes"] == record.size.after_bytes
    (limit,) = [limit for limit in record.limits if limit.name == "max_bytes"]
    assert 0 <= limit.used - size < 64
    # The file is what the verdict says: the engine loses as much again.
    assert "of the engine" in (out / "report.html").read_text()
