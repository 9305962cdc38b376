"""Small models, texts and recipes that several test files use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llama(
    *, tied: bool = True, hidden: int = 32, layers: int = 2, seed: int = 0
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def write_texts(folder: Path, documents: int = 24) -> list[Path]:
    """Documents of different length whose sentences differ."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(documents):
        path = folder / f"document{i}.txt"
        path.write_text(
            " ".join(f"Sentence {j} of text {i} says {i * j % 97}." for j in range(4 + i % 5))
        )
        paths.append(path)
    return paths


RECIPE = """\
title: Tiny
model: {{path: {model}, task: causal-lm}}
data:
  source: text
  files: [{files}]
  sequence_length: 48
  calibrate: 8
  price: 6
  select: 8
  certify: 16
compress:
  - layers: "model.layers.*"
    options:
      - quantize: {{bits: 2, group_size: 16}}
      - quantize: {{bits: 3, group_size: 16, symmetric: false}}
      - quantize: {{bits: 8}}
  - layers: model.embed_tokens
    options: [{{cast: float16}}]
{budget}
search: {{trials: 4, attempts: 2}}
device: cpu
seed: 0
"""


def write_recipe(folder: Path, *, budget: str = "budget: {metric: loss, max_drop: 0.2}") -> Path:
    """A model folder, text files and a recipe that compresses the one with the other."""
    llama().save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    files = ", ".join(str(p) for p in write_texts(folder / "texts"))
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=folder / "tiny", files=files, budget=budget))
    return path


def contents(folder: Path) -> dict[str, str]:
    """Hashes of everything in a run folder that must not depend on interruptions."""
    names = ("plan.json", "verdict.json", "ledger.json")
    files = [*(folder / name for name in names), *sorted((folder / "model").rglob("*"))]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
