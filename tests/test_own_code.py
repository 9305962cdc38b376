"""Models whose class comes with their weights, as ``trust_remote_code: true`` loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import curvprune as cp
from curvprune.run import run
from tests import tiny

CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own-lm"

    def __init__(self, hidden_size=16, vocab_size=256, **others):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**others)
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_own import OwnConfig

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, labels=None, **others):
        hidden = self.embed(input_ids)
        return CausalLMOutput(logits=self.head(hidden + self.mix(hidden).tanh()))
"""


@pytest.fixture
def own_model(tmp_path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    places = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = {"architectures": ["OwnForCausalLM"], "auto_map": places, "model_type": "own-lm"}
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (256, 16), "mix.weight": (16, 16), "mix.bias": (16,)}
    shapes["head.weight"] = (256, 16)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_keeps_the_code_beside_the_weights(own_model, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "run")
    text = recipe.read_text()
    first = next(line for line in text.splitlines() if line.startswith("model:"))
    ours = f"model: {{path: {own_model}, task: causal-lm, trust_remote_code: true}}"
    text = text.replace(first, ours).replace("model.layers.*", "mix")
    recipe.write_text(text.replace("model.embed_tokens", "embed"))

    run(recipe, tmp_path / "out", progress=False)

    folder = tmp_path / "out" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    empty = AutoModelForCausalLM.from_pretrained(own_model, trust_remote_code=True)
    ours = cp.load(folder, model=empty)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    with pytest.raises(ValueError, match=r"OwnForCausalLM.*pass model="):
        cp.load(folder)


def test_code_beside_weights_is_run_only_where_the_recipe_says_so(own_model, tmp_path):
    recipe = tiny.write_recipe(tmp_path / "run")
    text = recipe.read_text()
    first = next(line for line in text.splitlines() if line.startswith("model:"))
    recipe.write_text(text.replace(first, f"model: {{path: {own_model}, task: causal-lm}}"))
    (own_model / "modeling_own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(recipe, tmp_path / "out", progress=False)
